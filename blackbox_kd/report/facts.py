"""What the page shows of a run, read from its corpus, its summary.json and its checkpoints; no markup in here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackbox_kd.config import dump_config
from blackbox_kd.corpus.run_rows import Ask, Row, reading
from blackbox_kd.report import loop, spend, tables, words
from blackbox_kd.report.asked import asked
from blackbox_kd.report.charts import Chart
from blackbox_kd.report.examples import Answers, Example, by_prompt, corrected, side_by_side
from blackbox_kd.report.loop import Station
from blackbox_kd.report.spend import Spent
from blackbox_kd.report.tables import Table
from blackbox_kd.run_dir import ADAPTER_FILE, committed, policy_of

VERDICT_BY = ("tail_kl", "teacher_nll", "chrf")
"""The first of these that the held-out prompts have."""
CHARTED = ("tail_kl", "teacher_nll", "chrf")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A run. What it lacks is None or empty, and the page says so in its place."""

    name: str
    run: Row
    """As in table `runs`."""
    config: dict[str, Any]
    config_yaml: str
    run_dir: Path
    corpus: Path
    set_id: str | None
    other_sets: list[str]
    """Fixed sets that were measured earlier; they do not compare with this one."""
    verdict: words.Verdict
    verdict_by: str | None
    kept: str
    """How much of the base model's answers to other prompts is left."""
    measured: list[tuple[str, str, str]]
    """The verdict's metric: checkpoint, value, interval."""
    gates: dict[str, dict[str, Any]]
    unfinished: list[str]
    stations: list[Station]
    step_charts: list[Chart]
    checkpoint_charts: list[Chart]
    by_split: list[Table]
    yardstick: list[Table]
    """About the fixed set itself, and by decile."""
    tasks: Table | None
    terms: list[tuple[str, str]]
    """The columns of these tables with what they mean."""
    spend: list[Spent]
    spend_in_all: Spent
    spend_charts: list[Chart]
    shared: list[str]
    """What another run on this corpus paid for."""
    dead_letters: list[Row]
    curation: list[Row]
    health: Table | None
    examples: list[Example]
    drafts: list[Example]


def gather(run_dir: Path, run_id: str, corpus: Path, limit: int) -> Facts:
    """Everything about a run; texts are cut after `limit` characters.

    Raises:
        ConfigError: the corpus knows no such run, or this version no such config.
        CorpusError: it cannot be opened.
    """
    with reading(corpus, run_id, asked) as ask:
        (run,) = ask("run")
        config, there = json.loads(run["config"]), committed(run_dir)
        metrics = tables.of_checkpoints(ask("metrics"), there, config["onpolicy"]["rounds"])
        set_id = tables.latest_set(metrics)
        sets = {row["set_id"] for row in metrics if row["stage"] == "evaluate"} - {set_id}
        kept = [row for row in metrics if row["stage"] != "evaluate" or row["set_id"] == set_id]
        return Facts(
            name=run_dir.resolve().name,
            run=run,
            config=config,
            config_yaml=dump_config(config),
            run_dir=run_dir,
            corpus=corpus,
            set_id=set_id,
            other_sets=sorted(sets),
            unfinished=loop.unfinished(config, there, kept),
            dead_letters=ask("dead_letters"),
            curation=ask("curation"),
            gates={task: gate for task, gate in _gates(run_dir).items() if gate["checkpoint"] in ("base", *there)},
            **_progress(ask, kept),
            **_measured([row for row in kept if row["stage"] == "evaluate"], kept, set_id),
            **_texts(ask, config, run_dir, limit),
        )


