"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere. stdout is for results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False, soft_wrap=True)

PLAIN_INTERVAL_S = 15.0


def say(message: str) -> None:
    """One line to the person who watches."""
    console.print(message, markup=False)


class Counter:
    """Counts what is done."""

    def __init__(self, description: str, total: int | None, bar: Progress | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._bar = bar
        self._task = bar.add_task(description, total=total) if bar else None
        self._last = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many more are done; `note` stands behind the count."""
        self.done += steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=steps, description=f"{self.description} {note}".rstrip())
        elif time.monotonic() - self._last > PLAIN_INTERVAL_S and self.done != self.total:
            self._last = time.monotonic()
            say(f"  {self.description}: {self.done} of {self.total or '?'} {note}".rstrip())

    def at(self, done: int, note: str = "") -> None:
        """So many are done by now."""
        self.advance(done - self.done, note)


@contextmanager
def counting(description: str, total: int | None) -> Iterator[Counter]:
    """A progress bar on a terminal, a line every 15 seconds elsewhere; nothing for an empty job.

    `total` is None where nobody has counted.
    """
    if not console.is_terminal or total == 0:
        yield Counter(description, total, None)
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Counter(description, total, bar)


@contextmanager
def busy(description: str) -> Iterator[None]:
    """Something that cannot be counted goes on: on a terminal with the time that it takes, elsewhere silently."""
    if not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        shown.add_task(description, total=None)
        yield
