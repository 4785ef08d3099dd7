"""At equal teacher spend, does learning from one's own samples beat copying? Every arm, seed and spend on real models.

    python benchmarks/equal_spend.py --seeds 1 2 3 --json

SmolLM2 under its private prompt (a llama.cpp server) teaches SmolLM2 without it; the teacher's exact distribution is
computed in-process, for measurement only. Each run spends `--spend` teacher tokens: prompt and completion tokens of
every answer of teacher or judge that it used, as if nothing were cached, billed failures included, probe and
evaluation left out. An on-policy arm starts from its own sft on the part of the spend that its loop does not take; an
arm whose loop asks nothing has the whole spend for its sft.
  rows     arm, seed, spend (the target), teacher_tokens (what it came to), metrics on the same held-out answers
  minus    each arm minus `sft` in true forward KL by spend, with a bootstrap interval over seeds and prompts
  wins     share of the spends where that interval lies wholly below zero
Runs are resumable, one by one, each a process; seed 1 of all arms comes first, so that what is done is a whole table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import algorithms
from paired import minus

from blackbox_kd import onpolicy, sample, sft, yardstick
from blackbox_kd.config import find_file, load_config
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Request, SamplingParams, Split

SPENDS = [8_000, 24_000, 72_000]
"""Teacher tokens: 24, 72 and 216 answers of about 335 (300 of them are the private prompt)."""
ANSWER_TOKENS = 335
ROUNDS = 3
DEV = 32
"""Train prompts that are kept aside for tuning."""
HELD = {"heldout": 48, "ood": 24, "holdback": 24}


class Arm(NamedTuple):
    """What a run does with its spend."""

    share: float = 0.0
    """Of the spend that goes into the loop."""
    cost: float = 0.0
    """Teacher tokens of the loop for each of its prompts, as `--seeds 0` measured it; 0: it asks nothing."""
    algorithm: str | None = None
    """Of benchmarks/algorithms.py; None: no loop."""
    settings: dict[str, Any] = {}
    """Overrides of the quickstart: the trial that was the best of at most four on the dev prompts."""


ARMS = {
    "sft": Arm(settings={"sft.soft_labels": False}),
    "sft:soft": Arm(),
    "relabel": Arm(0.5, 480, "relabel"),
    "relabel:worst": Arm(0.5, 240, "relabel:worst"),
    "relabel:afresh": Arm(0.5, 168, "relabel:afresh"),
    "prefix": Arm(0.5, 360, "prefix"),
    "preference:snapshot": Arm(0.0, 0, "preference:snapshot"),
    "preference:fresh": Arm(0.5, 335, "preference:fresh"),
    "reward:best_of_n": Arm(0.5, 1500, "reward:best_of_n"),
    "reward:pg": Arm(0.5, 1500, "reward:pg"),
    "score:pg": Arm(0.5, 12_000, "score:pg"),
    "score:kl": Arm(0.5, 12_000, "score:kl"),
    "forks": Arm(0.5, 1360, "forks"),
    "gad": Arm(0.0, 0, "gad"),
}


class Sizes(NamedTuple):
    """How a spend is divided."""

    answers: int
    prompts_per_round: int


def sizes(arm: Arm, spend: int) -> Sizes:
    """Answers for sft, and prompts of each round."""
    in_loop = int(spend * arm.share / arm.cost / ROUNDS) if arm.cost else 0
    answers = round((spend - in_loop * ROUNDS * arm.cost) / ANSWER_TOKENS)
    if arm.cost and not in_loop:  # not even one prompt a round: the least that there is
        return Sizes(answers, 1)
    return Sizes(answers, in_loop or min(16, answers))


def settings(name: str, spend: int, seed: int, out: Path, device: str) -> list[tuple[str, str]]:
    """Overrides of the quickstart; seed 0 is measured on the dev prompts."""
    arm = ARMS[name]
    size = sizes(arm, spend)
    fresh = ROUNDS * size.prompts_per_round if arm.cost else 0
    flags: dict[str, Any] = {
        "seed": seed,
        "run_dir": str(out / f"{name.replace(':', '-')}-{spend}-{seed}"),
        "corpus": str(out / "corpus.duckdb"),
        "prompts.path": str(prompts_of(seed, out)),
        "prompts.limits": HELD | {"train": size.answers + fresh},
        "sample.max_prompts": size.answers,
        "student.dtype": "float32",
        "student.device": device,
        "evaluate.every_steps": None,
        "sft.trainer.num_train_epochs": 12,
    }
    if arm.algorithm:
        flags |= {
            "onpolicy.algorithm": algorithms.VARIANTS[arm.algorithm],
            "onpolicy.rounds": ROUNDS,
            "onpolicy.prompts_per_round": size.prompts_per_round,
            "onpolicy.update.max_steps": max(6, -(-size.prompts_per_round // 8) * 2),
        }
        if arm.algorithm.startswith("reward"):
            flags["judge"] = {"same_as": "teacher"}
    return [(key, json.dumps(value)) for key, value in (flags | arm.settings).items()]


def prompts_of(seed: int, out: Path) -> Path:
    """The quickstart's prompts, the train split in another order for each seed, without the dev prompts.

    Seed 0 is for tuning: its held-out prompts are the dev prompts.
    """
    import random

    source, folder = find_file("data/action_items", "data"), out / f"prompts-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = {split: (source / f"{split}.jsonl").read_text().splitlines() for split in (*HELD, "train")}
    train, dev = lines["train"][:-DEV], lines["train"][-DEV:]
    random.Random(seed).shuffle(train)
    lines |= {"train": train} | ({} if seed else {"heldout": dev})
    for split, rows in lines.items():
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


class Used:
    """request_keys that a run wanted answered, kept over its restarts; whether they were cached or not."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "used.txt"

    def watch(self, teacher: Teacher) -> None:
        """Everything that this endpoint is asked from now on."""
        ask: Callable[..., AsyncIterator[Completion]] = teacher.engine.complete

        def complete(requests: Iterable[Request], **options: Any) -> AsyncIterator[Completion]:
            kept = list(requests)
            with self.path.open("a") as file:
                file.writelines(f"{r.request_key}\n" for r in kept if r.purpose not in ("evaluate", "probe", "rollout"))
            return ask(kept, **options)

        teacher.engine.complete = complete  # type: ignore[method-assign,assignment]

    def bill(self, project: Project) -> dict[str, int]:
        """Calls and tokens of all attempts for them, whoever made them."""
        keys = self.path.read_text().split() if self.path.exists() else []
        (row,) = project.corpus.rows(
            """SELECT count(*), coalesce(sum(prompt_tokens), 0)::BIGINT, coalesce(sum(completion_tokens), 0)::BIGINT
               FROM attempts SEMI JOIN (SELECT DISTINCT unnest(?::UUID[]) AS request_key) USING (request_key)
               WHERE billed""",
            [keys],
        )
        return dict(zip(("calls", "prompt_tokens", "completion_tokens"), row, strict=True))


