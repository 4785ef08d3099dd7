"""What the engine's workers share while they go through a list of requests: where they are, and when to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Any

from blackbox_kd.errors import TeacherError, TeacherUnreachable
from blackbox_kd.progress import say
from blackbox_kd.types import Completion, Request

DRAIN_S = 30.0
"""How long answers in flight are waited for after an interruption."""
REJECTIONS_SHOWN = 3
FAILURES_TO_STOP = 8
"""Requests that fail one after the other, all retries spent, before the endpoint counts as gone."""


class Stopped(Exception):
    """Nothing more is sent: the work has ended."""


class Work:
    """The shared state of the workers on one list of requests."""

    def __init__(self, todo: Sequence[Request]) -> None:
        self._todo = iter(todo)
        self.workers: list[asyncio.Task[None]] = []
        self.queue: asyncio.Queue[list[Completion]] = asyncio.Queue()
        self._ended = asyncio.Event()
        self.error: BaseException | None = None
        self.failed = 0
        self.rejected = 0
        self.in_a_row = 0
        self.last_failure = ""

    def __iter__(self) -> Iterator[Request]:
        while not self.stopped:
            try:
                yield next(self._todo)
            except StopIteration:
                return

    @property
    def stopped(self) -> bool:
        """Whether nothing more is admitted."""
        return self._ended.is_set()

    async def sleep(self, seconds: float) -> None:
        """Wait, unless the work ends meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        if self.stopped:
            raise Stopped

    async def drain(self) -> None:
        """Admit nothing more and wait for what is in flight; not for ever, and not if told again to stop."""
        self._ended.set()
        try:
            await asyncio.wait(self.workers, timeout=DRAIN_S)
        finally:
            late = [worker for worker in self.workers if not worker.done()]
            for worker in late:
                worker.cancel()
            if late:  # they still note that they were interrupted
                await asyncio.wait(late)

    def reject(self, error: TeacherError) -> None:
        """One request will never succeed; the first few are shown."""
        self.rejected += 1
        self.last_failure = str(error)
        if self.rejected <= REJECTIONS_SHOWN:
            say(f"dead letter: {error}")

    def fail(self, error: TeacherError) -> None:
        """One request has failed, all its retries spent; it stays pending."""
        self.failed += 1
        self.in_a_row += 1
        self.last_failure = str(error)
        if self.in_a_row >= FAILURES_TO_STOP:
            self.stop(TeacherUnreachable(f"{self.in_a_row} requests in a row failed, the last with: {error}"))

    def stop(self, error: BaseException) -> None:
        """Admit nothing more; the first error is the one that counts."""
        self._ended.set()
        self.error = self.error or error

    async def results(self) -> AsyncIterator[list[Completion]]:
        """What arrives, until all workers are done."""
        ended = asyncio.gather(*self.workers, return_exceptions=True)
        while not (ended.done() and self.queue.empty()):
            getter = asyncio.ensure_future(self.queue.get())
            try:
                waited: set[asyncio.Future[Any]] = {getter, ended}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not getter.done():
                    getter.cancel()
            if getter.done() and not getter.cancelled():
                yield getter.result()
