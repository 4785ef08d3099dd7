"""Stage `onpolicy`: the student writes, the teacher scores or relabels, the student is updated on its own samples.

    blackbox-kd onpolicy --config quickstart --onpolicy.rounds 3

Reads   train prompts, checkpoints/sft.
Writes  rollouts, feedback, metrics, checkpoints/round-N (adapter, optimiser state).
A round commits by renaming its checkpoint folder. A killed round is repeated with the same seeds: its rollouts are
read back from the corpus, and what the teacher said already is not asked again.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec

from blackbox_kd.algorithms.base import Outcome, ce_sample
from blackbox_kd.errors import ConfigError, TeacherError
from blackbox_kd.hashing import phase_seed
from blackbox_kd.model_card import write_card
from blackbox_kd.progress import say
from blackbox_kd.project import Project, stage_main
from blackbox_kd.rollout import Writer
from blackbox_kd.student.render import IGNORE, Rendered
from blackbox_kd.student.student import Student
from blackbox_kd.student.update import Updater
from blackbox_kd.types import Prompt, TrainSample
from blackbox_kd.yardstick import Looks

OPTIMIZER_FILE = "optimizer.pt"


async def run(project: Project) -> dict[str, Any]:
    """All rounds that are not done yet; metrics of each by name."""
    config, run_dir, loop = project.config, project.run_dir, project.config.onpolicy
    names = ["sft", *(f"round-{r}" for r in range(1, loop.rounds + 1))]
    done = 1 + len(list(takewhile(lambda name: run_dir.done(name, project.settings_of(name)), names[1:])))
    if not run_dir.done("sft", project.settings_of("sft")):
        raise ConfigError(f"no {run_dir.checkpoint('sft')}: run `sft` first")
    if done == len(names):
        say(f"onpolicy: all {loop.rounds} rounds are there already")
        return {"rounds": {}}
    start = run_dir.checkpoint(names[done - 1])
    student = Student(config.student, adapter=start)
    state = start / OPTIMIZER_FILE
    updater = Updater(student, loop.update, state if state.exists() else None, loop.algorithm.losses)
    algorithm = loop.algorithm.build(project.teacher, student.renderer)
    looks = Looks(project, student)
    rounds: dict[str, dict[str, float]] = {}
    for round_ in range(done, loop.rounds + 1):
        name = f"round-{round_}"
        writer = Writer(
            student=student,
            sampling=loop.sampling,
            purpose="rollout",
            round=round_,
            seed=phase_seed(config.seed, round_, "rollout"),
            batch_size=loop.rollout_batch_size,
            corpus=project.corpus,
            run_id=project.run_id,
        )
        prompts = draw(project, round_)
        project.corpus.add_prompts(prompts)
        with student.under(None) if loop.algorithm.writer == "base" else nullcontext():
            rollouts = writer.rollouts(prompts)
        outcome = await algorithm.feedback(rollouts, round_)
        project.corpus.add_feedback(outcome.feedback, round_=round_, run_id=project.run_id)
        check(outcome, loop.max_failed_feedback)
        replayed = replay(project, student, len(outcome.feedback), round_)
        samples = fitting([*outcome.samples, *replayed], config.student.max_length)
        samples = referenced(student, samples, run_dir.checkpoint("sft"), loop.rollout_batch_size)
        after_step = partial(looks.after, stage="onpolicy", checkpoint=name, round=round_)
        steps = updater.run(samples, phase_seed(config.seed, round_, "update"), after_step)
        metrics = {
            **outcome.metrics,
            "feedback": len(outcome.feedback),
            "feedback_failed": outcome.failed / max(1, outcome.asked),
            "replayed": len(replayed),
            "rollout_length": sum(len(r.completion_ids) for r in rollouts) / max(1, len(rollouts)),
            "rollout_logprob": sum(map(sum, (r.logprobs for r in rollouts)))
            / max(1, sum(len(r.logprobs) for r in rollouts)),
        }
        with run_dir.committing(name, project.settings_of(name)) as folder:
            student.save(folder)
            updater.save(folder / OPTIMIZER_FILE)
            write_card(
                folder,
                project,
                name,
                f"on-policy `{loop.algorithm.name}`, round {round_}",
                config.student.model,
            )
        project.log("onpolicy", metric_rows(name, round_, metrics, steps))
        student.policy = student.policy_of(run_dir.checkpoint(name))
        rounds[name] = {**metrics, "loss": steps[-1]["loss"]}
        say(f"onpolicy: {name}: {len(rollouts)} rollouts, {len(outcome.feedback)} with feedback, "
            f"{len(replayed)} replayed, "
            f"{len(steps)} steps, loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}")  # fmt: skip
    return {"rounds": rounds}


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
