"""Stage `onpolicy`: the student writes, the teacher scores or relabels, the student is updated on its own samples.

    blackbox-kd onpolicy --config quickstart --onpolicy.rounds 3

Reads   train prompts, checkpoints/sft.
Writes  rollouts, feedback, metrics, checkpoints/round-N (adapter, optimiser state, what the algorithm goes on from).

Teacher and student take turns, or work at the same time with `max_staleness: 1`: while the teacher looks at round r,
the student is updated on round r-1 and writes round r+1.

    student   write 1  write 2  ...........  update 1  write 3  .........  update 2  write 4
    teacher            feedback 1 .........  feedback 2 ................  feedback 3

A round commits by renaming its checkpoint folder. A killed round is repeated with the same seeds: its rollouts are
read back from the corpus, and what the teacher said already is not asked again.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec

from blackbox_kd import health
from blackbox_kd.algorithms.base import Algorithm, Outcome, Tools, ce_sample
from blackbox_kd.errors import ConfigError, GateFailed, TeacherError, TeacherRefused
from blackbox_kd.hashing import phase_seed
from blackbox_kd.lane import Lane
from blackbox_kd.model_card import write_card
from blackbox_kd.progress import say
from blackbox_kd.project import Project, stage_main
from blackbox_kd.rollout import Writer
from blackbox_kd.student.render import IGNORE, Rendered
from blackbox_kd.student.student import Student
from blackbox_kd.student.update import Updater
from blackbox_kd.types import Prompt, Rollout, TrainSample
from blackbox_kd.yardstick import Looks

OPTIMIZER_FILE = "optimizer.pt"


async def run(project: Project) -> dict[str, Any]:
    """All rounds that are not done yet; metrics of each by name."""
    config, run_dir, loop = project.config, project.run_dir, project.config.onpolicy
    names = checkpoints(project)
    done = len(list(takewhile(lambda name: run_dir.done(name, project.settings_of(name)), names)))
    if not done:
        raise ConfigError(f"no {run_dir.checkpoint('sft')}: run `sft` first")
    if done == len(names):
        say(f"onpolicy: all {loop.rounds} rounds are there already")
        return {"rounds": {}}
    if lacking := loop.algorithm.lacking(project.teacher.capabilities):
        raise TeacherRefused(f"onpolicy.algorithm {loop.algorithm.name}: {lacking}")
    start, lane = run_dir.checkpoint(names[done - 1]), Lane()
    student = Student(config.student, adapter=start)
    tools = Tools(project.teacher, student.renderer, config.student, lane, project.judge, project.unseen)
    algorithm = loop.algorithm.build(tools)
    algorithm.restore(start)
    trainee = Trainee(project, student, start)
    told: dict[int, asyncio.Task[Told]] = {}
    found: dict[str, dict[str, float]] = {}
    try:
        for round_ in range(done, len(names)):
            for ahead in range(round_, min(round_ + loop.max_staleness, loop.rounds) + 1):
                if ahead not in told:
                    rollouts = await lane.run(trainee.write, ahead)
                    told[ahead] = asyncio.create_task(ask(project, algorithm, rollouts, ahead, told.get(ahead - 1)))
            found[names[round_]] = await lane.run(trainee.update, round_, *await told.pop(round_))
    finally:
        for task in told.values():
            task.cancel()
        await asyncio.gather(*told.values(), return_exceptions=True)
    return {"rounds": found}


Told = tuple[list[Rollout], Outcome]


async def ask(
    project: Project, algorithm: Algorithm, rollouts: list[Rollout], round_: int, before: asyncio.Task[Told] | None
) -> Told:
    """The teacher's word on a round, when the round before it is through."""
    if before:
        await asyncio.wait([before])
        before.result()
    outcome = await algorithm.feedback(rollouts, round_)
    project.corpus.add_feedback(outcome.feedback, round_=round_, run_id=project.run_id)
    check(outcome, project.config.onpolicy.max_failed_feedback)
    # Before the update: a round that a gate stops is to be looked at, too, and the next round may be asked by then.
    project.log("onpolicy", metric_rows(checkpoints(project)[round_], round_, outcome.metrics, []))
    check_judges(project, round_)
    return rollouts, outcome


def checkpoints(project: Project) -> list[str]:
    """Names by round; round 0 is `sft`."""
    return ["sft", *(f"round-{r}" for r in range(1, project.config.onpolicy.rounds + 1))]


