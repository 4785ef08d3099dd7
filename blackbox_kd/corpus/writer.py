"""Journal first, then DuckDB: a thread that ingests in batches, so that neither the event loop nor a reader waits."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from blackbox_kd.corpus.journal import Answered, Record, Segment
from blackbox_kd.corpus.store import Corpus
from blackbox_kd.errors import CorpusBusy
from blackbox_kd.progress import say

BATCH_ROWS = 256
BATCH_S = 0.25


class Writer:
    """`submit` returns once the record is in the journal; leaving the block waits until it is in DuckDB."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._segment = Segment(corpus.journal)
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._waiting: list[Record] = []
        self._unstored: set[str] = set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="corpus-writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def submit(self, record: Record) -> None:
        """Keep a record. What the thread could not store is raised here, before more is paid for.

        Raises:
            CorpusError: the journal cannot be written.
        """
        self._segment.append(record)
        if self._error:
            raise self._error
        if isinstance(record, Answered):
            self._unstored.add(record.attempt.request_key)
        self._queue.put(record)

    def unstored(self) -> set[str]:
        """request_keys with an outcome that is in the journal, and not yet in DuckDB."""
        return set(self._unstored)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        ingested = False
        try:
            if not self._error:
                wait_s = self._corpus.lock_wait_s
                ingested = not self._waiting or self._corpus.try_ingest(self._waiting, wait_s=wait_s)
        finally:
            self._segment.close(ingested=ingested)
        if self._error and error is None:
            raise self._error
        if not ingested:  # going on would train on fewer rows than were paid for
            message = (
                f"{self._corpus.path} is held open by another program; {len(self._waiting)} records wait in "
                f"{self._segment.path}, the next stage ingests them"
            )
            if error is None:
                raise CorpusBusy(message)
            say(message)

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._collect()
            if not self._waiting:
                continue
            try:
                if self._corpus.try_ingest(self._waiting):
                    self._unstored -= {r.attempt.request_key for r in self._waiting if isinstance(r, Answered)}
                    self._waiting = []
            except BaseException as error:
                self._error = error
                return

    def _collect(self) -> bool:
        """Wait for a batch of new records or a pause between them; True at the end of the stream."""
        try:
            for _ in range(BATCH_ROWS):
                record = self._queue.get(timeout=BATCH_S)
                if record is None:
                    return True
                self._waiting.append(record)
        except queue.Empty:
            pass
        return False