async def learn(project: Project, used: Used, has_loop: bool) -> Path:
    """All stages; the last checkpoint."""
    async with project.teacher:
        await yardstick.capture(project)
        for endpoint in project.endpoints:
            used.watch(endpoint)
        await sample.run(project)
        await sft.run(project)
        if has_loop:
            await onpolicy.run(project)
    return project.run_dir.checkpoint(f"round-{ROUNDS}" if has_loop else "sft")


def measured(project: Project, checkpoint: Path) -> dict[str, Any]:
    """Of each prompt: sums over the tokens of the teacher's held-out answer, and chrF of the student's greedy one."""
    from true_kl import Truth

    from blackbox_kd.evaluate import HOLDBACK, chrf
    from blackbox_kd.rollout import Writer
    from blackbox_kd.student.student import Student

    config = project.config
    student = Student(config.student, adapter=checkpoint)
    truth = Truth(project, student, config.evaluate.top_logprobs or 20)
    found: dict[str, Any] = {"heldout": truth.measure(student)}
    fixed = yardstick.captured(project).answers
    targets = {answer.prompt.prompt_id: answer.greedy.text.strip() for answer in fixed}
    held = project.prompts[HOLDBACK]

    def written(prompts: list[Any]) -> list[tuple[Any, Completion]]:
        return Writer(
            student=student, sampling=SamplingParams(temperature=0.0, max_completion_length=40), purpose="evaluate",
            round=0, seed=0, batch_size=config.evaluate.batch_size, corpus=project.corpus, run_id=project.run_id,
        ).answers(prompts)  # fmt: skip

    with student.under(None):
        targets |= {prompt.prompt_id: answer.text.strip() for prompt, answer in written(held)}
    answers = written([answer.prompt for answer in fixed] + held)
    splits: tuple[Split, ...] = ("heldout", "ood", HOLDBACK)
    for split in splits:
        scores = [chrf(c.text.strip(), targets[p.prompt_id]) for p, c in answers if p.split == split]
        found.setdefault(split, {})["chrf"] = scores
    return found


def run_one(name: str, spend: int, seed: int, out: Path, device: str) -> None:
    """One run, and its row."""
    began = time.monotonic()
    with Project(load_config(Config, "quickstart", settings(name, spend, seed, out, device))) as project:
        used = Used(project.run_dir.path)
        checkpoint = asyncio.run(learn(project, used, ARMS[name].algorithm is not None))
        trained_s = time.monotonic() - began
        bill = used.bill(project)
        row = {"arm": name, "seed": seed, "spend": spend, **sizes(ARMS[name], spend)._asdict(), **bill,
               "teacher_tokens": bill["prompt_tokens"] + bill["completion_tokens"], "device": device,
               "wall_s": round(trained_s, 1), "prompts": measured(project, checkpoint)}  # fmt: skip
    path = row_path(name, spend, seed, out)
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(row))
    path.with_suffix(".part").rename(path)


