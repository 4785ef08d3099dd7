"""From a batch at the provider to rows: wait, download, decode. What was paid for is kept, however a batch ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import openai.types

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Answered
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
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.teachers.batch.ledger import Batch, Ledger
from blackbox_kd.teachers.batch.lines import answered, read_lines
from blackbox_kd.teachers.batch.submit import retrying
from blackbox_kd.teachers.batch.tally import Tally
from blackbox_kd.teachers.prices import price_of
from blackbox_kd.teachers.sdk import SdkTransport
from blackbox_kd.teachers.wire import Decoder
from blackbox_kd.types import Completion, Request

State = openai.types.Batch

ENDED = ("completed", "failed", "expired", "cancelled")
SILENCE_S = 3600.0
"""Without any word of a batch."""
INGEST_CHUNK = 256
"""Lines; with 20 logprobs a token, one is half a megabyte."""


class Collector:
    """Looks now and then, and ingests what has ended."""

    def __init__(
        self, sdk: SdkTransport, corpus: Corpus, ledger: Ledger, tally: Tally, config: TeacherConfig, poll_s: float
    ) -> None:
        self._sdk, self._corpus, self._ledger, self._price = sdk, corpus, ledger, price_of(config)
        self._decoder = Decoder()
        self._retrying = retrying(config.max_retries)
        self._poll_s = poll_s
        self._tally = tally
        self._heard = time.monotonic()  # the provider's last word

    async def collect(self, waiting: list[Batch], description: str) -> AsyncGenerator[Completion, None]:
        """Each answer of these batches that is not in the corpus yet.

        Raises:
            TeacherError: see `Batches.complete`.
        """
        waiting, ended = list(waiting), 0
        with counting(description, sum(len(b.keys) for b in waiting)) as progress, _parting_words(waiting):
            while waiting:
                looked = [(batch, await self._look(batch)) for batch in waiting]
                tally = self._tally
                tally.done = max(tally.done, ended + sum(_done(state) for _, state in looked))
                tally.states = _note(looked)
                progress.at(tally.done, tally.states)
                for batch, state in looked:
                    if state is not None and state.status in ENDED:
                        async for completion in self._ingest(batch, state):
                            yield completion
                        waiting.remove(batch)
                        ended += len(batch.keys)
                if waiting:
                    await asyncio.sleep(self._poll_s)
        self._tally.conclude()

    async def _look(self, batch: Batch) -> State | None:
        """How a batch is doing; None where the endpoint cannot be asked just now."""
        assert batch.batch_id is not None
        try:
            state = await self._sdk.call(self._sdk.client.batches.retrieve(batch.batch_id))
        except RequestRejected as error:
            raise self._gone(batch, error) from error
        except (TransientError, RateLimited) as error:
            if time.monotonic() - self._heard > SILENCE_S:
                raise TeacherUnreachable(f"no word of {batch.batch_id} for an hour ({error}); run again") from error
            say(f"batch {batch.batch_id}: {error}; looking again in {self._poll_s:.0f} s")
            return None
        self._heard = time.monotonic()
        return state

    async def _ingest(self, batch: Batch, state: State) -> AsyncGenerator[Completion, None]:
        """All that it brought; then the ledger forgets it."""
        async with self._ledger.locked():
            if not self._ledger.has(batch):
                return  # another run was faster: the answers are in the corpus
            await self._retrying(self._download, batch, state)
            before = self._tally.answered, self._tally.rejected
            records = self._records(batch, self._corpus.requests(batch.keys))
            while chunk := list(islice(records, INGEST_CHUNK)):
                with Writer(self._corpus) as writer:
                    for record in chunk:
                        writer.submit(record)
                for record in chunk:
                    for completion in record.completions:
                        yield completion
                await asyncio.sleep(0)  # for the heart to beat
            self._ledger.forget(batch)
            self._tally.end(batch, state, before)

    async def _download(self, batch: Batch, state: State) -> None:
        """Output and error file; a batch may have both, one or none."""
        files = (state.output_file_id, state.error_file_id)
        for file_id, path in zip(files, self._ledger.downloads(batch), strict=True):
            try:
                if file_id and not path.exists():
                    await self._sdk.download(file_id, path)
            except RequestRejected as error:
                raise self._gone(batch, error) from error

    def _gone(self, batch: Batch, error: TeacherError) -> TeacherRefused:
        return TeacherRefused(
            f"batch {batch.batch_id}: {error}; if it is lost for good, delete {self._ledger.path(batch)}, "
            f"and its {len(batch.keys)} questions are asked again"
        )

    def _records(self, batch: Batch, requests: dict[str, Request]) -> Iterator[Answered]:
        """A journal record for each question's first line; the output file comes first."""
        seen: set[str] = set()
        for path in filter(Path.exists, self._ledger.downloads(batch)):
            for line in read_lines(path, self._sdk.mask):
                if isinstance(line, str):
                    self._tally.surprise(batch, f"a line that cannot be read: {line}")
                elif line.custom_id not in requests:
                    self._tally.surprise(batch, f"an answer to {line.custom_id[:40]!r}, which was not asked")
                elif line.custom_id in seen:
                    self._tally.surprise(batch, f"a second answer to {line.custom_id}")
                else:
                    seen.add(line.custom_id)
                    request = requests[line.custom_id]
                    record = answered(line, request, batch, self._price, self._decoder)
                    self._tally.count(record, request, self._decoder.odd)
                    yield record


def _done(state: State | None) -> int:
    counts = state.request_counts if state else None
    return counts.completed + counts.failed if counts else 0


def _note(looked: Iterable[tuple[Batch, State | None]]) -> str:
    said = (f"{batch.batch_id} {state.status if state else 'not heard of'}" for batch, state in looked)
    return f"({', '.join(said)})"


@contextmanager
def _parting_words(waiting: list[Batch]) -> Iterator[None]:
    try:
        yield
    except (asyncio.CancelledError, KeyboardInterrupt):
        names = ", ".join(str(batch.batch_id) for batch in waiting)
        say(f"{names} goes on at the provider; the same command picks it up")
        raise
