"""What a run was billed: by stage, over time, and for each row that came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from blackbox_kd.corpus.run_rows import BUCKETS, Row
from blackbox_kd.report.charts import Chart, Series, chart, stacked
from blackbox_kd.report.words import duration

STAGE_OF = {
    "sample": "sample", "best_of_n": "curate", "evaluate": "evaluate", "win_rate": "win_rate", "probe": "probe",
}  # fmt: skip
"""Purpose of a call -> stage, as `plan` has them; all others belong to the on-policy rounds."""
STAGES = ("probe", "sample", "curate", "evaluate", "win_rate", "onpolicy")
"""As they lie on each other in a chart."""
ROWS_ARE = {
    "sample": "whole answers to train prompts",
    "onpolicy": "what was said of the student's texts",
    "evaluate": "whole answers that checkpoints are measured with, never learnt from",
}
TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True, kw_only=True)
class Spent:
    """A stage's calls to endpoints, as billed to this run."""

    stage: str
    purposes: str
    calls: int
    lost: int
    """In flight when the process or the connection died: nobody knows whether they were billed."""
    rate_limited: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    """None where a price is not known."""
    rows: int
    """What came of it, see ROWS_ARE."""

    @property
    def tokens(self) -> int:
        """Billed, of both kinds."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def tokens_per_row(self) -> float | None:
        """None where no row came of it."""
        return self.tokens / self.rows if self.rows else None

    @property
    def usd_per_row(self) -> float | None:
        """None where no row came of it, or a price is not known."""
        return self.cost_usd / self.rows if self.rows and self.cost_usd is not None else None


def stage_of(purpose: str) -> str:
    """The stage that asks so."""
    return STAGE_OF.get(purpose, "onpolicy")


def by_stage(spend: Sequence[Row], answers: Sequence[Row], feedback: Sequence[Row]) -> list[Spent]:
    """In the order of their first call. Rows that another run paid for are not counted."""
    rows = {row["purpose"]: row["own_rows"] for row in answers}
    rows["onpolicy"] = sum(row["said"] for row in feedback)
    return [
        _sum(stage, [row for row in spend if stage_of(row["purpose"]) == stage], rows.get(stage, 0))
        for stage in dict.fromkeys(stage_of(row["purpose"]) for row in spend)
    ]


def total(stages: Sequence[Spent]) -> Spent:
    """All stages together; its rows are those that were learnt from."""
    costs = [each.cost_usd for each in stages]
    return Spent(
        stage="in all",
        purposes="",
        calls=sum(each.calls for each in stages),
        lost=sum(each.lost for each in stages),
        rate_limited=sum(each.rate_limited for each in stages),
        prompt_tokens=sum(each.prompt_tokens for each in stages),
        completion_tokens=sum(each.completion_tokens for each in stages),
        cost_usd=None if None in costs else sum(cost for cost in costs if cost is not None),
        rows=sum(each.rows for each in stages if each.stage in ("sample", "onpolicy")),
    )


def _sum(stage: str, rows: Sequence[Row], useful: int) -> Spent:
    return Spent(
        stage=stage,
        purposes=", ".join(sorted({row["purpose"] for row in rows} - {stage})),
        calls=sum(row["calls"] for row in rows),
        lost=sum(row["lost"] for row in rows),
        rate_limited=sum(row["rate_limited"] for row in rows),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows),
        completion_tokens=sum(row["completion_tokens"] for row in rows),
        cost_usd=None if any(row["unpriced"] for row in rows) else sum(row["cost_usd"] or 0.0 for row in rows),
        rows=useful,
    )


def over_time(timeline: Sequence[Row], *, priced: bool) -> list[Chart]:
    """Tokens, and dollars where calls cost some, added up from the first call on."""
    if len({row["at_s"] for row in timeline}) < 2:
        return []
    end = max(row["at_s"] for row in timeline)
    size, unit = next((size, unit) for size, unit in TIME_UNITS if end >= 2 * size or size == 1.0)
    note = f"Added up over {duration(end)} from the first call, in {unit}, by stage."
    kinds = [("tokens billed", "tokens")] + ([("dollars billed", "cost_usd")] if priced else [])
    drawn = [chart(title, _areas(timeline, column, end, size), note=note) for title, column in kinds]
    return [each for each in drawn if each]


def _areas(timeline: Sequence[Row], column: str, end: float, size: float) -> list[Series]:
    """`size`: seconds in a unit of x. Between two buckets with calls nothing was billed, and the areas stay level."""
    busy = {row["at_s"] for row in timeline}
    moments = sorted(busy | {max(0.0, round(at - end / BUCKETS, 6)) for at in busy} | {0.0})
    found = []
    for stage in sorted({stage_of(row["purpose"]) for row in timeline}, key=STAGES.index):
        billed = dict.fromkeys(moments, 0.0)
        for row in timeline:
            if stage_of(row["purpose"]) == stage:
                billed[row["at_s"]] += row[column] or 0.0
        found.append((stage, list(accumulate(billed.values()))))
    return stacked(found, [at / size for at in moments])
