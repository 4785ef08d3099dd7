"""Every on-policy algorithm for a few rounds on the quickstart's teacher and student: what each round did.

    python benchmarks/algorithms.py --seed 1 --json

SmolLM2 under its private prompt (a llama.cpp server) teaches SmolLM2 without it. All start from the same sft checkpoint
on 24 answers, and go 3 rounds of 12 prompts, 4 optimiser steps each. It shows that each one runs and what it
costs; which is better is a question for several seeds at equal spend, and not asked here.
Runs are resumable; all share one corpus, so what the teacher said once is not asked for again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from blackbox_kd import onpolicy, sample, sft, yardstick
from blackbox_kd.config import load_config
from blackbox_kd.corpus import query
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.student.student import Student

TASK = str(Path(__file__).with_name("action_items.yaml"))
ROUNDS, PROMPTS, STEPS = 3, 12, 4
REWRITE = {
    "name": "relabel",
    "template": "prompts/action_items_rewrite.md.j2",
    "examples": "prompts/action_items_rewrite_examples.jsonl",
    "temperature": 0,
    "max_completion_length": 40,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "relabel": REWRITE,
    "relabel:worst": REWRITE | {"worst_fraction": 0.5},
    "relabel:afresh": {"name": "relabel", "mode": "afresh", "max_completion_length": 40},
    "prefix": {"name": "prefix", "max_completion_length": 40},
    "preference:snapshot": {"name": "preference", "rejected": "snapshot"},
    "preference:fresh": {"name": "preference", "rejected": "fresh"},
    "reward:best_of_n": {"name": "reward", "update": "best_of_n", "grades": "digits"},
    "reward:pg": {"name": "reward", "update": "pg", "grades": "digits"},
    "score:pg": {"name": "score", "loss": "pg"},
    "score:kl": {"name": "score", "loss": "kl"},
    "forks": {"name": "forks"},
    "gad": {"name": "gad", "num_generations": 4},
}
"""`algorithm[:variant]` -> section `onpolicy.algorithm`; what is not named is its default."""
YARDSTICK = ("teacher_nll", "tail_kl")
BOOKS = (
    "feedback",
    "dropped_answers",
    "replayed",
    "staleness",
    "rollout_logprob",
    "rollout_logprob_gap",
    "rollout_cut_off",
    "surprise_z",
)
"""Not in the tables."""


def settings(out: Path, variant: str, seed: int) -> list[tuple[str, str]]:
    """Overrides of `TASK`."""
    flags: dict[str, Any] = {
        "seed": seed,
        "run_dir": str(out / f"{variant.replace(':', '-')}-{seed}"),
        "corpus": str(out / "corpus.duckdb"),
        "prompts.limits": {"train": 24 + ROUNDS * PROMPTS, "heldout": 32, "ood": 0, "holdback": 0},
        "onpolicy.algorithm": VARIANTS[variant],
        "onpolicy.rounds": ROUNDS,
        "onpolicy.prompts_per_round": PROMPTS,
        "onpolicy.update.max_steps": STEPS,
        "evaluate.every_steps": STEPS,
    }
    if VARIANTS[variant]["name"] == "reward":  # the only model at hand; a bad judge of its own work
        flags["judge"] = {"same_as": "teacher"}
    return [(key, json.dumps(value)) for key, value in flags.items()]


async def train(project: Project, first: Path) -> None:
    """sft once for all, then the rounds of one algorithm."""
    sft_folder, shared = project.run_dir.checkpoint("sft"), first / "checkpoints" / "sft"
    if not sft_folder.exists() and shared.exists():
        shutil.copytree(shared, sft_folder)
    async with AsyncExitStack() as stack:
        for endpoint in project.endpoints:
            await stack.enter_async_context(endpoint)
        await sample.run(project)
        await yardstick.capture(project)
        await sft.run(project)
        await onpolicy.run(project)


def rounds(project: Project) -> list[dict[str, Any]]:
    """One row for `sft`, then one a round: the fixed set, and what the algorithm logged."""
    fixed = yardstick.captured(project)
    student = Student(project.config.student, adapter=project.run_dir.checkpoint("sft"))
    measured = yardstick.Yardstick(project, student, fixed).measure(student)["heldout"]
    found = [{"round": 0, **{name: msgspec.to_builtins(measured[name]) for name in YARDSTICK}}]
    path, run_id = project.corpus.path, project.run_id
    for round_ in range(1, ROUNDS + 1):
        where = f"run_id = '{run_id}' AND stage = 'onpolicy' AND round = {round_}"
        looks = f"SELECT name, value, lo, hi FROM metrics WHERE {where} AND step = {STEPS} AND split = 'heldout'"
        row: dict[str, Any] = {"round": round_}
        row |= {n: {"value": v, "lo": lo, "hi": hi} for n, v, lo, hi in query(path, looks)[1] if n in YARDSTICK}
        row |= dict(query(path, f"SELECT name, value FROM metrics WHERE {where} AND step = 0 ORDER BY name")[1])
        found.append(row)
    return found


def spent(project: Project) -> dict[str, int]:
    """What the run asked of the teacher beyond `sample` and the fixed set: calls, and tokens that were billed."""
    sql = f"""SELECT count(*), coalesce(sum(prompt_tokens + completion_tokens), 0)::BIGINT
              FROM attempts JOIN requests USING (request_key)
              WHERE run_id = '{project.run_id}' AND purpose NOT IN ('sample', 'evaluate', 'probe')"""
    ((calls, tokens),) = query(project.corpus.path, sql)[1]
    return {"calls": calls, "tokens": tokens}


def table(row: dict[str, Any]) -> str:
    """Markdown: a line for each number, a column for each round."""
    names = list(dict.fromkeys(name for each in row["rounds"] for name in each if name not in ("round", *BOOKS)))
    lines = ["| | sft |" + "".join(f" round {r} |" for r in range(1, ROUNDS + 1)), "|---" * (ROUNDS + 2) + "|"]
    for name in names:
        values = (each.get(name) for each in row["rounds"])
        cells = (f"{v['value']:.3f} [{v['lo']:.3f}, {v['hi']:.3f}]" if isinstance(v, dict) else
                 "" if v is None else f"{v:.3g}" for v in values)  # fmt: skip
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(found: list[dict[str, Any]]) -> str:
    """One for each variant, under its name and what it asked."""
    return "\n\n".join(
        f"### {row['variant']}\n\n{row['calls']} calls, {row['tokens']:,} tokens beyond plain answers.\n\n{table(row)}"
        for row in found
    )


def main() -> None:
    """All variants, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, not tables")
    flags = parser.parse_args()
    found = []
    for variant in flags.only:
        say(f"== {variant}")
        overrides = settings(flags.out, variant, flags.seed)
        with Project(load_config(Config, TASK, overrides)) as project:
            asyncio.run(train(project, flags.out / f"{flags.only[0].replace(':', '-')}-{flags.seed}"))
            found.append({"variant": variant, "seed": flags.seed, **spent(project), "rounds": rounds(project)})
    if flags.json:
        json.dump({"rows": found}, sys.stdout, indent=1)
    else:
        print(tables(found))


if __name__ == "__main__":
    main()
