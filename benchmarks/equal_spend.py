"""At equal teacher spend, does learning from one's own samples beat copying? Every arm, seed and spend on real models.

    python benchmarks/equal_spend.py --seeds 1 2 3 --json

SmolLM2 under its private prompt (a llama.cpp server) teaches SmolLM2 without it; the teacher's exact distribution is
computed in-process, for measurement only. Each run spends `--spend` teacher tokens: prompt and completion tokens of
every answer of teacher or judge that it used, as if nothing were cached, billed failures included, probe and
evaluation left out. An on-policy arm starts from its own sft on the part of the spend that its loop does not take; an
arm whose loop asks nothing has the whole spend for its sft. Arms with the same sft share it. Where not even one prompt
a round can be paid for, an arm is left out.
  rows     arm, seed, spend (the target), teacher_tokens (what it came to), metrics on the same held-out answers
  minus    each arm minus `sft`, and minus `sft:soft`, in true forward KL by spend: with a bootstrap interval over seeds
           and prompts, and over how many seeds
  wins     share of an arm's spends where that interval lies wholly below zero. An on-policy arm starts from `sft:soft`,
           so ahead of `sft` it may be by that alone
  usd      of a row, at the README's price, what the endpoint read from its cache at the price of that
  kept     by spend, share of the seeds whose student passes the quickstart's gate on hold-back tasks
Runs are resumable one by one: a line of `--rows` each. Seed 1 of all arms comes first, so that what is done is a
whole table. Each row's metrics are in the corpus, too: stage `equal_spend`, checkpoint: arm, step: spend, round: seed.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AsyncExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid5

import algorithms
import equal_spend_table

from blackbox_kd import evaluate, onpolicy, sample, sft, yardstick
from blackbox_kd.config import find_file, load_config
from blackbox_kd.corpus import Corpus
from blackbox_kd.hashing import content_id
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.student.load import pick_device
from blackbox_kd.tasks import Tasks
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Request

SPENDS = [8_000, 24_000, 72_000]
"""Teacher tokens: 24, 72 and 216 answers of about 335 (300 of them are the private prompt)."""
ANSWER_TOKENS = 335
ROUNDS = 2
PASSES = 12
"""Samples that an arm may be trained on for each answer that its spend pays for, if its loop asks: the best of them
still gain by more."""
STEPS = 24
"""Of a round at the smallest spend that pays for one, of two samples each; in proportion at the others, so that what
the teacher says is learnt as often."""
DEV = 32
"""Train prompts that are kept aside for tuning."""
HELD = {"heldout": 1.0, "ood": 0.5, "holdback": 0.5}
"""Prompts of each evaluation split, as a part of `--held`."""
RESULTS = Path(__file__).parent / "results"

Settings = dict[str, Any]
"""Overrides of `algorithms.TASK`, and `OURS`."""
OURS = ("share", "steps")
"""The loop's part of the spend, and STEPS."""

SOFTLY = (1e-4, 3e-4)
"""Learning rates where the teacher's distribution is learnt, or a reward."""
TEXTS = (1e-5, 3e-5)
"""Where one text a prompt is: with fewer and larger steps, too, these arms went away from the teacher at 1e-4."""


def loop(rates: Iterable[float], **more: Any) -> list[Settings]:
    """Trials of an on-policy arm."""
    return [{**more, "onpolicy.update.learning_rate": rate, "onpolicy.update.batch_size": 2} for rate in rates]


