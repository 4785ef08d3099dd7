"""Is `tail_kl` what it says it is, and are soft labels worth it? The teacher's exact distribution, computed in-process.

    python benchmarks/true_kl.py --seeds 1 2 3 --json

The quickstart's teacher is a model that we can run ourselves: SmolLM2 under its private prompt. So the true KL of a
student to it is known, over the whole vocabulary, on the held-out temperature-1 answers of the fixed set.
  checkpoints    every arm and seed at several steps: true forward and reverse KL, and `tail_kl` with the top-k cut from
                 that same distribution
  bound_holds    tail_kl <= true_kl at each of them
  same_ranking   both order all checkpoints alike, those of different runs too. `swapped` are the pairs that they do
                 not, with the difference in true KL and its paired interval over prompts: where it excludes zero, the
                 held-out answers tell the two apart, and `same_ranking_where_told_apart` is false
  server         how far the numbers of the llama.cpp server (quantised activations) are from those in-process
  minus_hard     sft with soft labels (alone, or mixed with hard ones) beside sft without: the same answers, steps,
                 batches and initial adapter; each seed has other train prompts. The difference in nats per token with
                 a hierarchical bootstrap interval over seeds and prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from algorithms import TASK
from paired import minus
from transformers import TrainerCallback

from blackbox_kd import sample, sft, yardstick
from blackbox_kd.command import overrides
from blackbox_kd.config import find_file, load_config
from blackbox_kd.losses import divergence, token_logprobs
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.sft_trainer import build_trainer
from blackbox_kd.soft_labels import label
from blackbox_kd.student.render import IGNORE, Rendered
from blackbox_kd.student.student import Student, first_kept, logits_from
from blackbox_kd.types import scorer

ARMS = {
    "hard": ["--sft.soft_labels", "false"],
    "soft": ["--sft.soft.alpha", "0"],
    "mixed": ["--sft.soft.alpha", "0.5"],
}
"""Hard labels, soft labels, and half of each."""
METRICS = ("true_kl", "true_reverse_kl", "tail_kl", "server_tail_kl", "teacher_nll")


@torch.no_grad()
def distributions(student: Student, rows: Sequence[Rendered], batch_size: int = 16) -> list[torch.Tensor]:
    """(S, V) log-probabilities at each supervised token of each row, on the CPU."""
    found = []
    student.model.eval()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        input_ids, mask = student.pad([row.input_ids for row in batch], "right")
        kept = [torch.tensor(row.labels) != IGNORE for row in batch]
        labels = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
        first = first_kept(labels)
        logits = logits_from(student.model, input_ids, mask, first)
        logits = logits.cpu()
        found += [row[mine].float().log_softmax(-1) for row, mine in zip(logits, labels[:, first:], strict=True)]
    return found


_TEACHER: dict[str, list[torch.Tensor]] = {}
"""Its distributions on a fixed set, by the id of that."""


class Truth:
    """The teacher's exact distributions on the held-out answers, and a student's distance to them."""

    def __init__(self, project: Project, student: Student, k: int) -> None:
        fixed = yardstick.captured(project)
        answers = [a for a in fixed.answers if a.prompt.split == "heldout"]
        texts = [a.sampled.text.strip() for a in answers]
        wrap = project.teacher.context.wrap
        render = student.renderer.render
        told = [render(wrap(a.prompt.messages), text) for a, text in zip(answers, texts, strict=True)]
        self.rows = [render(a.prompt.messages, text) for a, text in zip(answers, texts, strict=True)]
        if fixed.set_id not in _TEACHER:  # it is one for all runs, and its prompt is long
            with student.model.disable_adapter():
                _TEACHER[fixed.set_id] = distributions(student, told)
        self.teacher = _TEACHER[fixed.set_id]
        self.top = [logp.topk(k) for logp in self.teacher]
        model = project.config.teacher.model
        ids = [a.sampled.completion_id for a in answers]
        by = scorer(model, project.teacher.context.context_hash)
        found = label(project.corpus, student.renderer, model, by, list(zip(ids, texts, strict=True)))
        self.server, self.same = found.labels, found.same

    def measure(self, student: Student) -> dict[str, list[float]]:
        """Sums over the tokens of each held-out answer, and how many tokens there are."""
        sums: dict[str, list[float]] = {name: [] for name in (*METRICS, "tokens", "labelled")}
        for i, q_SV in enumerate(distributions(student, self.rows)):
            p_SV, top, soft = self.teacher[i], self.top[i], self.server[i]
            ids = torch.tensor([label for label in self.rows[i].labels if label != IGNORE])
            sums["true_kl"].append(float((p_SV.exp() * (p_SV - q_SV)).sum()))
            sums["true_reverse_kl"].append(float((q_SV.exp() * (q_SV - p_SV)).sum()))
            cut = divergence(top.values, token_logprobs(q_SV, top.indices), beta=0.0, tail="bucket")
            sums["tail_kl"].append(float(cut.sum()))
            sums["teacher_nll"].append(-float(q_SV.gather(1, ids[:, None]).sum()))
            sums["tokens"].append(float(len(ids)))
            sums["server_tail_kl"].append(0.0)
            sums["labelled"].append(0.0)
            if soft is not None:
                logprobs = torch.from_numpy(soft.logprobs)
                mine = logprobs.isfinite().any(1)
                student_logprobs = token_logprobs(q_SV[mine], torch.from_numpy(soft.ids)[mine].long())
                served = divergence(logprobs[mine], student_logprobs, beta=0.0, tail="bucket")
                sums["server_tail_kl"][-1] = float(served.sum())
                sums["labelled"][-1] = float(mine.sum())
        return sums

    def server_apart(self) -> dict[str, float]:
        """The server's labels beside the in-process distribution at the same tokens."""
        apart, weighted, tokens = [], 0.0, 0
        for soft, p_SV in zip(self.server, self.teacher, strict=True):
            if soft is None:
                continue
            logprobs, ids = torch.from_numpy(soft.logprobs), torch.from_numpy(soft.ids).long()
            exact = p_SV.gather(1, ids)
            mine = logprobs.isfinite()
            apart += (logprobs - exact)[mine].abs().tolist()
            weighted += float((logprobs.exp() * (logprobs - exact).abs())[mine].sum())
            tokens += int(mine.any(1).sum())
        return {
            "mean_abs_nats": float(np.mean(apart)),
            "mean_abs_nats_weighted_by_p": weighted / tokens,
            "p99_abs_nats": float(np.quantile(apart, 0.99)),
        }


