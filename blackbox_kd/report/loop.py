"""The loop in numbers: a station for each stage, with what went in and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from blackbox_kd.corpus.run_rows import Row
from blackbox_kd.health import ends
from blackbox_kd.report.tables import SPLITS, stages
from blackbox_kd.report.words import joined, number


class Station(NamedTuple):
    """A stage and its numbers; `again` for a round of the loop."""

    name: str
    lines: list[str]
    again: bool = False


def stations(
    prompts: Sequence[Row],
    answers: Sequence[Row],
    rollouts: Sequence[Row],
    feedback: Sequence[Row],
    metrics: Sequence[Row],
) -> list[Station]:
    """Those that have been begun."""
    counts = {row["split"]: row["prompts"] for row in prompts}
    named = {"train": "train", **SPLITS}
    splits = [f"{number(counts[split])} {name}" for split, name in named.items() if split in counts]
    sampled = next((row for row in answers if row["purpose"] == "sample"), None)
    found = [Station("prompts", splits or ["none has an answer yet"])]
    if sampled:
        lines = [f"{number(sampled['answers'])} answers of the teacher", f"{number(sampled['rows'])} of them whole"]
        found.append(Station("sample", [*lines, f"{number(sampled['completion_tokens'])} tokens"]))
    if steps := _steps(metrics, "sft"):
        found.append(Station("sft", steps))
    for round_ in sorted({row["round"] for row in [*rollouts, *feedback]} | _rounds(metrics)):
        found.append(Station(f"round {round_}", _round(round_, rollouts, feedback, metrics), again=True))
    evaluated = [row for row in metrics if row["stage"] == "evaluate"]
    if evaluated:
        measured = {row["checkpoint"] for row in evaluated} - {"teacher"}
        over = [name for split, name in SPLITS.items() if any(row["split"] == split for row in evaluated)]
        found.append(Station("evaluate", [f"{len(measured)} checkpoints", f"on {joined(over)} prompts"]))
    return found


def _rounds(metrics: Sequence[Row]) -> set[int]:
    return {row["round"] for row in metrics if row["stage"] == "onpolicy" and row["round"] > 0}


def _round(round_: int, rollouts: Sequence[Row], feedback: Sequence[Row], metrics: Sequence[Row]) -> list[str]:
    wrote = sum(row["rollouts"] for row in rollouts if row["round"] == round_)
    lines = [f"{number(wrote)} texts by the student"] if wrote else []
    for row in [row for row in feedback if row["round"] == round_]:
        what = f"{row['kind']}: {number(row['said'])}"
        lines.append(what if row["unchanged"] is None else f"{what}, {row['unchanged']:.0%} unchanged")
    return lines + _steps(metrics, f"round-{round_}")


def _steps(metrics: Sequence[Row], checkpoint: str) -> list[str]:
    """How long a checkpoint was trained, and where its loss began and ended."""
    span = stages(metrics).get(checkpoint)
    if not span:
        return []
    mine = [r for r in metrics if r["checkpoint"] == checkpoint and r["stage"] != "evaluate" and r["split"] == "train"]
    losses = [value for _, value in sorted((r["step"], r["value"]) for r in mine if r["name"] == "loss")]
    steps = f"{span[1] - span[0]} optimiser steps"
    if not losses:
        return [steps]
    began, ended = ends(losses)
    return [steps, f"loss {number(began)} → {number(ended)}"]


def unfinished(config: dict[str, Any], checkpoints: Sequence[str], metrics: Sequence[Row]) -> list[str]:
    """Stages of a whole run that this one has not come to the end of (yet)."""
    if "sft" not in checkpoints:
        return ["sft has not ended: there is no student yet"]
    found = []
    done, wanted = len(checkpoints) - 1, config.get("onpolicy", {}).get("rounds", 0)
    if done < wanted:
        found.append(f"{done} of {wanted} on-policy rounds are done")
    evaluated = {row["checkpoint"] for row in metrics if row["stage"] == "evaluate"}
    if missing := [name for name in ["base", *checkpoints] if name not in evaluated]:
        found.append(f"{joined(missing)} {'has' if len(missing) == 1 else 'have'} not been evaluated")
    return found