LONGER = loop(
    [3e-4], share=0.5, steps=2 * STEPS, **{"onpolicy.replay": 0.7, "sft.trainer.num_train_epochs": PASSES // 2}
)
"""Half as long an sft, and the loop over more of its answers, for as many samples in all."""


def copy(rate: float, *, batch_size: int | None = None, epochs: int | None = None) -> Settings:
    """A trial of sft; without `epochs` as many as are best on dev rows."""
    more: Settings = {"sft.trainer.per_device_train_batch_size": batch_size} if batch_size else {}
    if epochs:
        more |= {"sft.dev_fraction": 0, "sft.trainer.num_train_epochs": epochs}
    return {"sft.trainer.learning_rate": rate, **more}


class Arm(NamedTuple):
    """What a run does with its spend."""

    algorithm: str | None = None
    """Of benchmarks/algorithms.py; None: no loop."""
    cost: float = 0.0
    """Teacher tokens of the loop for each of its prompts, as it was measured; 0: it asks nothing."""
    trials: list[Settings] = [*loop(SOFTLY, share=0.5), *LONGER]
    """Tried at the smallest spend on the dev prompts."""
    settings: Settings = {}
    step: int = 1
    """Prompts of a round are a multiple of it: 2 where half of them are asked about."""


ARMS = {
    "sft": Arm(
        trials=[copy(3e-4), copy(1e-3), copy(3e-4, epochs=6), copy(1e-4, batch_size=2)],
        settings={"sft.soft_labels": False},
    ),
    "sft:soft": Arm(
        trials=[
            copy(1e-3, epochs=4),
            copy(6e-4, batch_size=2, epochs=6),
            copy(3e-4, batch_size=2, epochs=6),
            copy(3e-4, batch_size=2, epochs=PASSES),
        ]
    ),
    "relabel": Arm("relabel", 432, loop(TEXTS, share=0.5)),
    "relabel:worst": Arm("relabel:worst", 216, loop(TEXTS, share=0.5), step=2),
    "relabel:afresh": Arm("relabel:afresh", 168, step=2),
    "prefix": Arm("prefix", 330),
    "preference:snapshot": Arm("preference:snapshot", trials=loop(TEXTS)),
    "preference:fresh": Arm("preference:fresh", trials=loop(TEXTS)),
    "reward:best_of_n": Arm("reward:best_of_n", 340, loop(TEXTS, share=0.5)),
    "reward:pg": Arm("reward:pg", 340),
    "score:pg": Arm("score:pg", 4_700),
    "score:kl": Arm("score:kl", 4_700),
    "forks": Arm("forks", 1312),
    "gad": Arm("gad", trials=loop(SOFTLY)),
}
SLOWEST = ("gad", "preference:fresh", "preference:snapshot")
"""They take as long as several others: before these, so that no worker ends with one of them alone."""
TUNED = RESULTS / "equal_spend_tuned.json"
"""arm -> the trial that is taken, and what each came to on the dev prompts; made by --tune, then frozen."""
TUNING_SEED = 0
MARGIN = 0.5
"""A trial may lose this part of what the gate on hold-back tasks allows: other seeds may lose more than this one."""
SECONDS = "seconds.txt"
"""In a shared sft: how long it took."""


class Sizes(NamedTuple):
    """How a spend is divided."""

    answers: int
    """For sft."""
    prompts_per_round: int
    steps: int
    """Of the optimiser in each round."""


def sizes(arm: Arm, spend: int, share: float, steps: int = STEPS) -> Sizes:
    """An arm that asks nothing in its loop has the whole spend for its sft, and rounds of one size."""
    prompts = paid_prompts(arm, spend, share)
    unit = max(1, spend // 18_000)  # so that arms of one share have one sft
    answers = round((spend - prompts * ROUNDS * arm.cost) / ANSWER_TOKENS / unit) * unit
    if not arm.algorithm:
        return Sizes(answers, 0, 0)
    if not arm.cost:
        return Sizes(answers, min(16, answers), steps)
    return Sizes(answers, prompts, round(steps * spend / least(arm, share, SPENDS)))


def paid_prompts(arm: Arm, spend: int, share: float) -> int:
    """Of each round."""
    return int(spend * share / arm.cost / ROUNDS / arm.step) * arm.step if arm.cost else 0


def least(arm: Arm, share: float, spends: Sequence[int]) -> int:
    """The smallest spend that pays for one prompt a round; the first of them where none does."""
    return next((spend for spend in spends if not arm.cost or paid_prompts(arm, spend, share)), spends[0])


class Run(NamedTuple):
    """What is to be run."""

    arm: str
    spend: int
    seed: int
    trial: int
    """Of the arm's."""
    settings: Settings
    """Those of the trials that are taken."""
    held: int
    """See the flag."""
    out: Path
    device: str
    threads: int

    @property
    def name(self) -> str:
        """Of its folder and its row."""
        return f"{self.arm.replace(':', '-')}-{self.spend}-{self.seed}" + ("" if self.seed else f"-{self.trial}")

    @property
    def sizes(self) -> Sizes:
        """See `sizes`."""
        chosen = self.settings
        return sizes(ARMS[self.arm], self.spend, chosen.get("share", 0.0), chosen.get("steps", STEPS))

    @property
    def learnt_before(self) -> Settings:
        """Its settings of the sequence-level stage."""
        return {key: value for key, value in self.settings.items() if key.startswith("sft.")}

    def overrides(self) -> list[tuple[str, str]]:
        """Of `algorithms.TASK`."""
        arm, size = ARMS[self.arm], self.sizes
        fresh = ROUNDS * size.prompts_per_round if arm.cost else 0
        flags: Settings = {
            "seed": self.seed,
            "run_dir": str(self.out / self.name),
            "corpus": str(self.out / "corpus.duckdb"),
            "prompts.path": str(prompts_of(self.seed, self.out)),
            "prompts.limits": {split: int(part * self.held) for split, part in HELD.items()}
            | {"train": size.answers + fresh},
            "teacher.threads": self.threads,
            "sample.max_prompts": size.answers,
            "student.dtype": "float32",
            "student.device": self.device,
            "evaluate.every_steps": None,
        }
        if arm.algorithm:
            flags |= {
                "onpolicy.algorithm": algorithms.VARIANTS[arm.algorithm],
                "onpolicy.rounds": ROUNDS,
                "onpolicy.prompts_per_round": size.prompts_per_round,
                "onpolicy.update.max_steps": size.steps,
            }
            if arm.algorithm.startswith("reward"):
                flags["judge"] = {"same_as": "teacher"}
        flags |= arm.settings | {key: value for key, value in self.settings.items() if key not in OURS}
        return [(key, json.dumps(value)) for key, value in flags.items()]


def prompts_of(seed: int, out: Path) -> Path:
    """The quickstart's prompts, the train split in another order for each seed, without the dev prompts.

    Those are the held-out prompts of the tuning seed.
    """
    source, folder = find_file("data/action_items", "data"), out / f"prompts-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = {split: (source / f"{split}.jsonl").read_text().splitlines() for split in (*HELD, "train")}
    train, dev = lines["train"][:-DEV], lines["train"][-DEV:]
    random.Random(seed).shuffle(train)
    lines |= {"train": train} | ({} if seed else {"heldout": dev})
    for split, found in lines.items():
        part = folder / f"{split}.{os.getpid()}"  # another run may be reading it
        part.write_text("\n".join(found) + "\n")
        part.rename(folder / f"{split}.jsonl")
    return folder


_WORKER: dict[str, Path] = {}
"""`out` of this process, under --apart."""


def on_its_own(out: Path) -> None:
    """This process has a corpus of its own, begun as a copy of what there is; what was trained for all stays shared."""
    mine = _WORKER["out"] = out / f"worker-{os.getpid()}"
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir()
    (out / "sft").mkdir(exist_ok=True)
    (mine / "sft").symlink_to((out / "sft").resolve())
    if (corpus := out / "corpus.duckdb").exists():
        shutil.copy(corpus, mine)


class Used:
    """request_keys that a run wanted answered, whether they were cached or not."""

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
            """SELECT count(*), coalesce(sum(prompt_tokens), 0)::BIGINT, coalesce(sum(cached_tokens), 0)::BIGINT,
                      coalesce(sum(completion_tokens), 0)::BIGINT
               FROM attempts SEMI JOIN (SELECT DISTINCT unnest(?::UUID[]) AS request_key) USING (request_key)
               WHERE billed""",
            [keys],
        )
        return dict(zip(("calls", "prompt_tokens", "cached_tokens", "completion_tokens"), row, strict=True))


async def learn(project: Project, used: Used, has_loop: bool, pool: Path) -> tuple[Path, float]:
    """All stages; the last checkpoint, and seconds: without the fixed set, with training that another run has done."""
    async with AsyncExitStack() as stack:
        for endpoint in project.endpoints:
            await stack.enter_async_context(endpoint)
        await yardstick.capture(project)
        began = time.monotonic()
        for endpoint in project.endpoints:
            used.watch(endpoint)
        await sample.run(project)
        saved_s = await shared_sft(project, pool)
        if has_loop:
            await onpolicy.run(project)
    seconds = time.monotonic() - began + saved_s
    return project.run_dir.checkpoint(f"round-{ROUNDS}" if has_loop else "sft"), seconds


async def shared_sft(project: Project, pool: Path) -> float:
    """Train the sequence-level stage, or take it from a run with the same settings and answers; seconds saved."""
    kept, mine = pool / content_id(project.settings_of("sft")), project.run_dir.checkpoint("sft")
    if kept.exists():
        shutil.copytree(kept, mine, dirs_exist_ok=True)
        return float((mine / SECONDS).read_text())
    began = time.monotonic()
    await sft.run(project)
    (mine / SECONDS).write_text(str(time.monotonic() - began))
    part = kept.with_name(f"{kept.name}.{os.getpid()}")
    shutil.copytree(mine, part)
    with suppress(OSError):  # another worker was first
        part.rename(kept)
    return 0.0


def measured(project: Project, checkpoint: Path, *, texts: bool) -> dict[str, Any]:
    """Of each held-out prompt: sums over the tokens of the teacher's answer; of each hold-back question: base less own.

    `texts`: chrF of greedy answers, too.
    """
    from true_kl import Truth

    from blackbox_kd.student.student import Student

    config = project.config
    student = Student(config.student, adapter=checkpoint)
    truth = Truth(project, student, config.evaluate.top_logprobs or 20)
    greedy = evaluate.writer(project, student, checkpoint.name, temperature=0.0)
    own, tasks = truth.measure(student), Tasks(config.evaluate)
    with student.under(None):
        base = tasks.scores(greedy)
    drops = {
        f"task_{name}_drop": [b - o for b, o in zip(base[name], scores, strict=True)]
        for name, scores in tasks.scores(greedy).items()
    }
    sums: dict[str, Any] = {"heldout": own, evaluate.HOLDBACK: drops}
    if not texts:
        return sums
    fixed, held = yardstick.captured(project).answers, project.prompts[evaluate.HOLDBACK]
    targets = {answer.prompt.prompt_id: answer.greedy.text.strip() for answer in fixed}
    with student.under(None):
        targets |= {prompt.prompt_id: answer.text.strip() for prompt, answer in greedy.answers(held)}
    answers = greedy.answers([answer.prompt for answer in fixed] + held)
    for split in (*yardstick.FIXED_SPLITS, evaluate.HOLDBACK):
        scores = [evaluate.chrf(c.text.strip(), targets[p.prompt_id]) for p, c in answers if p.split == split]
        sums.setdefault(split, {})["chrf"] = scores
    return sums


def run_one(run: Run) -> dict[str, Any] | str:
    """The row of one run, or why there is none."""
    run = run._replace(**_WORKER)
    pool, failed = run.out / "sft", run.out / f"{run.name}.failed"
    pool.mkdir(exist_ok=True)
    failed.unlink(missing_ok=True)
    shutil.rmtree(run.out / run.name, ignore_errors=True)  # of one that was stopped: half a run has half a wall_s
    try:
        with Project(load_config(Config, algorithms.TASK, run.overrides())) as project:
            used = Used(project.run_dir.path)
            checkpoint, wall_s = asyncio.run(learn(project, used, ARMS[run.arm].algorithm is not None, pool))
            bill = used.bill(project)
            teacher_tokens = bill["prompt_tokens"] + bill["completion_tokens"]
            return {**told(run), **bill, "teacher_tokens": teacher_tokens,
                    "device": pick_device(project.config.student).type, "wall_s": round(wall_s, 1),
                    "prompts": measured(project, checkpoint, texts=run.seed != TUNING_SEED)}  # fmt: skip
    except Exception as error:  # one run that fails must not end the study
        failed.write_text(traceback.format_exc())
        return f"{type(error).__name__}: {error}"


def missing(runs: Iterable[Run], rows: Path) -> list[Run]:
    """Those that have no row yet, or failed."""
    done = {key for key, row in found(rows).items() if "failed" not in row}
    todo = []
    for run in runs:
        if ARMS[run.arm].cost and not run.sizes.prompts_per_round:
            say(f"{run.name}: left out, one prompt a round costs more than its share of the spend")
        elif key_of(told(run)) not in done:
            todo.append(run)
    return todo


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Table by table, in each of them first those that train an sft, and then those that take it from one of them."""
    ordered, trained = list[tuple[Any, ...]](), set[str]()
    for n, run in enumerate(runs):
        before = json.dumps([run.seed, run.sizes.answers, ARMS[run.arm].settings, run.learnt_before], sort_keys=True)
        ordered.append((run.seed, run.spend, before in trained, run.arm not in SLOWEST, n, run))
        trained.add(before)
    return [run for *_, run in sorted(ordered)]


def work(runs: Iterable[Run], flags: argparse.Namespace) -> None:
    """What is missing, table by table, `--jobs` at a time; each row is written as it comes."""
    todo = in_order(missing(runs, flags.rows))
    apart = {"initializer": on_its_own, "initargs": (flags.out,)} if flags.apart else {}
    with alone(flags.out), ProcessPoolExecutor(flags.jobs, mp_context=get_context("spawn"), **apart) as pool:
        asked = {pool.submit(run_one, run): run for run in todo}
        for future in as_completed(asked):
            run, row = asked[future], future.result()
            if isinstance(row, str):
                said, row = row, told(run) | {"failed": row}
            else:
                said = f"true_kl {equal_spend_table.metrics(row)['true_kl']:.4f}, {row['teacher_tokens']} tokens"
            with flags.rows.open("a") as file:
                file.write(json.dumps(equal_spend_table.rounded(row)) + "\n")
            say(f"[{time.strftime('%H:%M:%S')}] {run.name}: {said}")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two studies in one folder would remove each other's unfinished runs."""
    with (folder / "study.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{folder}: another study is at work there")
        yield


def told(run: Run) -> dict[str, Any]:
    """What a row says of its run."""
    named = {name: getattr(run, name) for name in ("arm", "spend", "seed", "trial", "settings", "held")}
    return named | run.sizes._asdict()


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which run it is; with other settings, its own or those of the sft that it starts from, it is another one.

    Likewise with a spend that is divided otherwise, or on other held-out prompts.
    """
    same = ("arm", "spend", "seed", "held", *Sizes._fields)
    return *(row[name] for name in same), json.dumps(row["settings"], sort_keys=True)


def found(rows: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The row of each run; of one that failed and was made again, the one that counts."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in equal_spend_table.read(rows):
        if "failed" not in row or key_of(row) not in kept:
            kept[key_of(row)] = row
    return kept


def tune(flags: argparse.Namespace) -> None:
    """Choose a trial of each arm, see `taken`; sft first, on which others build."""
    best: dict[str, Any] = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    for arms in (["sft", "sft:soft"], [arm for arm in ARMS if ARMS[arm].algorithm]):
        runs = [
            run_of(arm, least(ARMS[arm], trial.get("share", 0.0), flags.spend), TUNING_SEED, n, trial, best, flags)
            for arm in arms
            if arm in flags.arms
            for n, trial in enumerate(ARMS[arm].trials)
        ]
        work(runs, flags)
        reached = {k: equal_spend_table.metrics(r) for k, r in found(flags.rows).items() if "failed" not in r}
        for arm in dict.fromkeys(run.arm for run in runs):
            values = [reached.get(key_of(told(run))) for run in runs if run.arm == arm]
            if not any(values):
                continue  # none could be run: there is nothing to choose by
            n = taken(values, {name: limit * MARGIN for name, limit in limits().items()})
            tried = {name: [v and v[name] for v in values] for name in ("true_kl", *limits())}
            best[arm] = {"trial": n, "settings": ARMS[arm].trials[n], "dev": tried}
        TUNED.write_text(json.dumps({arm: best[arm] for arm in ARMS if arm in best}, indent=1) + "\n")


def limits() -> dict[str, float]:
    """How much each hold-back task may lose: the gate of `algorithms.TASK`, by the metric that it looks at."""
    return {f"task_{name}_drop": limit for name, limit in load_config(Config, algorithms.TASK).evaluate.gate.items()}


def taken(values: Sequence[Mapping[str, float] | None], limits: Mapping[str, float]) -> int:
    """Of the trials within the limits on hold-back tasks the nearest to the teacher; if none is, the least lost."""

    def order(n: int) -> tuple[float, float]:
        value = values[n]
        if value is None:
            return float("inf"), 0.0
        return max(0.0, equal_spend_table.over(value, limits)), value["true_kl"]

    return min(range(len(values)), key=order)


def run_of(
    arm: str, spend: int, seed: int, n: int, trial: Settings, tuned: dict[str, Any], flags: argparse.Namespace
) -> Run:
    """An on-policy arm learns its answers as the arm `sft:soft` does."""
    shared = tuned.get("sft:soft", {}).get("settings", {}) if ARMS[arm].algorithm else {}
    return Run(arm, spend, seed, n, shared | trial, flags.held, flags.out, flags.device, flags.threads)


def study(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Seed 1 of all arms and spends, then seed 2, ...; the rows of these runs, as they are set now."""
    tuned = json.loads(TUNED.read_text())
    arms = [arm for arm in flags.arms if arm in tuned]
    if not flags.done and (missing := [arm for arm in flags.arms if arm not in tuned]):
        sys.exit(f"{', '.join(missing)}: no trial is chosen yet, run --tune first")
    runs = [
        run_of(arm, spend, seed, tuned[arm]["trial"], tuned[arm]["settings"], tuned, flags)
        for seed in flags.seeds
        for spend in flags.spend
        for arm in arms
    ]
    if not flags.done:
        work(runs, flags)
    rows = found(flags.rows)
    mine = [rows[key] for key in map(key_of, map(told, runs)) if key in rows]
    keep(mine, flags.out / "corpus.duckdb")
    return mine


def keep(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """These rows alone as metrics of a corpus, also where they were made on another machine."""
    metrics = [
        {"run_id": str(uuid5(NAMESPACE_OID, repr(key_of(row)))), "stage": "equal_spend", "checkpoint": row["arm"],
         "step": row["spend"], "round": row["seed"], "split": split, "set_id": "", "lo": None, "hi": None,
         "name": name, "value": value}
        for row in rows
        if "failed" not in row
        for split, values in equal_spend_table.by_split(row).items()
        for name, value in values.items()
    ]  # fmt: skip
    corpus = Corpus(path)
    with corpus.connect() as con:
        con.execute("DELETE FROM metrics WHERE stage = 'equal_spend'")
        corpus.log_metrics(metrics)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--spend", type=int, nargs="+", default=SPENDS, help="teacher tokens of a run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--held", type=int, default=48, help="held-out prompts; half as many ood and hold-back ones")
    parser.add_argument("--tune", action="store_true", help=f"choose the settings of the arms anew, into {TUNED.name}")
    parser.add_argument("--out", type=Path, default=Path("runs/equal_spend"), help="corpus and finished runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="each job has a corpus of its own: on many cores waiting for the one file takes longer than asking again",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of the teacher's server")
    parser.add_argument(
        "--rows", type=Path, default=RESULTS / "equal_spend_rows.jsonl", help="what is done, a run a line"
    )
    parser.add_argument("--done", action="store_true", help="run nothing: the table of what is done")
    parser.add_argument("--plot", type=Path, help="an SVG of the true KL against teacher tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, not a table")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.tune:
        tune(flags)
        return
    result = equal_spend_table.summary(study(flags), limits())
    if flags.plot:
        equal_spend_table.plot(result, flags.plot)
    print(json.dumps(result, indent=1) if flags.json else equal_spend_table.table(result))


if __name__ == "__main__":
    main()
