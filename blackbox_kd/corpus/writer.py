"""Journal first, then DuckDB: a thread that ingests in batches, so that neither the event loop nor a reader waits."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from blackbox_kd.corpus.claims import Claims
from blackbox_kd.corpus.connection import SAY_AGAIN_S, SAY_HELD_S
from blackbox_kd.corpus.journal import Answered, Record, Segment, Sent
from blackbox_kd.corpus.logprobs import Vocabs
from blackbox_kd.corpus.store import Corpus
from blackbox_kd.errors import CorpusBusy, CorpusError
from blackbox_kd.progress import say

BATCH_S, LONGEST_BATCH_S, FREE = 1.0, 3.0, 10
"""Between two ingests, FREE times as long as the last one took, within these bounds; in between, the file is free.
Opening and closing it takes as long as hundreds of rows."""
SEGMENT_BYTES = 1 << 26
"""A journal segment that has grown so large is followed by another, and deleted once all of it is in DuckDB."""
REFUSED_TO_STOP = 8
"""Records that DuckDB will not take; more of the kind would be paid for in vain."""


class Writer:
    """`submit` returns once the record is in the journal; leaving the block waits until it is in DuckDB."""

    def __init__(self, corpus: Corpus, claims: Claims | None = None, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """`claims` are let go of once the outcome is stored."""
        self._corpus, self._claims, self._segment_bytes = corpus, claims, segment_bytes
        self._segment = Segment(corpus.journal)
        self._full: list[tuple[Segment, int]] = []
        """Earlier segments, and how many of those that wait must be stored before each goes."""
        self._vocabs = Vocabs()
        self._waiting: list[Answered] = []
        self._in_flight: dict[str, Sent] = {}
        self._unstored: set[str] = set()
        self._say_at: float | None = None
        self._lock = threading.Lock()  # of the segment, and of what waits, is in flight or unstored
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._refused_before = corpus.refused
        self._thread = threading.Thread(target=self._run, name="corpus-writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def submit(self, record: Record) -> None:
        """Keep a record. What the thread could not store is raised here, before more is paid for.

        Raises:
            CorpusError: the journal cannot be written; an answer goes to DuckDB all the same.
        """
        with self._lock:
            try:
                self._segment.append(record)
            finally:
                self._note(record)
        self.check()

    def check(self) -> None:
        """Raise what the thread could not store."""
        if self._error:
            raise self._error

    def _note(self, record: Record) -> None:
        if isinstance(record, Sent):
            self._in_flight[record.attempt_id] = record
        else:
            self._in_flight.pop(record.attempt.attempt_id, None)
            self._unstored.add(record.attempt.request_key)
            self._waiting.append(record)

    def unstored(self) -> set[str]:
        """request_keys with an outcome that is in the journal, and not yet in DuckDB."""
        with self._lock:
            return set(self._unstored)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if not self._error:
                self._flush(wait_s=self._corpus.lock_wait_s)
        finally:
            for segment in (*(segment for segment, _ in self._full), self._segment):
                segment.close(ingested=not self._waiting)
        if self._error and error is None:
            raise self._error
        if self._waiting and not self._error:  # going on would train on fewer rows than were paid for
            message = (
                f"{self._corpus.busy}; {len(self._waiting)} records wait in {self._corpus.journal}, "
                "the next stage ingests them"
            )
            if error is None:
                raise CorpusBusy(message)
            say(message)

    def _run(self) -> None:
        try:
            pause_s = BATCH_S
            while not self._ended.wait(pause_s):
                began = time.monotonic()
                self._flush()
                self._rotate()
                if self._claims:
                    self._claims.free_settled(self.unstored)
                pause_s = min(max(BATCH_S, FREE * (time.monotonic() - began)), LONGEST_BATCH_S)
        except BaseException as error:
            self._error = error

    def _flush(self, *, wait_s: float = 0.0) -> None:
        with self._lock:
            batch = list(self._waiting)
        if not batch:
            return
        if not self._corpus.try_ingest(batch, vocabs=self._vocabs, wait_s=wait_s):
            self._say_held()
            return
        self._say_at = None
        with self._lock:
            del self._waiting[: len(batch)]
            self._unstored -= {r.attempt.request_key for r in batch}
            self._unstored |= {r.attempt.request_key for r in self._waiting}
        self._discard_full(len(batch))
        if (refused := self._corpus.refused - self._refused_before) >= REFUSED_TO_STOP:
            raise CorpusError(
                f"DuckDB has refused {refused} records; stopping before more is paid for, see `blackbox-kd doctor`"
            )

    def _say_held(self) -> None:
        now = time.monotonic()
        if self._say_at is None:
            self._say_at = now + SAY_HELD_S
        elif now > self._say_at:
            self._say_at = now + SAY_AGAIN_S
            say(f"{self._corpus.busy}; what is received waits in {self._corpus.journal}. Ctrl-C is safe")

    def _rotate(self) -> None:
        """Start a new segment, so that a long run does not keep all that it ever received twice."""
        if self._segment.size < self._segment_bytes:
            return
        with self._lock:
            full, self._segment = self._segment, Segment(self._corpus.journal)
            self._full.append((full, len(self._waiting)))
            for sent in self._in_flight.values():
                self._segment.append(sent)
        self._discard_full(0)

    def _discard_full(self, stored: int) -> None:
        """So many more of what waited are in DuckDB."""
        left = [(segment, waiting - stored) for segment, waiting in self._full]
        self._full = [(segment, waiting) for segment, waiting in left if waiting > 0]
        for segment, waiting in left:
            if waiting <= 0:
                segment.close(ingested=True)
