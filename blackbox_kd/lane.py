"""One thread for everything that torch computes, so that the event loop goes on asking the teacher meanwhile.

One after the other: random draws keep their order, and two jobs never share a device.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")


class Lane:
    """Its thread is a daemon: Ctrl-C does not wait for the end of a generation."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lane", daemon=True)
        self._thread.start()

    async def run(self, job: Callable[..., T], *args: Any) -> T:
        """`job(*args)`, when those before it are through; what it raises is raised here."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = copy_context()

        def work() -> None:
            settle: tuple[Callable[..., None], Any]
            try:
                settle = future.set_result, context.run(job, *args)
            except BaseException as error:
                settle = future.set_exception, error
            with suppress(RuntimeError):  # nobody waits any more: the loop is closed
                loop.call_soon_threadsafe(lambda: None if future.cancelled() else settle[0](settle[1]))

        self._jobs.put(work)
        return await future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def close(self) -> None:
        """The end of the thread, which is not to meet that of the interpreter; waits for the jobs before."""
        self._jobs.put(None)
        self._thread.join()
