"""How far the asking is: a line for whoever watches, a heartbeat for `status`."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Self

from blackbox_kd.corpus.heartbeat import Heartbeat, write_heartbeat
from blackbox_kd.progress import Counter
from blackbox_kd.teachers.budget import Budget
from blackbox_kd.teachers.caller import Caller
from blackbox_kd.teachers.work import Work

PULSE_S = 0.5
"""Between two looks of a person at the live line."""
ERROR_CHARS = 60
"""Of the last error, in the live line."""


class Beat:
    """Writes a heartbeat now and then, and a last one at the end; use as an async context manager."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: None for no heartbeat, but whatever else there is to show."""
        self._folder = folder
        self._started_at = time.time()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        self._write(self.heartbeat(ended=True))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            self._write(self.heartbeat())

    def _write(self, heartbeat: Heartbeat) -> None:
        if self._folder:
            write_heartbeat(self._folder, heartbeat)

    def heartbeat(self, *, ended: bool = False) -> Heartbeat:
        """How it stands."""
        raise NotImplementedError


class Pulse(Beat):
    """Around the asking: also keeps the live line up to date."""

    def __init__(
        self, work: Work, caller: Caller, budget: Budget, progress: Counter, run_id: str, run_dir: Path | None,
        to: Path | None,
    ) -> None:  # fmt: skip
        """`to` is the folder of heartbeats, see `Beat`."""
        super().__init__(to)
        self._work, self._caller, self._budget, self._progress = work, caller, budget, progress
        self._run_id, self._run_dir = run_id, run_dir

    def _line(self) -> str:
        limiter = self._caller.limiter
        parts = [f"{limiter.in_flight}/{int(limiter.window)} in flight", f"{limiter.rate():.3g}/s"]
        if limiter.requests.rate:
            parts.append(f"paced at {limiter.requests.rate:.3g}/s")
        if limiter.limited_calls:
            parts.append(f"{limiter.limited_share:.0%} 429")
        if self._work.failed:
            parts.append(f"{self._work.failed} failed")
        if self._work.aside:
            parts.append(f"{self._work.aside} asked by another run")
        if line := self._budget.line():
            parts.append(line)
        if (left_s := self._left_s()) is not None:
            parts.append(f"{left_s // 60:.0f}:{left_s % 60:02.0f} left")
        if self._caller.last_error:
            parts.append(f"last error: {self._caller.last_error[:ERROR_CHARS]}")
        return ", ".join(parts)

    def _left_s(self) -> float | None:
        rate = self._caller.limiter.rate()
        return (self._work.total - self._work.done) / rate if rate and self._work.total is not None else None

    def heartbeat(self, *, ended: bool = False) -> Heartbeat:
        """Of the calls."""
        limiter, work, budget = self._caller.limiter, self._work, self._budget
        if not ended:
            self._progress.at(work.done, self._line())
        return Heartbeat(
            run_id=self._run_id,
            run_dir=str(self._run_dir or ""),
            pid=os.getpid(),
            description=work.description,
            total=work.total,
            done=work.answered,
            cached=work.skipped,
            in_flight=limiter.in_flight,
            window=limiter.window,
            rate_per_s=limiter.rate() or None,
            limited_share=limiter.limited_share,
            failed=work.failed + work.rejected,
            spent_usd=budget.spent.usd if budget.price else None,
            spent_tokens=budget.spent.tokens,
            spent_requests=budget.spent.requests,
            reserved_usd=budget.reserved.usd if budget.price else None,
            cap=budget.caps.model_dump() if budget.caps.any else None,
            eta_s=self._left_s(),
            last_error=self._caller.last_error or None,
            started_at=self._started_at,
            updated_at=time.time(),
            state="ended" if ended else "draining" if work.stopped else "running",
        )
