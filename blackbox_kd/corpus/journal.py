"""Received answers, on disk before anything else happens to them.

A journal is a folder of segments, each written by one process. A record is a length, a CRC and msgpack;
a segment that ends in a torn record (kill, full disk) is read up to the tear. A segment that a living process
holds is left alone.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from blackbox_kd.corpus.connection import still_wanted
from blackbox_kd.errors import CorpusBusy, CorpusError
from blackbox_kd.progress import say
from blackbox_kd.types import Attempt, Completion, Scores

_FRAME = struct.Struct("<II")
REFUSED = "refused.records"
"""In the journal's folder and of its form: what DuckDB would not take."""
SAY_ALONE_S = 2.0
"""A wait that a person should know of."""


class Sent(msgspec.Struct, frozen=True, kw_only=True, tag="sent"):
    """A call is about to leave. If nothing else is known of it, it was in flight at a kill."""

    attempt_id: str
    request_key: str
    run_id: str
    attempted_at: float


class Answered(msgspec.Struct, frozen=True, kw_only=True, tag="answered"):
    """A call came back, with answers or with an error."""

    attempt: Attempt
    completions: list[Completion] = []
    scorer: str = ""
    """Whose logprobs the completions carry."""
    scores: Scores | None = None
    """By the same scorer, of a completion that is there already."""
    dead_letter: bool = False
    """Whether the request will not be asked again."""


Record = Sent | Answered

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


class Segment:
    """This process's part of the journal, locked while it is open."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        CorpusError: no file can be made there.
        """
        self.path = folder / f"{time.time_ns()}-{os.getpid()}.journal"
        self.size = 0
        """Bytes."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = self._create()
        except OSError as error:
            raise CorpusError(f"cannot make the journal {self.path}: {error.strerror}") from error

    def _create(self) -> int:
        unlocked = self.path.with_suffix(".new")  # nobody may take it for a leftover before it is locked
        fd = os.open(unlocked, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        unlocked.rename(self.path)
        return fd

    def append(self, record: Record) -> None:
        """Hand the record to the operating system in one write: it survives a kill of this process.

        Raises:
            CorpusError: the disk is full or the file cannot be written.
        """
        self.size += _append(self._fd, self.path, record)

    def close(self, *, ingested: bool) -> None:
        """Let go of the segment; an ingested one is deleted, another waits for the next start."""
        if ingested:
            self.path.unlink()
        os.close(self._fd)


def read_segment(path: Path) -> list[Record]:
    """All whole records of a segment: one whose bytes have changed is skipped, a torn one is the end.

    Raises:
        CorpusError: a record that this version does not know.
    """
    try:
        return [_decoder.decode(payload) for payload in _payloads(path.read_bytes()) if payload is not None]
    except msgspec.DecodeError as error:
        raise CorpusError(f"{path} was written by another version of blackbox_kd ({error}); ingest it there") from error


def damaged(path: Path) -> int:
    """Records of a segment that cannot be read; a torn end counts as one."""
    return sum(payload is None for payload in _payloads(path.read_bytes()))


def _payloads(data: bytes) -> Iterator[bytes | None]:
    """The bytes of each record; None for one that has changed, and for an end that is none."""
    offset = 0
    while offset < len(data):
        length, crc = _FRAME.unpack_from(data, offset) if offset + _FRAME.size <= len(data) else (0, 0)
        payload = data[offset + _FRAME.size : offset + _FRAME.size + length]
        if len(payload) != length or length == 0:  # torn, or the zeros that a power failure leaves
            yield None
            return
        yield payload if zlib.crc32(payload) == crc else None
        offset += _FRAME.size + length


def leftovers(folder: Path) -> Iterator[tuple[Path, list[Record]]]:
    """Segments whose process is gone, locked while they are looked at, newest first: (path, records).

    A call that was in flight when its process began a new segment is in both: the newer one knows what became of it.
    """
    if not any(folder.glob("*.journal")):
        return
    with alone(folder):
        for path in sorted(folder.glob("*.journal"), reverse=True):
            with suppress(FileNotFoundError), path.open("rb") as file:  # a writer that ends deletes its own
                if _locked(file.fileno()) and path.exists():
                    yield path, read_segment(path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else looks for leftovers meanwhile: what was left is then in DuckDB, and not in somebody's hands.

    Raises:
        CorpusBusy: the wait for somebody else has lost its purpose, see `still_wanted`.
    """
    fd, began, said = os.open(folder, os.O_RDONLY), time.monotonic(), False
    try:
        while not _locked(fd):
            if (wanted := still_wanted.get()) and not wanted():
                raise CorpusBusy(f"{folder} is in use by another process")
            if not said and time.monotonic() - began > SAY_ALONE_S:
                said = True
                say(f"another process ingests what an earlier run left in {folder}; waiting for it")
            time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def put_aside(folder: Path, records: Sequence[Record]) -> Path:
    """Keep records that DuckDB refuses, each once, in a file of their own; returns it.

    Raises:
        CorpusError: the disk is full or the file cannot be written.
    """
    path = folder / REFUSED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise CorpusError(f"cannot make {path}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = read_segment(path)
        for record in records:
            if record not in known:
                _append(file.fileno(), path, record)
    return path


def _append(fd: int, path: Path, record: Record) -> int:
    """In one write; returns the bytes."""
    payload = _encoder.encode(record)
    frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
    try:
        written = os.write(fd, frame)
    except OSError as error:
        raise CorpusError(f"cannot write the journal {path}: {error.strerror}") from error
    if written != len(frame):  # cut the torn record off: what is appended later must stay readable
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise CorpusError(f"cannot write the journal {path}: the disk is full")
    return written


def _locked(fd: int) -> bool:
    """Whether nobody else has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
