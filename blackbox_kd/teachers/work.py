"""What the engine's workers share while they go through a stream of requests: a short queue, and when to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from blackbox_kd.errors import (
    RateLimited,
    RequestRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnreachable,
    TransientError,
)
from blackbox_kd.progress import say
from blackbox_kd.types import Completion, Request

OTHERS_S = 0.5
"""Between two looks whether another run is through with a question."""
SAY_OTHERS_S = 60.0
REJECTIONS_SHOWN = 3
FAILURES_TO_STOP = 8
"""Requests that fail one after the other, all retries spent, before the endpoint counts as gone."""


class Stopped(Exception):
    """Nothing more is sent: the work has ended."""


class Work:
    """The shared state of the workers on one stream of requests."""

    def __init__(
        self, workers: int, wake: Callable[[], None], description: str, total: int | None, *, drain_s: float
    ) -> None:
        """`wake` rouses those who wait for their turn, so that they see that the work has stopped.

        `total` questions, None where nobody has counted them. Answers in flight are waited for up to `drain_s`.
        """
        self.size, self._wake, self.description, self.total = workers, wake, description, total
        self.drain_s = drain_s
        self._todo: asyncio.Queue[Request | None] = asyncio.Queue(2 * workers)
        self._answers: asyncio.Queue[list[Completion] | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()
        self.open: set[str] = set()
        """request_keys that are looked up, in the queue and in flight."""
        self.aside = 0
        """Questions that another run on the corpus asks."""
        self.error: BaseException | None = None
        self.asked = self.answered = self.failed = self.rejected = self.skipped = 0
        self._chunks = 0
        self._in_a_row = 0
        self._say_others_at = 0.0
        self.last_failure = ""

    def start(self, produce: Coroutine[Any, Any, None], ask: Callable[[Request], Any]) -> None:
        """One producer, which `put`s, and workers that hand each request to `ask`."""
        producer = asyncio.create_task(self._produce(produce))
        self._tasks = [producer, *(asyncio.create_task(self._work(ask)) for _ in range(self.size))]
        self._closer = asyncio.create_task(self._close())

    async def _produce(self, produce: Coroutine[Any, Any, None]) -> None:
        try:
            await produce
            await self._todo.put(None)
        except Exception as error:
            self.stop(error)

    async def put(self, request: Request) -> None:
        """One more to ask, as soon as the queue has room."""
        self.asked += 1
        await self._todo.put(request)

    def looked_up(self, questions: int, answered: int, dead: int, todo: int, aside: int) -> None:
        """So many were looked up in the corpus; the first time, a person is told.

        Those set aside are looked up again when the other run is through with them.
        """
        self.skipped += questions - todo - aside
        self.aside = aside
        self._chunks += 1
        if self._chunks > 1:
            return
        gone = f", {aside} asked by another run just now" if aside else ""
        gone += f", {dead} in dead_letters (see teacher.retry_dead_letters)" if dead else ""
        if self.total is not None and self.total <= questions:
            say(f"{self.description}: {questions} questions, {answered} answered before, {todo} to ask{gone}")
        else:
            say(f"{self.description}: {self.total or 'a stream of'} questions, asking those not answered before{gone}")

    async def wait_for_others(self) -> None:
        """A moment; where nothing else is left to do, a person is told, now and then."""
        await asyncio.sleep(OTHERS_S)
        if not self.open and time.monotonic() > self._say_others_at:
            self._say_others_at = time.monotonic() + SAY_OTHERS_S
            say(f"{self.description}: {self.aside} questions are asked by another run on this corpus; "
                "waiting for its answers (Ctrl-C is safe)")  # fmt: skip

    @property
    def done(self) -> int:
        """Questions that are through, in whatever way."""
        return self.skipped + self.answered + self.failed + self.rejected

    def yield_known(self, completions: list[Completion]) -> None:
        """Answers that need not be asked for."""
        self._answers.put_nowait(completions)

    async def _work(self, ask: Callable[[Request], Any]) -> None:
        while (request := await self._todo.get()) is not None and not self.stopped:
            try:
                self._answers.put_nowait(await ask(request))
                self.answered += 1
                self._in_a_row = 0
            except RequestRejected as error:
                self._reject(error)
            except (TransientError, RateLimited) as error:
                self._fail(error)
            except Stopped:
                break
            except Exception as error:
                self.stop(error)
            finally:
                self.open.discard(request.request_key)
        with suppress(asyncio.QueueFull):
            self._todo.put_nowait(None)  # for the next worker

    async def _close(self) -> None:
        await asyncio.wait(self._tasks)
        self._answers.put_nowait(None)

    @property
    def stopped(self) -> bool:
        """Whether nothing more is admitted."""
        return self._ended.is_set()

    def is_stopped(self) -> bool:
        """`stopped`, to be handed on."""
        return self._ended.is_set()

    async def sleep(self, seconds: float) -> None:
        """Wait, unless the work ends meanwhile.

        Raises:
            Stopped: it has ended.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        if self.stopped:
            raise Stopped

    async def drain(self) -> None:
        """Admit nothing more and wait for what is in flight; not for ever, and not if told again to stop."""
        self._end()
        try:
            await asyncio.wait(self._tasks, timeout=self.drain_s)
        finally:
            late = [task for task in self._tasks if not task.done()]
            for task in late:
                task.cancel()
            if late:  # they still note that they were interrupted
                await asyncio.wait(late)
            self.open.clear()

    def _end(self) -> None:
        self._ended.set()
        self._tasks[0].cancel()  # the producer; what it has queued is not sent
        with suppress(asyncio.QueueEmpty):
            while True:
                self._todo.get_nowait()
        self._todo.put_nowait(None)
        self._wake()

    def _reject(self, error: TeacherError) -> None:
        """One request will never succeed; the first few are shown."""
        self.rejected += 1
        self.last_failure = str(error)
        if self.rejected <= REJECTIONS_SHOWN:
            say(f"dead letter: {error}")

    def _fail(self, error: TeacherError) -> None:
        """One request has failed, all its retries spent; it stays pending."""
        self.failed += 1
        self._in_a_row += 1
        self.last_failure = str(error)
        if self._in_a_row >= FAILURES_TO_STOP:
            self.stop(TeacherUnreachable(f"{self._in_a_row} requests in a row failed, the last with: {error}"))

    def stop(self, error: BaseException) -> None:
        """Admit nothing more; the first error is the one that counts."""
        self.error = self.error or error
        self._end()

    def conclude(self) -> None:
        """Raise what ended the work, or say what is left of it.

        Raises:
            TeacherRefused: every request was rejected; TeacherUnreachable: none got through.
        """
        if self.error:
            raise self.error
        if self.asked and self.rejected == self.asked:
            raise TeacherRefused(f"all {self.asked} requests were rejected, the last with: {self.last_failure}")
        if self.asked and self.failed == self.asked:
            raise TeacherUnreachable(f"none of {self.asked} requests got through: {self.last_failure}")
        if self.failed:
            say(f"{self.failed} of {self.asked} requests failed ({self.last_failure}); they stay pending, run again")

    async def results(self) -> AsyncIterator[list[Completion]]:
        """What arrives, until all workers are done."""
        while (completions := await self._answers.get()) is not None:
            yield completions
