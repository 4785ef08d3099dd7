"""Metric rows as tables and lines: by checkpoint, by round, by optimiser step. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from blackbox_kd.report.charts import Chart, Point, Series, chart
from blackbox_kd.report.words import GLOSSARY, HEALTH, Measured, better, interval, meaning, number
from blackbox_kd.run_dir import round_of

Row = dict[str, Any]
SPLITS = {"heldout": "held-out", "ood": "out of domain", "holdback": "hold-back"}
COMPARED = ("heldout", "ood")
"""Where the other text is the teacher's; on hold-back prompts it is the base model's own, and no way is better."""
BY_STEP = ("tail_kl", "teacher_nll")


class Cell(NamedTuple):
    """A number as it is shown."""

    value: str
    interval: str = ""
    is_best: bool = False


class Table(NamedTuple):
    """Columns with what they mean; rows with a name each."""

    name: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, str, list[Cell]]]
    """Name, its meaning, cells."""


def in_order(checkpoints: Iterable[str]) -> list[str]:
    """As they were trained; the teacher's own numbers come last."""
    return sorted(set(checkpoints), key=lambda name: (name == "teacher", 0 if name == "teacher" else round_of(name)))


def of_checkpoints(metrics: Sequence[Row], there: Sequence[str], rounds: int) -> list[Row]:
    """What was measured of base, teacher and the committed checkpoints, and the training of them and of those to come.

    `there`: committed ones. The numbers of a checkpoint that was deleted say nothing of the run as it is.
    """
    evaluated = {"base", "teacher", *there}
    trained = {"", "sft", *there, *(f"round-{n}" for n in range(1, rounds + 1))}
    return [row for row in metrics if row["checkpoint"] in (evaluated if row["stage"] == "evaluate" else trained)]


def latest_set(metrics: Sequence[Row]) -> str | None:
    """The set_id that `evaluate`, else a look in between, measured last; rows of others do not compare."""
    measured = [row for row in metrics if row["set_id"]]
    measured = [row for row in measured if row["stage"] == "evaluate"] or measured
    return max(measured, key=lambda row: (row["at_s"], row["set_id"]))["set_id"] if measured else None


def measured(metrics: Sequence[Row], split: str, name: str) -> Measured:
    """checkpoint -> its number, in the order of training."""
    found = {row["checkpoint"]: row for row in metrics if row["split"] == split and row["name"] == name}
    return {checkpoint: found[checkpoint] for checkpoint in in_order(found)}


def by_checkpoint(metrics: Sequence[Row], split: str, names: Sequence[str]) -> Table | None:
    """Rows of one fixed set and split: a line for each checkpoint, the best of each column marked."""
    found = {name: numbers for name in names if (numbers := measured(metrics, split, name))}
    checkpoints = in_order(c for numbers in found.values() for c in numbers)
    best = {name: _best(name, numbers) if split in COMPARED or name.startswith("task_") else set()
            for name, numbers in found.items()}  # fmt: skip
    rows = [
        (c, "", [_cell(numbers.get(c), is_best=c in best[name]) for name, numbers in found.items()])
        for c in checkpoints
    ]
    return Table(SPLITS.get(split, split), [(name, meaning(name)) for name in found], rows) if found else None


def _best(name: str, numbers: Measured) -> set[str]:
    """Checkpoints with the best value; none where all are equal, or no way is better."""
    values = {c: row["value"] for c, row in numbers.items() if c != "teacher"}
    if not better(name) or len(set(values.values())) < 2:
        return set()
    best = (min if better(name) == "lower" else max)(values.values())
    return {c for c, value in values.items() if value == best}


def _cell(row: Any, *, is_best: bool = False) -> Cell:
    return Cell(number(row["value"]), interval(row), is_best) if row else Cell(number(None))