def row_path(name: str, spend: int, seed: int, out: Path) -> Path:
    """Of a finished run."""
    return out / "rows" / f"{name.replace(':', '-')}-{spend}-{seed}.json"


def study(flags: argparse.Namespace) -> None:
    """Every run that has no row yet, `--jobs` at a time; one that fails is said, and the others go on."""
    todo = [(n, sp, s) for s in flags.seeds for sp in flags.spend for n in flags.arms
            if not row_path(n, sp, s, flags.out).exists()]  # fmt: skip
    flags.out.mkdir(parents=True, exist_ok=True)

    def go(run: tuple[str, int, int]) -> None:
        name, spend, seed = run
        began, log = time.monotonic(), flags.out / f"{name.replace(':', '-')}-{spend}-{seed}.log"
        command = [sys.executable, __file__, "--one", name, str(spend), str(seed), "--out", str(flags.out),
                   "--device", flags.device]  # fmt: skip
        with log.open("w") as said:
            code = subprocess.run(command, stdout=said, stderr=said, check=False).returncode
        what = "done" if code == 0 else f"FAILED ({code}), see {log}"
        say(f"{name}, {spend} tokens, seed {seed}: {what} after {time.monotonic() - began:.0f} s")

    with ThreadPoolExecutor(flags.jobs) as pool:
        list(pool.map(go, todo))


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """Of all finished runs but those for tuning."""
    for path in sorted((out / "rows").glob("*.json")):
        row = json.loads(path.read_text())
        if row["seed"]:
            yield row


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON object; an arm is compared on the seeds that it shares with the other."""
    runs = {(row["arm"], row["spend"], row["seed"]): row["prompts"]["heldout"] for row in found}
    spends = sorted({spend for _, spend, _ in runs})
    compared: dict[str, dict[str, Any]] = {}
    for base in ("sft", "sft:soft"):
        for arm in (name for name in ARMS if name != base):
            for spend in spends:
                seeds = [s for a, sp, s in sorted(runs) if (a, sp) == (arm, spend) and (base, spend, s) in runs]
                if seeds:
                    ours, theirs = ([runs[which, spend, s]["true_kl"] for s in seeds] for which in (arm, base))
                    value = minus(ours, theirs, runs[arm, spend, seeds[0]]["tokens"])
                    compared.setdefault(f"minus_{base}", {}).setdefault(arm, {})[str(spend)] = value
    against = compared.get("minus_sft", {})
    wins = {arm: sum(hi < 0 for _, _, hi in by.values()) / len(spends) for arm, by in against.items()}
    return {"rows": [short(row) for row in found], **compared, "wins": wins}


def short(row: dict[str, Any]) -> dict[str, Any]:
    """Without the prompts."""
    held, metrics = row["prompts"]["heldout"], {}
    for name in ("true_kl", "true_reverse_kl", "tail_kl", "teacher_nll"):
        metrics[name] = sum(held[name]) / sum(held["tokens"])
    for split, values in row["prompts"].items():
        metrics[f"chrf_{split}"] = sum(values["chrf"]) / len(values["chrf"])
    return {key: value for key, value in row.items() if key != "prompts"} | {"metrics": metrics}


def table(found: dict[str, Any]) -> str:
    """Markdown: an arm a line, a spend a column: mean true KL, and the interval of the difference to sft."""
    spends = sorted({row["spend"] for row in found["rows"]})
    lines = ["| arm |" + "".join(f" {spend:,} tokens |" for spend in spends), "|---" * (len(spends) + 1) + "|"]
    for arm in ARMS:
        cells = []
        for spend in spends:
            values = [r["metrics"]["true_kl"] for r in found["rows"] if (r["arm"], r["spend"]) == (arm, spend)]
            apart = found.get("minus_sft", {}).get(arm, {}).get(str(spend))
            shown = f"{sum(values) / len(values):.3f}" if values else ""
            cells.append(shown + (f" ({apart[0]:+.3f} [{apart[1]:+.3f}, {apart[2]:+.3f}])" if apart else ""))
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="0: tuning, on the dev prompts")
    parser.add_argument("--spend", type=int, nargs="+", default=SPENDS, help="teacher tokens of a run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/equal_spend"), help="corpus and finished runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", nargs=3, metavar=("ARM", "SPEND", "SEED"), help="one run, in this process")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, not a table")
    flags = parser.parse_args()
    if flags.one:
        name, spend, seed = flags.one
        run_one(name, int(spend), int(seed), flags.out, flags.device)
        return
    study(flags)
    found = summary(list(rows(flags.out)))
    print(json.dumps(found, indent=1) if flags.json else table(found))


if __name__ == "__main__":
    main()