class Looks(TrainerCallback):  # type: ignore[misc]
    """Measures at given steps."""

    def __init__(self, truth: Truth, student: Student, at: Sequence[int]) -> None:
        self.truth, self.student, self.at = truth, student, set(at)
        self.found: dict[int, dict[str, list[float]]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Outside of the training's own mode and random state."""
        if state.global_step in self.at:
            self.found[state.global_step] = self.truth.measure(self.student)
            print(f"  step {state.global_step}: {means(self.found[state.global_step])}", file=sys.stderr)


def means(sums: dict[str, list[float]]) -> dict[str, float]:
    """Nats per token."""
    over = {"server_tail_kl": "labelled"}
    return {name: sum(sums[name]) / max(1.0, sum(sums[over.get(name, "tokens")])) for name in METRICS}


def prompts_of(seed: int, out: Path) -> Path:
    """The quickstart's prompts with the train split in another order for each seed."""
    source, folder = find_file("data/action_items", "data"), out / f"prompts-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout", "ood", "holdback"):
        lines = (source / f"{split}.jsonl").read_text().splitlines()
        if split == "train":
            random.Random(seed).shuffle(lines)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def train(arm: str, seed: int, flags: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """One run: what was measured at each step, step 0 first."""
    done = flags.out / f"{arm}-{seed}.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    chosen = ["--seed", str(seed), "--run_dir", str(flags.out / f"{arm}-{seed}")]
    chosen += ["--corpus", str(flags.out / "corpus.duckdb"), "--prompts.path", str(prompts_of(seed, flags.out))]
    chosen += ["--prompts.limits", f"{{heldout: {flags.heldout}, ood: 0, holdback: 0}}", "--sft.dev_fraction", "0"]
    chosen += [*ARMS[arm], *extra]
    config = load_config(Config, TASK, overrides(chosen))
    print(f"{arm}, seed {seed}", file=sys.stderr)
    with Project(config) as project:
        asyncio.run(_ask(project))
        student = Student(config.student, seed=config.seed)
        truth = Truth(project, student, config.evaluate.top_logprobs or 20)
        answers = sft.training_answers(project)
        rows, coverage = sft.labelled(project, student, answers)
        trainer = build_trainer(student, config, sft.fitting(student, rows), [], flags.out / f"trainer-{arm}-{seed}")
        trainer.args.max_steps, trainer.args.save_strategy = max(flags.steps), "no"
        looks = Looks(truth, student, flags.steps)
        looks.found[0] = truth.measure(student)
        trainer.add_callback(looks)
        trainer.train()
        result = {"arm": arm, "seed": seed, "coverage": coverage, "same_tokenizer": truth.same,
                  "calls": len(answers), "server": truth.server_apart(),
                  "steps": {str(step): looks.found[step] for step in sorted(looks.found)}}  # fmt: skip
    done.write_text(json.dumps(result))
    return result


async def _ask(project: Project) -> None:
    async with project.teacher:
        await sample.run(project)
        await yardstick.capture(project)


def difference(
    runs: dict[tuple[str, int], dict[str, Any]], arm: str, seeds: Sequence[int], step: str, name: str
) -> tuple[float, float, float]:
    """An arm minus hard in nats per token, see `paired.minus`."""
    ours, hard = ([runs[which, seed]["steps"][step][name] for seed in seeds] for which in (arm, "hard"))
    return minus(ours, hard, next(iter(runs.values()))["steps"][step]["tokens"])


def swaps(checkpoints: Sequence[tuple[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """Pairs that `tail_kl` orders otherwise than the true KL, which is the mean over the same answers for all."""
    found = []
    for (one, ours), (other, theirs) in itertools.combinations(checkpoints, 2):
        if ours["tokens"] != theirs["tokens"]:
            raise ValueError(f"{one} and {other} were measured on different answers")
        apart, lo, hi = minus([ours["true_kl"]], [theirs["true_kl"]], ours["tokens"])
        if apart * (sum(ours["tail_kl"]) - sum(theirs["tail_kl"])) < 0:
            pair = {"pair": [one, other], "true_kl_difference": [apart, lo, hi]}
            found.append(pair | {"told_apart": lo > 0 or hi < 0})
    return found


def summary(runs: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The JSON object."""
    checkpoints = [
        {"name": f"{arm}-seed{seed}-step{step}", "arm": arm, "seed": seed, "step": int(step)} | means(sums)
        for (arm, seed), run in runs.items()
        for step, sums in run["steps"].items()
    ]
    swapped = swaps([(f"{arm}-seed{seed}-step{step}", sums) for (arm, seed), run in runs.items()
                     for step, sums in run["steps"].items()])  # fmt: skip
    last = list(next(iter(runs.values()))["steps"])
    compared = ("true_kl", "true_reverse_kl", "tail_kl", "teacher_nll")
    minus_hard = {
        arm: {step: {name: difference(runs, arm, seeds, step, name) for name in compared} for step in last[1:]}
        for arm in ARMS
        if arm != "hard" and (arm, seeds[0]) in runs
    }
    return {
        "checkpoints": checkpoints,
        "bound_holds": all(c["tail_kl"] <= c["true_kl"] + 1e-6 for c in checkpoints),
        "same_ranking": not swapped,
        "same_ranking_where_told_apart": not any(pair["told_apart"] for pair in swapped),
        "pairs": len(checkpoints) * (len(checkpoints) - 1) // 2,
        "swapped": swapped,
        "server": {key: float(np.mean([r["server"][key] for r in runs.values()])) for key in
                   next(iter(runs.values()))["server"]},
        "minus_hard": minus_hard,
        "coverage": next((run["coverage"] for run in runs.values() if run["coverage"]), {}),
        "train_answers": next(iter(runs.values()))["calls"],
    }  # fmt: skip


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 24], help="optimiser steps to measure at")
    parser.add_argument("--heldout", type=int, default=96, help="held-out prompts; there are 96")
    parser.add_argument("--out", type=Path, default=Path("runs/true_kl"), help="corpus and finished runs: resumable")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags, extra = parser.parse_known_args()
    runs = {(arm, seed): train(arm, seed, flags, extra) for seed in flags.seeds for arm in flags.arms}
    found = summary(runs, flags.seeds)
    if flags.json:
        print(json.dumps(found, indent=1))
        return 0
    for c in found["checkpoints"]:
        print(f"{c['name']:<22} " + "  ".join(f"{name} {c[name]:.4f}" for name in METRICS))
    for arm, steps in found["minus_hard"].items():
        for step, values in steps.items():
            shown = "  ".join(f"{name} {v:+.4f} [{lo:+.4f}, {hi:+.4f}]" for name, (v, lo, hi) in values.items())
            print(f"{arm} - hard, step {step}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
