"""The heartbeat of a run that waits for batches."""

from __future__ import annotations

import os
import time

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.heartbeat import Heartbeat
from blackbox_kd.teachers.batch.tally import Tally
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.teachers.live import Beat


class BatchPulse(Beat):
    """Around submitting and collecting; `done` are those that the provider has answered or rejected."""

    def __init__(self, tally: Tally, engine: Engine, corpus: Corpus, run_id: str, description: str, total: int) -> None:
        super().__init__(corpus.journal)
        self._tally, self._engine, self._run_id = tally, engine, run_id
        self._description, self._total = description, total

    def heartbeat(self, *, ended: bool = False) -> Heartbeat:
        """Of the batches, as of the last look at them."""
        tally, budget, now = self._tally, self._engine.budget, time.time()
        spent = budget.spent + tally.spent
        return Heartbeat(
            run_id=self._run_id,
            run_dir=str(self._engine.run_dir or ""),
            pid=os.getpid(),
            description=f"{self._description} {tally.states}".rstrip(),
            total=self._total,
            done=tally.done,
            cached=self._engine.cached,
            in_flight=0 if ended else self._total - tally.done,
            failed=tally.rejected,
            spent_usd=spent.usd if budget.price else None,
            spent_tokens=spent.tokens,
            spent_requests=spent.requests,
            reserved_usd=budget.under_way.usd if budget.price else None,
            cap=budget.caps.model_dump() if budget.caps.any else None,
            last_error=tally.last_failure or None,
            started_at=self._started_at,
            updated_at=now,
            state="ended" if ended else "running",
        )
