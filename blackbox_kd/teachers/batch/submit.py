"""From questions to a batch at the provider, once: each step is in the ledger before the next one is taken."""

from __future__ import annotations

import time
import uuid

import openai
import openai.types
import tenacity

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import RateLimited, RequestRejected, TeacherRefused, TeacherUnreachable, TransientError
from blackbox_kd.progress import say
from blackbox_kd.teachers.batch.ledger import Batch, Ledger
from blackbox_kd.teachers.batch.lines import ENDPOINT, question_line
from blackbox_kd.teachers.sdk import SdkTransport
from blackbox_kd.types import Request

MAX_BYTES = 200_000_000
"""Of an uploaded file."""
MARKER = "blackbox_kd"
"""Our key in a batch's metadata."""


class Packer:
    """Fills batches up to the provider's limits."""

    def __init__(self, run_id: str, max_requests: int, max_bytes: int = MAX_BYTES) -> None:
        self._run_id, self._max_requests, self._max_bytes = run_id, max_requests, max_bytes
        self._bytes = 0
        self.batches: list[Batch] = []

    def add(self, request: Request) -> Batch:
        """The batch that the request is in."""
        size = len(question_line(request))
        full = not self.batches or len(self.batches[-1].keys) >= self._max_requests
        if full or self._bytes + size > self._max_bytes:
            self.batches.append(Batch(marker=str(uuid.uuid4()), run_id=self._run_id, keys=[], created_at=time.time()))
            self._bytes = 0
        self.batches[-1].keys.append(request.request_key)
        self._bytes += size
        return self.batches[-1]


class Submitter:
    """Works under the ledger's lock: a batch without an id was left there by a process that is gone."""

    def __init__(self, sdk: SdkTransport, corpus: Corpus, ledger: Ledger, max_retries: int) -> None:
        self._sdk, self._corpus, self._ledger = sdk, corpus, ledger
        self._retrying = retrying(max_retries)

    async def submit(self, batch: Batch) -> None:
        """Make sure that the provider has it.

        Raises:
            TeacherRefused: it does not want it; TeacherError: it cannot be asked, and the next start goes on.
        """
        if batch.batch_id is not None:
            return
        try:
            batch.batch_id = await self._retrying(self._submit, batch)
        except (RequestRejected, TeacherRefused) as error:  # nothing was made
            self._ledger.forget(batch)
            raise TeacherRefused(f"no batch was made, {error} (sample.batch needs a Batch API)") from error
        self._ledger.save(batch)
        say(f"batch {batch.batch_id}: {len(batch.keys)} questions; a stopped run picks it up again")

    async def _submit(self, batch: Batch) -> str:
        """Its id. From where an earlier try or process stopped: it may have been made without our learning that."""
        found = await self._look_up(batch) if batch.file_id is not None and self._ledger.has(batch) else None
        batch.address = str(self._sdk.client.base_url)
        self._ledger.save(batch)
        if found is None and batch.file_id is None:
            batch.file_id = await self._upload(batch)
            self._ledger.save(batch)
        return (found or await self._create(batch)).id

    async def _look_up(self, batch: Batch) -> openai.types.Batch | None:
        """Raises:
        TeacherUnreachable: the look-up is refused, which does not say that nothing was made.
        """
        try:
            return await self._sdk.call(self._find(batch))
        except (RequestRejected, TeacherRefused) as error:
            raise TeacherUnreachable(
                f"cannot tell whether batch {batch.marker} was made: {error}; run again"
            ) from error

    async def _find(self, batch: Batch) -> openai.types.Batch | None:
        async for found in self._sdk.client.batches.list(limit=100):
            if (found.metadata or {}).get(MARKER) == batch.marker:
                return found
        return None

    async def _upload(self, batch: Batch) -> str:
        requests = self._corpus.requests(batch.keys)
        data = b"".join(question_line(requests[key]) for key in batch.keys)
        file = (f"{batch.marker}.jsonl", data, "application/jsonl")
        return (await self._sdk.call(self._sdk.client.files.create(file=file, purpose="batch"))).id

    async def _create(self, batch: Batch) -> openai.types.Batch:
        assert batch.file_id is not None
        creating = self._sdk.client.batches.create(
            input_file_id=batch.file_id,
            endpoint=ENDPOINT,
            completion_window="24h",
            metadata={MARKER: batch.marker},
        )
        return await self._sdk.call(creating)


def retrying(max_retries: int) -> tenacity.AsyncRetrying:
    """Asks again after a passing failure."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((TransientError, RateLimited)),
        stop=tenacity.stop_after_attempt(max_retries + 1),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=20),
        reraise=True,
    )