class Trainee:
    """The student's side of the loop; all of it runs in the lane."""

    def __init__(self, project: Project, student: Student, start: Path) -> None:
        """`start` is the checkpoint that the student has."""
        self.project, self.student, self.loop = project, student, project.config.onpolicy
        self.done = checkpoints(project).index(start.name)
        state = start / OPTIMIZER_FILE
        losses = self.loop.algorithm.losses
        self.updater = Updater(student, self.loop.update, state if state.exists() else None, losses)
        self.looks = Looks(project, student)

    def write(self, round_: int) -> list[Rollout]:
        """The rollouts of a round, by the policy of `max_staleness` rounds before the one that they could have had.

        After a restart that is no longer the policy that the student has: then its checkpoint writes.
        """
        project, student, loop = self.project, self.student, self.loop
        writer = Writer(
            student=student,
            sampling=loop.sampling,
            purpose="rollout",
            round=round_,
            seed=phase_seed(project.config.seed, round_, "rollout"),
            batch_size=loop.rollout_batch_size,
            corpus=project.corpus,
            run_id=project.run_id,
        )
        prompts = draw(project, round_)
        project.corpus.add_prompts(prompts)
        wrote = max(0, round_ - 1 - loop.max_staleness)
        policy = None if loop.algorithm.writer == "base" else project.run_dir.checkpoint(checkpoints(project)[wrote])
        with student.under(policy) if policy is None or wrote != self.done else nullcontext():
            return writer.rollouts(prompts, n=loop.algorithm.rollouts_per_prompt)

    def update(self, round_: int, rollouts: list[Rollout], outcome: Outcome) -> dict[str, float]:
        """Train on a round's samples and commit it; its metrics."""
        project, student, loop, name = self.project, self.student, self.loop, checkpoints(self.project)[round_]
        seed, run_dir = project.config.seed, project.run_dir
        replayed = replay(
            project, student, len({sample.pair_id or sample.sample_id for sample in outcome.samples}), round_
        )
        samples = fitting([*outcome.samples, *replayed], project.config.student.max_length)
        samples = referenced(student, samples, run_dir.checkpoint("sft"), loop.rollout_batch_size)
        metrics = {
            **health.of_rollouts(rollouts),
            "feedback": len(outcome.feedback),
            "feedback_failed": outcome.failed / max(1, outcome.asked),
            "replayed": len(replayed),
            "staleness": min(loop.max_staleness, round_ - 1),
            "kl_to_start": kl_to(run_dir.checkpoint("sft"), student, rollouts, loop.rollout_batch_size),
        }
        after_step = partial(self.looks.after, stage="onpolicy", checkpoint=name, round=round_)
        steps = self.updater.run(samples, phase_seed(seed, round_, "update"), after_step)
        with run_dir.committing(name, project.settings_of(name)) as folder:
            student.save(folder)
            self.updater.save(folder / OPTIMIZER_FILE)
            for file, content in outcome.state.items():
                (folder / file).write_bytes(content)
            write_card(
                folder, project, name, f"on-policy `{loop.algorithm.name}`, round {round_}", student.config.model
            )
        project.log("onpolicy", metric_rows(name, round_, metrics, steps))
        student.policy, self.done = student.policy_of(run_dir.checkpoint(name)), round_
        say(f"onpolicy: {name}: {len(rollouts)} rollouts, {len(outcome.feedback)} with feedback, "
            f"{len(replayed)} replayed, "
            f"{len(steps)} steps, loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}")  # fmt: skip
        return {**outcome.metrics, **metrics, "loss": steps[-1]["loss"]}


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


def check(outcome: Outcome, limit: float) -> None:
    """Stop where too little of the feedback can be used.

    Raises:
        TeacherError: the share of failures is above the limit.
    """
    if outcome.failed > limit * outcome.asked:
        raise TeacherError(
            f"{outcome.failed} of {outcome.asked} replies could not be used (missing, empty or cut off), the limit is "
            f"{limit:.0%}; look at `select text, finish_reason from completions`, or raise max_completion_length"
        )


def check_judges(project: Project, round_: int) -> None:
    """Stop where the judge likes the student better and better, and another one, whom it never learnt from, does not.

    Raises:
        GateFailed: they part further than the limit, see `health.divergence`.
    """
    names = ("judge_reward", "unseen_reward")
    rounds = project.corpus.metrics_by_round(project.run_id, "onpolicy", names)
    judged = [(found[names[0]], found[names[1]]) for r, found in sorted(rounds.items())
              if r <= round_ and len(found) == len(names)]  # fmt: skip
    limit = project.config.onpolicy.max_judge_divergence
    if rounds.get(round_) and (apart := health.divergence(judged)) > limit:
        raise GateFailed(
            f"round {round_}: the judge's mean reward rose to {judged[-1][0]:.3f} while that of evaluate.judge fell by "
            f"{apart:.3f} to {judged[-1][1]:.3f}, the limit is {limit:g} (onpolicy.max_judge_divergence): the student "
            "learns to please the judge; use an earlier round"
        )


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


def replay(project: Project, student: Student, targets: int, round_: int) -> list[TrainSample]:
    """Teacher rows of the sequence-level stage, so many that they are the share `replay` of the update."""
    share = project.config.onpolicy.replay
    wanted = round(targets * share / (1 - share))
    rows = project.training_rows()
    rng = random.Random(phase_seed(project.config.seed, round_, "replay"))
    chosen = rng.sample(rows, min(wanted, len(rows)))
    if len(chosen) < wanted:
        say(f"replay: only {len(chosen)} teacher rows for {wanted} places")
    return [
        ce_sample(completion_id, student.renderer.render(prompt.messages, text))
        for prompt, completion_id, text in chosen
    ]


def metric_rows(
    name: str, round_: int, metrics: dict[str, float], steps: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    """A round's metrics, and those of each optimiser step."""
    rows = [{"name": key, "value": value} for key, value in metrics.items()]
    for step, values in enumerate(steps, 1):
        rows += [{"name": key, "value": value, "step": step} for key, value in values.items()]
    return [{"checkpoint": name, "round": round_, **row} for row in rows]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("onpolicy", __doc__, run, argv)


if __name__ == "__main__":
    sys.exit(main())
