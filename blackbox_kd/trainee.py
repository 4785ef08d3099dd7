"""The student's side of the on-policy loop: it writes a round, and is updated on what was said of one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from blackbox_kd import health
from blackbox_kd.algorithms.base import Outcome
from blackbox_kd.hashing import phase_seed
from blackbox_kd.model_card import write_card
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.replay import Replay, losses
from blackbox_kd.rollout import Writer
from blackbox_kd.settings import Config
from blackbox_kd.student.ranks import Ranks
from blackbox_kd.student.render import IGNORE, Rendered
from blackbox_kd.student.reporting import Report
from blackbox_kd.student.student import Student
from blackbox_kd.student.update import Updater
from blackbox_kd.types import Prompt, Rollout, TrainSample
from blackbox_kd.yardstick import Looks

OPTIMIZER_FILE = "optimizer.pt"


def checkpoints(project: Project) -> list[str]:
    """Names by round; round 0 is `sft`."""
    return ["sft", *(f"round-{r}" for r in range(1, project.config.onpolicy.rounds + 1))]


def updater_of(config: Config, student: Student, start: Path, ranks: Ranks) -> Updater:
    """As the checkpoint `start` left it."""
    state, loop = start / OPTIMIZER_FILE, config.onpolicy
    return Updater(student, loop.update, state if state.exists() else None, losses(config.sft, loop.algorithm), ranks)


class Trainee:
    """The student's side of the loop; all of it runs in the lane."""

    def __init__(self, project: Project, student: Student, start: Path, ranks: Ranks) -> None:
        """`start` is the checkpoint that the student has."""
        self.project, self.student, self.loop = project, student, project.config.onpolicy
        self.done = checkpoints(project).index(start.name)
        self.ranks, self.updater = ranks, updater_of(project.config, student, start, ranks)
        self.replay = Replay(project, student.renderer)
        self.report = Report(project.config.report_to, project.config.run_dir, "onpolicy", student.model)
        self.looks = Looks(project, student, lambda _, values: self.report.log(self.updater.steps, values))

    def write(self, round_: int) -> list[Rollout]:
        """The rollouts of a round, by the policy of `max_staleness` rounds before the one that they could have had.

        After a restart that is no longer the policy that the student has: then its checkpoint writes.
        """
        project, student, loop = self.project, self.student, self.loop
        wrote = max(0, round_ - 1 - loop.max_staleness)
        policy = None if loop.algorithm.writer == "base" else project.run_dir.checkpoint(checkpoints(project)[wrote])
        writer = Writer(
            student=student,
            sampling=loop.sampling,
            purpose="rollout",
            round=round_,
            seed=phase_seed(project.config.seed, round_, "rollout"),
            batch_size=loop.rollout_batch_size,
            corpus=project.corpus,
            run_id=project.run_id,
            server=loop.vllm,
            adapter=policy,
        )
        prompts = draw(project, round_)
        project.corpus.add_prompts(prompts)
        with student.under(policy) if policy is None or wrote != self.done else nullcontext():
            return writer.rollouts(prompts, n=loop.algorithm.rollouts_per_prompt)

    def update(self, round_: int, rollouts: list[Rollout], outcome: Outcome) -> dict[str, float]:
        """Train on a round's samples and commit it; its metrics."""
        project, student, loop, name = self.project, self.student, self.loop, checkpoints(self.project)[round_]
        seed, run_dir = project.config.seed, project.run_dir
        learnt = fitting(outcome.samples, project.config.student.max_length)
        replayed = self.replay.draw(len({s.pair_id or s.sample_id for s in learnt}), round_)
        samples = referenced(student, [*learnt, *replayed], run_dir.checkpoint("sft"), loop.rollout_batch_size)
        metrics = {
            **health.of_rollouts(rollouts),
            "feedback": len({said.completion_id for said in outcome.feedback}),
            "feedback_failed": outcome.failed / max(1, outcome.asked),
            "dropped_answers": outcome.dropped / max(1, outcome.asked),
            "replayed": len(replayed),
            "staleness": min(loop.max_staleness, round_ - 1),
            "kl_to_start": kl_to(run_dir.checkpoint("sft"), student, rollouts, loop.rollout_batch_size),
        }
        after_step = partial(self.looks.after, stage="onpolicy", checkpoint=name, round=round_)
        task = samples, phase_seed(seed, round_, "update")
        self.ranks.share(task)
        steps = self.updater.run(*task, after_step)
        for step, values in enumerate(steps, self.updater.steps - len(steps) + 1):
            self.report.log(step, values)
        self.report.log(self.updater.steps, {**outcome.metrics, **metrics})
        with run_dir.committing(name, project.settings_of(name)) as folder:
            student.save(folder)
            self.updater.save(folder / OPTIMIZER_FILE)
            for file, content in outcome.state.items():
                (folder / file).write_bytes(content)
            how = f"on-policy `{loop.algorithm.name}`, round {round_}, {len(steps)} optimiser steps"
            data = {
                "rollouts": len(rollouts),
                "samples made of feedback": len(outcome.samples),
                "teacher answers replayed": len(replayed),
            }
            write_card(folder, project, name, how, data, [sample.sample_id for sample in samples])
            project.log("onpolicy", metric_rows(name, round_, metrics, steps))  # a kill behind it repeats the same rows
        student.policy, self.done = student.policy_of(run_dir.checkpoint(name)), round_
        began, ended = health.ends([step["loss"] for step in steps])
        say(f"onpolicy: {name}: {len(rollouts)} rollouts, {metrics['feedback']} with feedback, "
            f"{len(replayed)} replayed, "
            f"{len(steps)} steps, loss {began:.3f} -> {ended:.3f}")  # fmt: skip
        return {**outcome.metrics, **metrics, "loss": ended}


