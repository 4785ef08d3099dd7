"""Rows of `equal_spend.py`: read, compared, as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from paired import minus

from blackbox_kd.errors import AlignmentError
from blackbox_kd.tasks import SLACK

PRICE = {"input": 0.28, "cached_input": 0.028, "output": 0.42}
"""Dollars per million tokens: a hosted model's."""
BASELINES = ("sft", "sft:soft")
KL = ("true_kl", "true_reverse_kl", "tail_kl", "teacher_nll")
"""Nats per token of the teacher's held-out answers."""

OTHERS = (*KL[1:], "chrf_heldout", "chrf_ood", "chrf_holdback")
"""What is measured beside `true_kl`."""


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows that were written so far."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def rounded(value: Any) -> Any:
    """Numbers with as many digits as they carry."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def over(values: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """By how much the task that lost most lost more than its gate allows; 0 or less where all pass."""
    return max(values[name] - limit - SLACK for name, limit in limits.items())


def usd(row: Mapping[str, Any]) -> float | None:
    """By what the endpoint said of its cache; None where that was not kept."""
    if "cached_tokens" not in row:
        return None
    tokens = {"input": row["prompt_tokens"] - row["cached_tokens"], "cached_input": row["cached_tokens"],
              "output": row["completion_tokens"]}  # fmt: skip
    return sum(tokens[kind] * PRICE[kind] for kind in PRICE) / 1e6


def by_split(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Means of one run; `teacher_tokens` stands under `train`."""
    held = row["prompts"]["heldout"]
    found = {"train": {"teacher_tokens": row["teacher_tokens"]},
             "heldout": {name: sum(held[name]) / sum(held["tokens"]) for name in KL}}  # fmt: skip
    for split, values in row["prompts"].items():
        ours = {name: fmean(each) for name, each in values.items() if name == "chrf" or name.startswith("task_")}
        found.setdefault(split, {}).update(ours)
    return found


def metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The same flat: `true_kl`, `chrf_heldout` (not of a trial), `task_everyday_drop`, ..."""
    splits = {split: values for split, values in by_split(row).items() if split != "train"}
    return {
        f"chrf_{split}" if name == "chrf" else name: value
        for split, values in splits.items()
        for name, value in values.items()
    }


def summary(rows: Iterable[dict[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """The JSON object; an arm is compared on the seeds that it shares with the baseline. `limits`: see `over`."""
    every = list(rows)
    found = [row for row in every if "failed" not in row]
    runs = {(row["arm"], row["spend"], row["seed"]): row["prompts"]["heldout"] for row in found}
    spends = sorted({spend for _, spend, _ in runs})
    tokens = same_answers(runs)
    compared: dict[str, Any] = {}
    for base in BASELINES:
        for arm in dict.fromkeys(row["arm"] for row in found if row["arm"] != base):
            for spend in spends:
                seeds = [s for a, sp, s in sorted(runs) if (a, sp) == (arm, spend) and (base, spend, s) in runs]
                if seeds:
                    ours, theirs = ([runs[which, spend, s]["true_kl"] for s in seeds] for which in (arm, base))
                    value = (*minus(ours, theirs, tokens), len(seeds))
                    compared.setdefault(f"minus_{base}", {}).setdefault(arm, {})[str(spend)] = value
    told = [
        {k: v for k, v in row.items() if k != "prompts"} | {"usd": usd(row), "metrics": metrics(row)} for row in found
    ]
    kept: dict[str, dict[str, list[bool]]] = {}
    for row in told:
        passed = over(row["metrics"], limits) <= 0
        kept.setdefault(row["arm"], {}).setdefault(str(row["spend"]), []).append(passed)
    return {
        "rows": told,
        "failed": [row for row in every if "failed" in row],
        **compared,
        "wins": {
            base: {arm: fmean([hi < 0 for _, _, hi, _ in by.values()]) for arm, by in compared[f"minus_{base}"].items()}
            for base in BASELINES
            if f"minus_{base}" in compared
        },
        "limits": dict(limits),
        "kept": {arm: {spend: fmean(passed) for spend, passed in by.items()} for arm, by in kept.items()},
    }


def same_answers(runs: Mapping[Any, Mapping[str, list[float]]]) -> list[float]:
    """Tokens of the held-out answers, which all runs are measured on.

    Raises:
        AlignmentError: one that was measured on others.
    """
    tokens: list[float] = []
    for which, held in runs.items():
        tokens = tokens or held["tokens"]
        if held["tokens"] != tokens:
            raise AlignmentError(f"{which} was measured on other held-out answers than {next(iter(runs))}")
    return tokens


def table(found: dict[str, Any]) -> str:
    """Markdown: `headline`, and an arm minus the other baseline.

    Then what was lost on each hold-back task: the mean over seeds, and how many of them pass the gate; the price; and,
    spend by spend, whatever else is measured.
    """
    soft = BASELINES[1]
    blocks = [headline(found), _block(found, f"minus `{soft}`", partial(_apart, found, soft))]
    for name, limit in found["limits"].items():
        blocks.append(_block(found, f"`{name}`, at most {limit:g}", partial(_lost, found, name)))
    blocks.append(_block(found, "US cents", partial(_cents, found)))
    blocks += [_outcomes(found, spend) for spend in _spends(found)]
    return "\n\n".join(blocks)


def headline(found: dict[str, Any]) -> str:
    """An arm a line, a spend a column: the mean true forward KL, and in brackets minus `sft` over so many seeds."""

    def cell(arm: str, spend: int) -> str:
        apart = _apart(found, BASELINES[0], arm, spend)
        return _mean(found, arm, spend) + (f" ({apart})" if apart != "-" else "")

    return _block(found, f"true forward KL (minus `{BASELINES[0]}`)", cell)


def _spends(found: dict[str, Any]) -> list[int]:
    return sorted({row["spend"] for row in found["rows"]})


def _arms(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in (*found["rows"], *found["failed"])))


def _block(found: dict[str, Any], title: str, cell: Callable[[str, int], str]) -> str:
    spends = _spends(found)
    head = f"| {title} |" + "".join(f" {spend:,} tokens |" for spend in spends)
    lines = [f"| `{arm}` | " + " | ".join(cell(arm, spend) for spend in spends) + " |" for arm in _arms(found)]
    return "\n".join([head, "|---" * (len(spends) + 1) + "|", *lines])


def _values(found: dict[str, Any], name: str, arm: str, spend: int) -> list[float]:
    return [row["metrics"][name] for row in found["rows"] if (row["arm"], row["spend"]) == (arm, spend)]


def _mean(found: dict[str, Any], arm: str, spend: int) -> str:
    values = _values(found, "true_kl", arm, spend)
    return f"{fmean(values):.3f}" if values else "-"


def _apart(found: dict[str, Any], base: str, arm: str, spend: int) -> str:
    by = found.get(f"minus_{base}", {}).get(arm, {})
    return "{:+.3f} [{:+.3f}, {:+.3f}], {}".format(*by[str(spend)]) if str(spend) in by else "-"


def _lost(found: dict[str, Any], name: str, arm: str, spend: int) -> str:
    if not (values := _values(found, name, arm, spend)):
        return "-"
    passed = sum(over({name: value}, {name: found["limits"][name]}) <= 0 for value in values)
    return f"{fmean(values):+.2f} ({passed} of {len(values)})"


def _cents(found: dict[str, Any], arm: str, spend: int) -> str:
    known = [row["usd"] for row in found["rows"] if (row["arm"], row["spend"]) == (arm, spend) and row["usd"]]
    return f"{100 * fmean(known):.2f}" if known else "-"


def _outcomes(found: dict[str, Any], spend: int) -> str:
    """The mean over seeds; seconds by device, since no two of them are alike."""

    def cells(arm: str) -> Iterator[str]:
        for name in OTHERS:
            values = _values(found, name, arm, spend)
            yield f"{fmean(values):.{1 if name.startswith('chrf') else 3}f}" if values else "-"
        took: dict[str, list[float]] = {}
        for row in found["rows"]:
            if (row["arm"], row["spend"]) == (arm, spend):
                took.setdefault(row["device"], []).append(row["wall_s"])
        yield ", ".join(f"{fmean(took[device]):.0f} ({device})" for device in sorted(took)) or "-"

    head = [f"{spend:,} tokens", *(f"`{name}`" for name in OTHERS), "seconds"]
    head_line, *lines = [
        f"| {' | '.join(line)} |" for line in (head, *([f"`{arm}`", *cells(arm)] for arm in _arms(found)))
    ]
    return "\n".join([head_line, "|---" * len(head) + "|", *lines])


def plot(found: dict[str, Any], path: Path) -> None:
    """True forward KL against teacher tokens: the mean over seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in found["rows"])):
        points: dict[int, list[dict[str, Any]]] = {}
        for row in found["rows"]:
            if row["arm"] == arm:
                points.setdefault(row["spend"], []).append(row)
        spent = [sum(r["teacher_tokens"] for r in points[s]) / len(points[s]) for s in sorted(points)]
        values = [[r["metrics"]["true_kl"] for r in points[s]] for s in sorted(points)]
        means = [sum(each) / len(each) for each in values]
        style = {"color": "black", "lw": 2.2} if arm in BASELINES else {"color": f"C{number % 10}", "lw": 1.2}
        dash = "--" if arm == "sft:soft" or number >= 10 else "-"
        axes.plot(spent, means, dash, marker="o", ms=3.5, label=arm, **style)
        axes.fill_between(spent, [min(v) for v in values], [max(v) for v in values], alpha=0.12, **style | {"lw": 0})
    axes.set(xscale="log", xlabel="teacher tokens", ylabel="true forward KL, nats per token")
    spends = sorted({row["spend"] for row in found["rows"]})
    axes.set_xticks(spends, [f"{spend:,}" for spend in spends])
    axes.minorticks_off()
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})
