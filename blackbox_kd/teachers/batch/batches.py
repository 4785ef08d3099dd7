"""Questions in, answers out: what is to be asked, and which batches are to be waited for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing
from itertools import islice

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import BudgetExhausted
from blackbox_kd.progress import say
from blackbox_kd.sections import SampleConfig
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.teachers.batch.collect import Collector
from blackbox_kd.teachers.batch.ledger import Batch, Ledger
from blackbox_kd.teachers.batch.pulse import BatchPulse
from blackbox_kd.teachers.batch.submit import Packer, Submitter
from blackbox_kd.teachers.batch.tally import Tally
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.types import Completion, Request

PLAN_CHUNK = 10_000


class Batches:
    """Asks in batches."""

    def __init__(
        self, config: TeacherConfig, sample: SampleConfig, corpus: Corpus, run_id: str, engine: Engine
    ) -> None:
        """`engine` counts, and holds the budget."""
        self._config, self._sample, self._corpus, self._run_id = config, sample, corpus, run_id
        self._engine = engine
        self._ledger = Ledger(corpus.path)
        self._full: BudgetExhausted | None = None

    async def complete(
        self, requests: Iterable[Request], *, description: str = "batch", **_: object
    ) -> AsyncIterator[Completion]:
        """Each new answer, when its batch has ended.

        What is under way already, by this run or another one on this corpus, is waited for and not asked again.

        Raises:
            ConfigError: the provider has no Batch API.
            TeacherRefused: key, quota or a batch was not accepted; TeacherUnreachable: no answer at all.
            BudgetExhausted: not every question fits; those that do are answered first.
            CorpusError: the ledger, the journal or the corpus cannot be written.
        """
        await self._engine.count_history()
        async with AsyncExitStack() as stack:
            async with self._ledger.locked():
                waiting = self._plan(requests, description)
                if not waiting:
                    self._conclude()
                    return
                sdk = await stack.enter_async_context(self._config.open_sdk())
                waiting = _at(str(sdk.client.base_url), waiting)
                tally, total = Tally(self._engine.missing), sum(len(batch.keys) for batch in waiting)
                pulse = BatchPulse(tally, self._engine, self._corpus, self._run_id, description, total)
                await stack.enter_async_context(pulse)
                submitter = Submitter(sdk, self._corpus, self._ledger, self._config.max_retries)
                for batch in waiting:
                    await submitter.submit(batch)
            collector = Collector(sdk, self._corpus, self._ledger, tally, self._config, self._sample.batch_poll_s)
            async with aclosing(collector.collect(waiting, description)) as completions:
                async for completion in completions:
                    yield completion
        await self._engine.count_history()
        self._conclude()

    def _conclude(self) -> None:
        if self._full:
            raise self._full

    def _plan(self, requests: Iterable[Request], description: str) -> list[Batch]:
        """Whom to wait for: batches under way that hold some of these questions, and new ones for the rest."""
        under_way = self._ledger.batches()
        holder = {key: batch for batch in under_way for key in batch.keys}
        waiting: dict[str, Batch] = {}
        packer = Packer(self._run_id, self._sample.batch_max_requests)
        for chunk in _chunks(requests, PLAN_CHUNK):
            for key, request in self._unsettled(chunk).items():
                if key not in holder and self._fits(request):
                    holder[key] = packer.add(request)
                if key in holder:
                    waiting[holder[key].marker] = holder[key]
        fresh = sum(len(batch.keys) for batch in packer.batches)
        held = sum(len(batch.keys) for batch in waiting.values()) - fresh
        say(f"{description}: {fresh} questions to ask in {len(packer.batches)} batches, {held} are under way already")
        if others := len([batch for batch in under_way if batch.marker not in waiting]):
            say(f"{others} batches of other questions are under way; the command that asked them collects them")
        return list(waiting.values())

    def _fits(self, request: Request) -> bool:
        """Once one does not, none does: questions are asked in order."""
        try:
            if not self._full:
                self._engine.budget.take(request.body)
        except BudgetExhausted as error:
            self._full = error
        return self._full is None

    def _unsettled(self, requests: list[Request]) -> dict[str, Request]:
        """Those without an answer in the corpus, by key."""
        by_key = {request.request_key: request for request in requests}
        self._corpus.add_requests(requests)
        answered, dead = self._corpus.settled(list(by_key))
        self._engine.cached += len(answered)
        settled = answered if self._config.retry_dead_letters else answered | dead
        return {key: request for key, request in by_key.items() if key not in settled}


def _at(address: str, batches: list[Batch]) -> list[Batch]:
    """Those that this endpoint has, or shall have."""
    for batch in batches:
        if batch.address not in ("", address):
            say(f"batch {batch.batch_id}: {len(batch.keys)} questions are under way at {batch.address}, not here")
    return [batch for batch in batches if batch.address in ("", address)]


def _chunks(items: Iterable[Request], size: int) -> Iterator[list[Request]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