def kl_to(start: Path, student: Student, rollouts: Sequence[Rollout], batch_size: int) -> float:
    """KL of the policy that wrote the rollouts to the checkpoint `start`, nats a token on its own samples.

    Mean of `exp(d) - 1 - d` with d = log p_start - log p (k3, http://joschu.net/blog/kl-approx.html).
    """
    rows = [student.renderer.join(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]
    with student.under(start):
        scores = student.logprobs(rows, batch_size=batch_size)
    return health.kl([r.logprobs for r in rollouts], scores)


def draw(project: Project, round_: int) -> list[Prompt]:
    """The prompts of a round, in a seeded order: first those that the algorithm wants, then the others, then again."""
    sampled = {prompt.prompt_id for prompt in project.sampled_prompts}
    rng = random.Random(phase_seed(project.config.seed, 0, "prompts"))
    order = list(project.prompts["train"])
    rng.shuffle(order)
    wanted = project.config.onpolicy.algorithm.prompts == "sampled"
    order.sort(key=lambda prompt: (prompt.prompt_id in sampled) != wanted)
    size = min(project.config.onpolicy.prompts_per_round, len(order))
    return [order[i % len(order)] for i in range((round_ - 1) * size, round_ * size)]


def referenced(student: Student, samples: list[TrainSample], reference: Path, batch_size: int) -> list[TrainSample]:
    """Samples of pairs get the log-probs `ref` of their tokens under the checkpoint that the stage started from.

    Never under the base with the adapter off: that has not learnt the task.
    """
    mine = [i for i, sample in enumerate(samples) if any(sample.weights.get("pair", ()))]
    if not mine:
        return samples
    rows = [Rendered(s.input_ids, [t if w else IGNORE for t, w in zip(s.input_ids, s.weights["pair"], strict=True)])
            for s in (samples[i] for i in mine)]  # fmt: skip
    with student.under(reference):
        scores = student.logprobs(rows, batch_size=batch_size)
    found = list(samples)
    for i, row, values in zip(mine, rows, scores, strict=True):
        following = iter(values)
        ref = [0.0 if label == IGNORE else next(following) for label in row.labels]
        found[i] = msgspec.structs.replace(samples[i], logprobs={**samples[i].logprobs, "ref": ref})
    return found


def fitting(samples: list[TrainSample], max_length: int) -> list[TrainSample]:
    """Those that are not longer than `student.max_length`; the others are counted."""
    long = {s.pair_id or s.sample_id for s in samples if len(s.input_ids) > max_length}
    kept = [s for s in samples if (s.pair_id or s.sample_id) not in long]  # a pair goes as a whole
    if len(kept) < len(samples):
        say(f"{len(samples) - len(kept)} samples are longer than student.max_length; they are left out")
    return kept


def metric_rows(
    name: str, round_: int, metrics: dict[str, float], steps: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    """A round's metrics, and those of each optimiser step."""
    rows = [{"name": key, "value": value} for key, value in metrics.items()]
    for step, values in enumerate(steps, 1):
        rows += [{"name": key, "value": value, "step": step} for key, value in values.items()]
    return [{"checkpoint": name, "round": round_, **row} for row in rows]
