"""The one way to ask an endpoint anything: what is known is not asked again, what comes back is kept first.

requests -> known already? -> bounded workers -> (gate, retries) -> journal -> DuckDB, and to the caller
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing

import tenacity

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Answered, Sent
from blackbox_kd.corpus.writer import Writer
from blackbox_kd.errors import (
    RateLimited,
    RequestRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnreachable,
    TransientError,
)
from blackbox_kd.progress import counting, say
from blackbox_kd.teachers.base import TeacherConfig, Transport
from blackbox_kd.teachers.wire import decode_reply
from blackbox_kd.teachers.work import Stopped, Work
from blackbox_kd.types import Attempt, Author, Completion, Request, Usage, scorer

MAX_RATE_LIMIT_WAIT_S = 900.0
"""A request that meets nothing but 429 for so long fails."""
SAY_WAIT_S = 5.0
"""A pause at the gate that a person should know of."""


class Engine:
    """Use as an async context manager; the transport opens with the first question that is not known already."""

    def __init__(self, config: TeacherConfig, corpus: Corpus, run_id: str, author: Author = "teacher") -> None:
        self._config, self._corpus, self._run_id, self._author = config, corpus, run_id, author
        self._stack = AsyncExitStack()
        self._transport: Transport | None = None
        self._open: list[Work] = []
        self._gate = 0.0  # monotonic time before which nothing is sent
        self._gate_closed = 0.0  # when it was closed last
        self._limited = 0  # times in a row that it was
        self.asked = 0
        self.cached = 0
        self.missing_logprobs = 0

    async def __aenter__(self) -> Engine:
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
        self, requests: Sequence[Request], *, round_: int = 0, description: str = "asking the teacher"
    ) -> AsyncIterator[Completion]:
        """Every answer to every request, known ones first, in order of arrival.

        A request that the endpoint rejects becomes a dead letter and yields nothing; one that keeps failing stays
        pending for the next start.

        Raises:
            TeacherRefused: key or quota; TeacherUnreachable: nothing gets through any more.
            CorpusError: the journal or the corpus cannot be written.
        """
        requests = list({request.request_key: request for request in requests}.values())
        self._corpus.add_requests(requests)
        keys = [request.request_key for request in requests]
        known = self._corpus.answers(keys)
        dead = {} if self._config.retry_dead_letters else self._corpus.dead(keys)
        for request in requests:
            for completion in known.get(request.request_key, ()):
                yield completion
        todo = [r for r in requests if r.request_key not in known and r.request_key not in dead]
        self.cached += len(known)
        say(f"{description}: {len(requests)} questions, {len(known)} answered before, {len(todo)} to ask"
            + (f", {len(dead)} in dead_letters (see teacher.retry_dead_letters)" if dead else ""))  # fmt: skip
        if not todo:
            return
        if self._transport is None:
            self._transport = await self._stack.enter_async_context(self._config.connect())
        async with aclosing(self._ask_all(todo, round_, description)) as answers:
            async for completion in answers:
                yield completion

    async def _ask_all(self, todo: list[Request], round_: int, description: str) -> AsyncGenerator[Completion, None]:
        work = Work(todo)
        with Writer(self._corpus) as writer, counting(description, len(todo)) as progress:
            self._open.append(work)
            work.workers = [
                asyncio.create_task(self._work(work, writer, round_))
                for _ in range(min(self._config.concurrency, len(todo)))
            ]
            try:
                async for completions in work.results():
                    progress.advance(note=f"({work.failed} failed)" if work.failed else "")
                    for completion in completions:
                        yield completion
            finally:  # whatever ends the loop, what is in flight is paid for: wait for it and keep it
                await work.drain()
                self._open.remove(work)
        if work.error:
            raise work.error
        if work.rejected == len(todo):
            raise TeacherRefused(f"all {len(todo)} requests were rejected, the last with: {work.last_failure}")
        if work.failed == len(todo):
            raise TeacherUnreachable(f"none of {len(todo)} requests got through: {work.last_failure}")
        if work.failed:
            say(f"{work.failed} of {len(todo)} requests failed ({work.last_failure}); they stay pending, run again")

    async def _work(self, work: Work, writer: Writer, round_: int) -> None:
        for request in work:
            try:
                completions = await self._ask(request, work, writer, round_)
            except RequestRejected as error:
                work.reject(error)
                completions = []
            except (TransientError, RateLimited) as error:
                work.fail(error)
                completions = []
            except Stopped:
                return
            except BaseException as error:
                work.stop(error)
                raise
            else:
                work.in_a_row = 0
            await work.queue.put(completions)

    async def _ask(self, request: Request, work: Work, writer: Writer, round_: int) -> list[Completion]:
        """One request until it is answered, rejected, or has failed too often."""
        started, transient = time.monotonic(), 0

        def spent(state: tenacity.RetryCallState) -> bool:
            nonlocal transient
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, RateLimited):
                return time.monotonic() - started > MAX_RATE_LIMIT_WAIT_S
            transient += 1
            return transient > self._config.max_retries

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, RateLimited):
                return 0.0  # the gate holds everybody
            backoff = tenacity.wait_random_exponential(multiplier=0.25, max=20)(state)
            return max(backoff, getattr(error, "retry_after_s", None) or 0.0)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((TransientError, RateLimited)),
            stop=spent,
            wait=wait,
            sleep=work.sleep,
            reraise=True,
        )
        return await retrying(self._attempt, request, work, writer, round_)

    async def _attempt(self, request: Request, work: Work, writer: Writer, round_: int) -> list[Completion]:
        """One HTTP call; its outcome is in the journal before it is anybody's."""
        await self._pass_gate(work)
        assert self._transport is not None
        identity = {
            "attempt_id": str(uuid.uuid4()),
            "request_key": request.request_key,
            "run_id": self._run_id,
        }
        sent_at, clock = time.time(), time.monotonic()
        writer.submit(Sent(**identity, attempted_at=sent_at))
        completions: list[Completion] = []
        outcome: dict[str, object] = {}
        dead = False
        try:
            reply = await self._transport.send(request.body)
            outcome = {"status": 200, "billed": True, "server_request_id": reply.server_request_id}
            completions, usage = decode_reply(reply.data, request, self._author, round_)
            outcome |= {"usage": usage, "cost_usd": self._cost(usage)}
        except TeacherError as error:
            # No status: the connection died, and nobody knows whether the call was paid for.
            outcome |= {"billed": None if error.status in (None, 200) else False, "status": error.status,
                        "error": str(error), "retry_after_s": error.retry_after_s}  # fmt: skip
            outcome.setdefault("server_request_id", error.server_request_id)
            if error.status in (404, 405) and not self.asked:  # else every request would become a dead letter
                raise TeacherRefused(
                    f"the first answer is {error}; check teacher.base_url and teacher.model", status=error.status
                ) from error
            dead = isinstance(error, RequestRejected)
            self._learn(error, clock)
            raise
        except BaseException as error:
            outcome = {"error": f"interrupted: {type(error).__name__}"}
            raise
        finally:
            attempt = Attempt(**identity, attempted_at=sent_at, latency_s=time.monotonic() - clock, **outcome)  # type: ignore[arg-type]
            by = scorer(request.model, request.context_hash)
            writer.submit(Answered(attempt=attempt, completions=completions, scorer=by, dead_letter=dead))
        self.asked += 1
        self._limited = 0
        self._count_missing_logprobs(request, completions)
        return completions

    def _cost(self, usage: Usage) -> float | None:
        """None where the price is not known, or the reply does not say how much was used."""
        return self._config.price.cost(usage) if self._config.price and usage != Usage() else None

    async def _pass_gate(self, work: Work) -> None:
        if work.stopped:
            raise Stopped
        while (left := self._gate - time.monotonic()) > 0:
            await work.sleep(left)

    def _learn(self, error: TeacherError, sent: float) -> None:
        """A 429 closes the gate for everybody, for as long as the endpoint asks or twice as long as the last time."""
        if not isinstance(error, RateLimited):
            return
        wait_s, now = error.retry_after_s, time.monotonic()
        if not wait_s:
            if sent < self._gate_closed:
                return  # one of a burst that closed the gate already
            wait_s = min(30.0, 0.5 * 2**self._limited)
            self._limited = min(self._limited + 1, 6)
        if wait_s >= SAY_WAIT_S and now + wait_s > self._gate + SAY_WAIT_S:
            say(f"rate limit: the teacher wants a pause of {wait_s:.0f} s")
        self._gate, self._gate_closed = max(self._gate, now + wait_s), now

    def _count_missing_logprobs(self, request: Request, completions: list[Completion]) -> None:
        if request.body.get("logprobs") and any(c.text and not c.logprobs for c in completions):
            self.missing_logprobs += 1
            if self.missing_logprobs == 1:
                say(f"{request.model} was asked for logprobs and gave none; the text is kept, soft labels will lack")
