"""Are the teacher's rewrites of the student's samples worth it? Several seeds, each beside its control.

    python benchmarks/rewrite_seeds.py --seeds 1 2 3 --json

Arms, from the same sft checkpoint of the seed, with the same number of optimiser steps:
  rewrite   benchmarks/action_items.yaml: the teacher corrects the student's drafts
  control   sft continued: the teacher's own answers, on so many prompts that the teacher's tokens are the same

One row an arm and seed, with the held-out metrics of base, sft and the last round. Runs are resumable; all share one
corpus, so what the teacher said once is not asked for again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from algorithms import TASK

from blackbox_kd.corpus import query

METRICS = ("teacher_nll", "chrf", "exact")


def run(run_dir: Path, corpus: Path, seed: int, extra: list[str]) -> dict[str, Any]:
    """One run in a process of its own; its summary."""
    command = [sys.executable, "-m", "blackbox_kd", "run", "--config", TASK, "--json", "--seed", str(seed)]
    command += ["--run_dir", str(run_dir), "--corpus", str(corpus), *extra]
    print(" ".join(command), file=sys.stderr)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def feedback_tokens(corpus: Path, run_dir: Path) -> tuple[int, int]:
    """(calls, prompt + completion tokens) of the teacher's on-policy replies of a run, also where they were cached."""
    run_id = json.loads((run_dir / "run.json").read_text())["run_id"]
    sql = f"""SELECT count(*), sum(t.prompt_tokens + t.completion_tokens)::BIGINT
              FROM feedback f JOIN completions t ON t.completion_id = f.target_completion_id
              WHERE f.run_id = '{run_id}'"""
    ((calls, tokens),) = query(corpus, sql)[1]
    return int(calls), int(tokens)


def row(arm: str, seed: int, summary: dict[str, Any], calls: int, tokens: int) -> dict[str, Any]:
    """Held-out metrics of base, sft and the last round."""
    heldout = {c["name"]: c["metrics"] for c in summary["checkpoints"] if c["split"] == "heldout"}
    last = list(heldout)[-1]
    shown = {name: {m: heldout[name][m] for m in METRICS} for name in ("base", "sft", last)}
    shown["last"] = shown.pop(last)
    return {"arm": arm, "seed": seed, "feedback_calls": calls, "feedback_tokens": tokens, "heldout": shown}


def arms(seed: int, out: Path, extra: list[str]) -> list[dict[str, Any]]:
    """Both arms of a seed."""
    corpus, rewrite, control = out / "corpus.duckdb", out / f"rewrite-{seed}", out / f"control-{seed}"
    summary = run(rewrite, corpus, seed, extra)
    calls, tokens = feedback_tokens(corpus, rewrite)
    rows = [row("rewrite", seed, summary, calls, tokens)]

    config = yaml.safe_load((rewrite / "config.yaml").read_text())
    rounds, sampled = config["onpolicy"]["rounds"], config["sample"]["max_prompts"]
    ((own,),) = query(
        corpus,
        "SELECT avg(prompt_tokens + completion_tokens) FROM completions JOIN requests USING (request_key) "
        "WHERE author = 'teacher' AND purpose = 'sample'",
    )[1]
    per_round = round(tokens / own / rounds)
    if not (control / "checkpoints" / "sft").exists():
        shutil.copytree(rewrite / "checkpoints" / "sft", control / "checkpoints" / "sft")
    limits = config["prompts"]["limits"] | {"train": sampled + rounds * per_round}
    flags = ["--onpolicy.algorithm.mode", "afresh", "--onpolicy.algorithm.worst_fraction", "1.0"]
    flags += ["--onpolicy.prompts_per_round", str(per_round), "--prompts.limits", json.dumps(limits)]
    summary = run(control, corpus, seed, [*extra, *flags])
    calls, tokens = feedback_tokens(corpus, control)
    return [*rows, row("control", seed, summary, calls, tokens)]


def show(rows: list[dict[str, Any]]) -> None:
    """The table of the README."""
    print("| seed | arm | calls | tokens | teacher_nll base → sft → last | chrf base → sft → last |")
    print("|--:|---|--:|--:|---|---|")
    for r in rows:
        cells = []
        for metric, form in (("teacher_nll", "{:.4f}"), ("chrf", "{:.2f}")):
            values = [r["heldout"][name][metric] for name in ("base", "sft", "last")]
            cells.append(" → ".join(form.format(v["value"]) for v in values))
        print(
            f"| {r['seed']} | {r['arm']} | {r['feedback_calls']} | {r['feedback_tokens']} | {cells[0]} | {cells[1]} |"
        )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="run directories and their corpus")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags, extra = parser.parse_known_args()
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        rows += arms(seed, flags.out, extra)
        (flags.out / "rows.json").write_text(json.dumps(rows, indent=1))
    if flags.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
