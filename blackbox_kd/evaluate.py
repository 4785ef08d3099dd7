"""Stage `evaluate`: every checkpoint on the same fixed answers of the teacher, which are captured once.

    blackbox-kd evaluate --config quickstart --json

Reads   heldout, ood and holdback prompts, checkpoints/*.
Writes  the fixed set, the student's answers, metrics, summary.json.
`teacher_nll`: nats per token of the teacher's own temperature-1 answers under the student (lower is better).
`chrf`, `exact`: the student's greedy answer against the teacher's greedy answer (on holdback: against the base
model's). `length`: tokens of the student's greedy answer. All with a bootstrap 95% interval over prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from blackbox_kd.config import EvaluateConfig
from blackbox_kd.errors import AlignmentError
from blackbox_kd.hashing import content_id
from blackbox_kd.judging import usable_text
from blackbox_kd.progress import say
from blackbox_kd.project import Project, stage_main
from blackbox_kd.run_dir import round_of
from blackbox_kd.teachers.teacher import Questions
from blackbox_kd.types import Completion, Interval, Prompt, Request, SamplingParams, Split

FIXED_SPLITS: tuple[Split, ...] = ("heldout", "ood")
HOLDBACK: Split = "holdback"


class FixedAnswer(msgspec.Struct, frozen=True):
    """What the teacher says to one evaluation prompt."""

    prompt: Prompt
    greedy: Completion
    sampled: Completion
    """At temperature 1, with logprobs where the endpoint gives them."""


class FixedSet(msgspec.Struct, frozen=True):
    """The yardstick. Metrics with different `set_id` do not compare."""

    set_id: str
    """Hash of the completion_ids."""
    answers: list[FixedAnswer]


def fixed_questions(
    config: EvaluateConfig, teacher: Questions, prompts: Iterable[Prompt]
) -> Iterator[tuple[Request, Request]]:
    """For each prompt one at temperature 0 and one at 1."""
    length = config.max_completion_length
    greedy = SamplingParams(temperature=0.0, max_completion_length=length)
    sampled = SamplingParams(temperature=1.0, max_completion_length=length, top_logprobs=config.top_logprobs)
    for prompt in prompts:
        yield teacher.request(prompt, "evaluate", greedy), teacher.request(prompt, "evaluate", sampled)


async def capture(project: Project) -> FixedSet:
    """The teacher's fixed answers; asked for once, from the corpus ever after.

    A prompt without two whole answers (cut off, filtered, rejected) is left out, and said to be.
    """
    prompts = [prompt for split in FIXED_SPLITS for prompt in project.prompts[split]]
    if not prompts:
        say("there are no heldout or ood prompts: checkpoints cannot be compared on the teacher's answers")
    asked = list(fixed_questions(project.config.evaluate, project.teacher, prompts))
    requests = [request for pair in asked for request in pair]
    found = await project.teacher.answers(requests, description="capture the fixed set")
    answers = []
    for prompt, (first, second) in zip(prompts, asked, strict=True):
        one, two = found.get(first.request_key), found.get(second.request_key)
        if one and two and usable_text(one) and usable_text(two):
            answers.append(FixedAnswer(prompt, one, two))
    if len(answers) < len(prompts):
        say(
            f"fixed set: {len(prompts) - len(answers)} of {len(prompts)} prompts without two whole answers are left out"
        )
    ids = sorted(c.completion_id for a in answers for c in (a.greedy, a.sampled))
    return FixedSet(content_id(ids), answers)


async def run(project: Project) -> dict[str, Any]:
    """summary.json, as described in the README."""
    fixed = await capture(project)
    reference: dict[str, str] = {}
    checkpoints: list[dict[str, Any]] = []
    for name in ["base", *project.run_dir.checkpoints()]:
        for split, metrics in _evaluate(project, name, fixed, reference).items():
            shown = {key: msgspec.to_builtins(value) for key, value in metrics.items()}
            checkpoints.append({"name": name, "split": split, "metrics": shown})
            where = {"checkpoint": name, "round": max(0, round_of(name)), "split": split, "set_id": fixed.set_id}
            project.log("evaluate", [{**where, "name": key, **values} for key, values in shown.items()])
    summary = {
        "checkpoints": checkpoints,
        "spend": project.corpus.spend(project.run_id),
        "set_id": fixed.set_id,
        "seed": project.config.seed,
        "run_id": project.run_id,
    }
    project.run_dir.write_summary(summary)
    return summary


def _evaluate(
    project: Project, name: str, fixed: FixedSet, reference: dict[str, str]
) -> dict[str, dict[str, Interval]]:
    """Metrics of one checkpoint by split. `reference` collects the base model's holdback answers on its first call."""
    # torch is imported here, so that `capture` works without it
    from blackbox_kd.rollout import Writer
    from blackbox_kd.student.student import Student

    config = project.config.evaluate
    adapter = None if name == "base" else project.run_dir.checkpoint(name)
    student = Student(project.config.student, adapter=adapter)
    say(f"evaluate: {name}")
    targets = {a.prompt.prompt_id: a.greedy.text.strip() for a in fixed.answers}
    prompts = [a.prompt for a in fixed.answers] + project.prompts[HOLDBACK]
    writer = Writer(
        student=student,
        sampling=SamplingParams(temperature=0.0, max_completion_length=config.max_completion_length),
        purpose="evaluate",
        round=max(0, round_of(name)),
        seed=0,
        batch_size=config.batch_size,
        corpus=project.corpus,
        run_id=project.run_id,
    )
    answers = writer.answers(prompts)
    if name == "base":
        reference |= {p.prompt_id: c.text.strip() for p, c in answers if p.split == HOLDBACK}
    targets |= reference
    rows = [student.renderer.render(a.prompt.messages, a.sampled.text.strip()) for a in fixed.answers]
    logprobs = student.logprobs(rows, batch_size=config.batch_size)
    found: dict[str, dict[str, Interval]] = {}
    for split in (*FIXED_SPLITS, HOLDBACK):
        written = [(c, targets[p.prompt_id]) for p, c in answers if p.split == split]
        if not written:
            continue
        pairs = [(c.text.strip(), target) for c, target in written]
        values = {
            "chrf": interval([chrf(*pair) for pair in pairs], config.bootstrap_samples),
            "exact": interval([float(ours == theirs) for ours, theirs in pairs], config.bootstrap_samples),
            "length": interval([float(c.usage.completion_tokens) for c, _ in written], config.bootstrap_samples),
        }
        scored = [tokens for a, tokens in zip(fixed.answers, logprobs, strict=True) if a.prompt.split == split]
        if scored:
            sums, counts = [-sum(tokens) for tokens in scored], [float(len(tokens)) for tokens in scored]
            values = {"teacher_nll": interval(sums, config.bootstrap_samples, weights=counts), **values}
        found[split] = values
    return found


