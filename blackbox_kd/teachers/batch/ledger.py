"""Batches that are under way, one small JSON file each in a folder beside the corpus.

A file is there before anything of its batch is sent and goes when the batch's last answer is in the corpus: whoever
shares the corpus knows what is asked already, and no kill leaves a batch that nobody remembers.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import msgspec
import tenacity

from blackbox_kd.errors import CorpusError
from blackbox_kd.progress import say
from blackbox_kd.run_dir import write_atomically


class Batch(msgspec.Struct, kw_only=True):
    """Questions that were, or are about to be, sent together."""

    marker: str
    """Ours; in the metadata that the provider keeps, so that a batch is found whose id was never noted."""
    run_id: str
    """The run that pays for it."""
    address: str = ""
    """The endpoint that has it."""
    keys: list[str]
    """request_keys."""
    created_at: float
    """Seconds since the epoch, before it is sent."""
    file_id: str | None = None
    """The uploaded questions; None before that is known."""
    batch_id: str | None = None
    """The provider's; None before that is known."""


class Ledger:
    """The folder."""

    def __init__(self, corpus: Path) -> None:
        self.folder = corpus.with_name(corpus.name + ".batches")

    def batches(self) -> list[Batch]:
        """What is under way, oldest first."""
        found = [batch for path in self.folder.glob("*.json") if (batch := _read(path))]
        return sorted(found, key=lambda batch: batch.created_at)

    def path(self, batch: Batch) -> Path:
        """Its file."""
        return self.folder / f"{batch.marker}.json"

    def has(self, batch: Batch) -> bool:
        """Whether it is under way; another run may have collected it."""
        return self.path(batch).exists()

    def downloads(self, batch: Batch) -> tuple[Path, Path]:
        """Where its answers and its errors are kept while they are read."""
        return self.folder / f"{batch.marker}.output.jsonl", self.folder / f"{batch.marker}.errors.jsonl"

    def save(self, batch: Batch) -> None:
        """Write it down; a kill leaves the old state or the new one."""
        try:
            write_atomically(self.path(batch), msgspec.json.encode(batch).decode())
        except OSError as error:
            raise CorpusError(f"cannot write {self.path(batch)}: {error.strerror}") from error

    def forget(self, batch: Batch) -> None:
        """All that came of it is in the corpus, or nothing ever will."""
        for path in (self.path(batch), *self.downloads(batch)):
            path.unlink(missing_ok=True)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """One process at a time submits or collects."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            if not _lock(file):
                say(f"another run submits or collects a batch ({self.folder}); waiting for it")
                await _lock_patiently(file)
            yield


def _read(path: Path) -> Batch | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Batch)
    except FileNotFoundError:  # another run has just read its last answer
        return None
    except msgspec.DecodeError as error:
        raise CorpusError(f"{path} is no record of a batch ({error})") from error


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _lock_patiently(file: IO[str]) -> None:
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_result(lambda held: not held), wait=tenacity.wait_random(0.1, 0.3)
    )
    await retrying(asyncio.to_thread, _lock, file)