def _progress(ask: Ask, metrics: list[Row]) -> dict[str, Any]:
    """What was asked, written and billed."""
    told, given, feedback, rollouts = ask("spend"), ask("answers"), ask("feedback"), ask("rollouts")
    by_stage = spend.by_stage(told, given, feedback)
    in_all = spend.total(by_stage)
    return {
        "stations": loop.stations(ask("prompts"), given, rollouts, feedback, metrics),
        "spend": by_stage,
        "spend_in_all": in_all,
        "spend_charts": spend.over_time(ask("timeline"), priced=bool(in_all.cost_usd)),
        "shared": [f"{row['answers'] - row['own']} of {row['answers']} answers of {row['purpose']}"
                   for row in given if row["own"] < row["answers"]],
        "health": tables.by_round(metrics, _counted(rollouts, feedback)),
    }  # fmt: skip


def _counted(rollouts: list[Row], feedback: list[Row]) -> list[Row]:
    """Numbers of a round that are no metric."""
    found = [{"name": "rollouts", "round": row["round"], "value": row["rollouts"]} for row in rollouts]
    return found + [
        {"name": "unchanged", "round": row["round"], "value": row["unchanged"]}
        for row in feedback
        if row["unchanged"] is not None
    ]


def _measured(evaluated: list[Row], metrics: list[Row], set_id: str | None) -> dict[str, Any]:
    """What `evaluate` found, and the looks in between."""
    by = next((name for name in VERDICT_BY if tables.measured(evaluated, "heldout", name)), None)
    numbers = tables.measured(evaluated, "heldout", by) if by else {}
    splits = [(split, *tables.names_of(evaluated, split)) for split in tables.SPLITS]
    by_split = [t for split, names, _ in splits if (t := tables.by_checkpoint(evaluated, split, names))]
    yardstick = [t for split, _, rest in splits if (t := tables.by_checkpoint(evaluated, split, rest))]
    return {
        "verdict": words.verdict(by or "", numbers),
        "verdict_by": by,
        "kept": words.holdback_words(tables.measured(evaluated, "holdback", "chrf")),
        "measured": _ends([(name, words.number(row["value"]), words.interval(row)) for name, row in numbers.items()]),
        "step_charts": tables.step_charts(metrics, set_id),
        "checkpoint_charts": tables.checkpoint_charts(evaluated, CHARTED),
        "by_split": by_split,
        "yardstick": yardstick,
        "terms": list(dict.fromkeys(column for t in by_split + yardstick for column in t.columns if column[1])),
        "tasks": tables.by_checkpoint(evaluated, "holdback", tables.tasks(evaluated)),
    }


def _ends(numbers: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The first two and the last three; what is between them is in the tables."""
    return numbers if len(numbers) <= 6 else [*numbers[:2], ("", "\u2026", ""), *numbers[-3:]]


def _gates(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Of summary.json, by task; none where there is no summary."""
    path = run_dir / "summary.json"
    return dict(json.loads(path.read_text("utf-8")).get("gate") or {}) if path.exists() else {}


def _texts(ask: Ask, config: dict[str, Any], run_dir: Path, limit: int) -> dict[str, Any]:
    policies = _policies(ask, config, run_dir)
    found = by_prompt(ask("heldout", policies=list(policies)), policies)
    return {"examples": side_by_side(ask, found, _shown(found), limit), "drafts": corrected(ask, limit)}


def _policies(ask: Ask, config: dict[str, Any], run_dir: Path) -> dict[str, str]:
    """policy -> checkpoint, as the run directory has them now: base, sft and the last round."""
    names = committed(run_dir)
    folders = [run_dir / "checkpoints" / name for name in dict.fromkeys(names[:1] + names[-1:])]
    found = {}
    for row in ask("bases", model=config["student"]["model"]):
        base = row["policy"].removeprefix("base:")
        found[row["policy"]] = "base"
        found |= {policy_of(base, folder): folder.name for folder in folders if (folder / ADAPTER_FILE).exists()}
    return found


def _shown(found: Answers) -> list[str]:
    """Checkpoints that have answers, in the order of training."""
    written = {writer for row in found.rows.values() for writer in row}
    return tables.in_order(name for name in written if name == "base" or name == "sft" or name.startswith("round-"))
