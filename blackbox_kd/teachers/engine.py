"""The one way to ask an endpoint anything: what is known is not asked again, what comes back is kept first.

requests -> known already, or just being asked? -> short queue -> workers -> caller (budget, limiter, retries)
-> journal -> DuckDB
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sized
from contextlib import AsyncExitStack, aclosing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.claims import Claims
from blackbox_kd.corpus.connection import still_wanted
from blackbox_kd.corpus.writer import Writer
from blackbox_kd.progress import counting, say
from blackbox_kd.teachers.base import Reply, Taken, TeacherConfig, Transport, Way
from blackbox_kd.teachers.batch.ledger import Ledger
from blackbox_kd.teachers.budget import Budget, BudgetConfig
from blackbox_kd.teachers.caller import Caller
from blackbox_kd.teachers.garbage import rarely_collected
from blackbox_kd.teachers.live import Pulse
from blackbox_kd.teachers.missing import MissingLogprobs
from blackbox_kd.teachers.prices import price_of
from blackbox_kd.teachers.several import Several
from blackbox_kd.teachers.wire import Decoder, usage_of
from blackbox_kd.teachers.work import Work
from blackbox_kd.types import Author, Completion, Request

CHUNK = 2048
"""Questions that are looked up in the corpus at once; no more of them are held in memory."""
DYING_S = 0.1
"""A process that is killed lets go of its claims, and a moment later of its journal."""


class Engine:
    """Use as an async context manager; the transport opens with the first question that is not known already."""

    def __init__(
        self,
        config: TeacherConfig,
        corpus: Corpus,
        run_id: str,
        author: Author = "teacher",
        caps: BudgetConfig | None = None,
        run_dir: Path | None = None,
        beside: Budget | None = None,
    ) -> None:
        """`beside`: the budget of another endpoint of the run, to be shared; else `caps` makes a new one.

        Raises:
            ConfigError: a cap that cannot be kept, see `Budget`.
        """
        self._config, self._corpus, self._run_id, self._author = config, corpus, run_id, author
        self.run_dir = run_dir
        price = price_of(config)
        self.budget = beside.beside(price) if beside else Budget(caps or BudgetConfig(), price)
        self.caller = Caller(config, run_id, self.budget)
        self._decoder = Decoder()
        self._stack = AsyncExitStack()
        self._connecting = asyncio.Lock()
        self._open: list[Work] = []
        self.asked = self.cached = 0
        self.missing = MissingLogprobs(config.require_logprobs)

    async def __aenter__(self) -> Engine:
        self._stack.enter_context(rarely_collected())
        return self

    async def __aexit__(self, *exc: object) -> None:
        for work in list(self._open):  # left behind by a caller who walked away from `complete`
            await work.drain()
        await self._stack.aclose()

    @property
    def busy(self) -> bool:
        """Whether answers are in flight."""
        return bool(self._open)

    async def complete(
        self,
        requests: Iterable[Request],
        *,
        total: int | None = None,
        round_: int = 0,
        known: bool = True,
        way: Way | None = None,
        description: str = "asking the teacher",
    ) -> AsyncIterator[Completion]:
        """Every answer to every request, in order of arrival; those that the corpus has only if `known`.

        `requests` may be a generator of any length (`total`, where it has no len): a few thousand are held at once.
        Each is one call that is read as a chat completion, unless there is another `way`.
        A request that the endpoint rejects becomes a dead letter and yields nothing; one that keeps failing stays
        pending for the next start.

        Raises:
            TeacherRefused: key or quota; TeacherUnreachable: nothing gets through any more.
            BudgetExhausted: the next call could pass a cap.
            CorpusError: the journal or the corpus cannot be written.
        """
        total = len(requests) if isinstance(requests, Sized) else total
        most = self._config.concurrency
        work = Work(
            most if total is None else max(1, min(most, total)),
            self.caller.wake,
            description,
            total,
            drain_s=self._config.timeout_s,
        )
        several = Several(way, self.caller, self._corpus.path, self._config.address) if way else None
        ask = partial(self._ask_by, several) if several else partial(self._ask, round_)
        async with aclosing(self._answers(work, requests, ask, known)) as answers:
            async for completions in answers:
                for completion in completions:
                    yield completion
        work.conclude()

    async def call(self, request: Request) -> Reply:
        """One question whose reply the caller reads: a call in the corpus, but neither answer nor dead letter.

        Raises:
            TeacherError, BudgetExhausted, CorpusError: as `complete`; RequestRejected: the endpoint cannot do this.
        """
        replies = []

        def read(reply: Reply) -> Taken:
            replies.append(reply)
            return Taken(usage=usage_of(reply.data))

        await asyncio.to_thread(self._corpus.add_requests, [request])
        await self.transport()
        with Writer(self._corpus) as writer:
            await self.caller.call(
                request,
                Work(1, self.caller.wake, "call", 1, drain_s=self._config.timeout_s),
                writer,
                read,
                bury=False,
                max_retries=1,
            )
        return replies[-1]

    async def _answers(
        self, work: Work, requests: Iterable[Request], ask: Callable[..., Any], known: bool
    ) -> AsyncGenerator[list[Completion], None]:
        with (
            Claims(self._corpus.path, work.open) as claims,
            Writer(self._corpus, claims) as writer,
            counting(work.description, work.total) as progress,
        ):
            self._open.append(work)
            work.start(
                self._produce(work, requests, writer, claims, known),
                lambda request: ask(request, work, writer),
            )
            to = None if self._author == "student" else self._corpus.journal  # `status` shows what is billed
            beating = Pulse(work, self.caller, self.budget, progress, self._run_id, self.run_dir, to)
            async with beating:
                try:
                    async for completions in work.results():
                        yield completions
                finally:  # whatever ends the loop, what is in flight is paid for: wait for it and keep it
                    await work.drain()
                    self._open.remove(work)

    async def _produce(
        self, work: Work, requests: Iterable[Request], writer: Writer, claims: Claims, known: bool
    ) -> None:
        """Look requests up in the corpus, chunk by chunk, and queue those that nobody has answered or asks just now."""
        still_wanted.set(lambda: not work.stopped)
        stream, aside = iter(requests), list[Request]()
        while chunk := await asyncio.to_thread(lambda: list(islice(stream, CHUNK))):
            aside = await self._queue([*aside, *chunk], work, claims, known)
        while aside:
            await work.wait_for_others()
            writer.check()
            aside = await self._queue(aside, work, claims, known)

    async def _queue(self, chunk: list[Request], work: Work, claims: Claims, known: bool) -> list[Request]:
        """Queue what of a chunk is to be asked; returns those that another run asks just now."""
        unique = {request.request_key: request for request in chunk}
        in_batches = unique.keys() & {key for batch in Ledger(self._corpus.path).batches() for key in batch.keys}
        if in_batches:
            say(f"{len(in_batches)} questions are in a batch and not asked here: --sample.batch true waits for them")
        ours = claims.mine & unique.keys()  # they stand twice among the requests
        # Claimed first: what another run is through with is seen in the corpus.
        taken = await asyncio.to_thread(claims.take, unique.keys() - ours - in_batches)
        aside = unique.keys() - ours - in_batches - taken
        if work.aside:
            await asyncio.sleep(DYING_S)
        looked_up = [request for key, request in unique.items() if key not in aside]
        found = await asyncio.to_thread(self._corpus.look_up, looked_up, with_answers=known)
        for completions in found.answers.values():
            work.yield_known(completions)
        dead = set() if self._config.retry_dead_letters else found.dead
        settled = found.answered | dead
        claims.free(taken & settled)
        new = taken - settled
        todo = [request for key, request in unique.items() if key in new]
        self.cached += len(found.answered)
        work.looked_up(len(chunk), len(found.answered), len(dead), len(todo), len(aside))
        if todo:
            await self.transport()
        for request in todo:
            await work.put(request)
        return [request for key, request in unique.items() if key in aside]

    async def count_history(self) -> None:
        """What earlier starts of this run were billed, and what it has in batches, counts against its caps."""
        if not self.budget.caps.any:
            return
        self.budget.count_history(await asyncio.to_thread(self._corpus.billed, self._run_id))
        for batch in Ledger(self._corpus.path).batches():
            if batch.run_id == self._run_id:
                for request in (await asyncio.to_thread(self._corpus.requests, batch.keys)).values():
                    self.budget.commit(request.body)

    async def transport(self) -> Transport:
        """Connected with the first use."""
        async with self._connecting:
            if self.caller.transport is None:
                if not self.budget.is_counted:  # later it would forget what is not in the corpus yet
                    await self.count_history()
                self.caller.transport = await self._stack.enter_async_context(self._config.connect())
        if len(self._open) <= 1:
            self.caller.limiter.begin()
        return self.caller.transport

    async def _ask(self, round_: int, request: Request, work: Work, writer: Writer) -> list[Completion]:
        def read(reply: Reply) -> Taken:
            return Taken(*self._decoder.decode(reply.data, request, self._author, round_))

        completions = await self.caller.call(request, work, writer, read)
        self.asked += 1
        self.missing.note(request, completions, self._decoder.odd)
        self.missing.check()
        return completions

    async def _ask_by(self, several: Several, request: Request, work: Work, writer: Writer) -> list[Completion]:
        completions = await several.ask(request, work, writer)
        self.asked += 1
        return completions