def known_first(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Names in the given order, then the others by name."""
    place = {name: i for i, name in enumerate(order)}
    return sorted(set(names), key=lambda name: (place.get(name, len(place)), name))


def names_of(metrics: Sequence[Row], split: str) -> tuple[list[str], list[str]]:
    """Metrics of a split: those that a person looks at, and the rest (about the yardstick, and by decile)."""
    names = known_first((row["name"] for row in metrics if row["split"] == split), GLOSSARY)
    rest = [n for n in names if n.startswith("tail_kl_decile") or n in ("coverage", "captured_mass", "ambiguous_mass")]
    return [n for n in names if n not in rest and not n.startswith("task_")], rest


def tasks(metrics: Sequence[Row]) -> list[str]:
    """What must not be forgotten, each with its drop."""
    names = sorted({row["name"] for row in metrics if row["name"].startswith("task_")})
    return sorted(names, key=lambda name: (name.removesuffix("_drop"), name))


def by_round(metrics: Sequence[Row], more: Sequence[Row]) -> Table | None:
    """Numbers that a round has once, a column for each round; `more`: rows counted elsewhere, like `metrics`."""
    rows = [r for r in metrics if r["stage"] == "onpolicy" and r["step"] == 0 and not r["set_id"] and r["round"] > 0]
    found = {(row["name"], row["round"]): row["value"] for row in [*rows, *more]}
    rounds = sorted({round_ for _, round_ in found})
    names = known_first((name for name, _ in found), HEALTH)
    if not names:
        return None
    shown = [(name, HEALTH.get(name, ""), [Cell(number(found.get((name, r)))) for r in rounds]) for name in names]
    return Table("by round", [(f"round {r}", "") for r in rounds], shown)


def stages(metrics: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Trained checkpoint -> its first optimiser step less one, counted through the run, and its last."""
    lengths: dict[str, int] = {}
    for row in metrics:
        if row["stage"] in ("sft", "onpolicy") and row["step"]:
            lengths[row["checkpoint"]] = max(lengths.get(row["checkpoint"], 0), row["step"])
    found, start = {}, 0
    for checkpoint in in_order(lengths):
        found[checkpoint] = (start, start + lengths[checkpoint])
        start += lengths[checkpoint]
    return found


def looks(metrics: Sequence[Row], set_id: str | None, name: str) -> list[Series]:
    """A metric on the fixed set by optimiser step of the whole run: looks in between, and checkpoints at their end."""
    spans, found = stages(metrics), []
    for tone, split in enumerate(COMPARED):
        at: dict[int, Point] = {}
        for row in metrics:
            if (row["name"], row["split"], row["set_id"]) == (name, split, set_id):
                place = _place(row, spans)
                if place is not None and (row["stage"] == "evaluate" or place not in at):
                    at[place] = Point(place, row["value"], row["lo"], row["hi"], f"{row['checkpoint']}, step {place}:")
        found.append(Series(SPLITS[split], [at[x] for x in sorted(at)], "line", tone))
    return found


def _place(row: Row, spans: dict[str, tuple[int, int]]) -> int | None:
    if row["stage"] == "evaluate":
        return 0 if row["checkpoint"] == "base" else spans.get(row["checkpoint"], (0, None))[1]
    return spans[row["checkpoint"]][0] + row["step"] if row["checkpoint"] in spans else None


def training(metrics: Sequence[Row]) -> list[Series]:
    """What was learnt, nats a token: `nll` of train and dev rows in sft, `ce_nll` of the rounds' targets after it."""
    spans, found = stages(metrics), []
    wanted = [("train", "nll", "nll, train"), ("dev", "nll", "nll, dev"), ("train", "ce_nll", "ce_nll, rounds")]
    for tone, (split, name, shown) in enumerate(wanted):
        points = [
            Point(spans[row["checkpoint"]][0] + row["step"], row["value"], label=f"{row['checkpoint']}:")
            for row in metrics
            if row["stage"] in ("sft", "onpolicy") and (row["split"], row["name"]) == (split, name) and row["step"]
        ]
        found.append(Series(shown, sorted(points), "line", tone))
    return found


def step_charts(metrics: Sequence[Row], set_id: str | None) -> list[Chart]:
    """By optimiser step of the whole run, with a line where each part begins."""
    spans = stages(metrics)
    marks = [(float(start), name) for name, (start, _) in spans.items()]
    end = max((last for _, last in spans.values()), default=0)
    drawn = [
        chart(name, looks(metrics, set_id, name), note="Nats a token by optimiser step, with 95% bands.", marks=marks,
              x_range=(0, end))
        for name in BY_STEP
    ]  # fmt: skip
    note = "Nats a token by optimiser step: what the student was trained on."
    drawn.append(chart("training nll", training(metrics), note=note, marks=marks, x_range=(0, end)))
    return [each for each in drawn if each] if end else []


def checkpoint_charts(metrics: Sequence[Row], names: Sequence[str]) -> list[Chart]:
    """A metric by checkpoint with its intervals, held-out and out of domain beside each other."""
    drawn = []
    for name in names:
        series, checkpoints = [], in_order(row["checkpoint"] for row in metrics if row["name"] == name)
        for tone, (split, aside) in enumerate((("heldout", -0.1), ("ood", 0.1))):
            points = [
                Point(checkpoints.index(c) + aside, row["value"], row["lo"], row["hi"], f"{c}:")
                for c, row in measured(metrics, split, name).items()
            ]
            series.append(Series(SPLITS[split], points, "dots", tone))
        which = {"lower": " Lower is better.", "higher": " Higher is better.", "": ""}[better(name)]
        ticks = [(float(i), c) for i, c in enumerate(checkpoints)]
        note = f"By checkpoint, with 95% intervals.{which}"
        drawn.append(chart(name, series, note=note, x_ticks=_sparse(ticks), x_range=(-0.5, len(checkpoints) - 0.5)))
    return [each for each in drawn if each]


def _sparse(ticks: list[tuple[float, str]], most: int = 7) -> list[tuple[float, str]]:
    """So many labels as have room, the last among them."""
    every = -(-len(ticks) // most) if ticks else 1
    return [tick for i, tick in enumerate(ticks) if (len(ticks) - 1 - i) % every == 0]