def chrf(hypothesis: str, reference: str) -> float:
    """chrF2 of one answer, 0 to 100 (Popovic 2015)."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(hypothesis, [reference]).score)


def interval(sums: Sequence[float], samples: int, *, weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """sum(sums) / sum(weights) with its percentile-bootstrap 95% interval over rows (Efron 1979).

    Without weights it is the mean. The same rows give the same interval.

    Raises:
        AlignmentError: as many weights as rows are needed, and at least one row.
    """
    over = np.ones(len(sums)) if weights is None else np.asarray(weights)
    if len(sums) == 0 or len(over) != len(sums):
        raise AlignmentError(f"{len(sums)} rows with {len(over)} weights have no mean")
    values = np.asarray(sums)
    draws = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    means = values[draws].sum(1) / over[draws].sum(1)
    lo, hi = np.percentile(means, [2.5, 97.5])
    return Interval(value=float(values.sum() / over.sum()), lo=float(lo), hi=float(hi))


def table(summary: dict[str, Any], split: Split) -> list[str]:
    """One line a checkpoint, `value [lo, hi]` for each metric of a split."""
    rows = [c for c in summary["checkpoints"] if c["split"] == split]
    names = list(rows[0]["metrics"]) if rows else []
    lines = [f"{split:<10}" + "".join(f"{name:>26}" for name in names)] if rows else []
    for row in rows:
        cells = [f"{m['value']:.3g} [{m['lo']:.3g}, {m['hi']:.3g}]" for m in (row["metrics"][n] for n in names)]
        lines.append(f"  {row['name']:<8}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def show(project: Project, summary: dict[str, Any]) -> None:
    """All splits as tables."""
    for split in (*FIXED_SPLITS, HOLDBACK):
        for line in table(summary, split):
            print(line)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("evaluate", __doc__, run, argv, show=show)


if __name__ == "__main__":
    sys.exit(main())
