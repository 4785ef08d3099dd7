"""The yardstick: answers of the teacher that are captured once, so that each checkpoint is measured without a call.

`teacher_nll`    nats per token of the teacher's own temperature-1 answers under the student, its end token included.
`tail_kl`        nats per token that has a soft label: KL(teacher || student) on the teacher's top-k, everything else
                 in one bucket. With the teacher's own tokenizer it is never above the true forward KL on these
                 answers (data-processing inequality); across tokenizers no bound is claimed.
`coverage`       share of the student's tokens that have a soft label.
`captured_mass`  teacher probability on the student tokens that it was mapped to, mean over labels.
`ambiguous_mass` teacher probability left to the bucket because the student's token cannot be told, likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from blackbox_kd.align import SoftLabels, check_not_shifted
from blackbox_kd.errors import AlignmentError
from blackbox_kd.hashing import content_id
from blackbox_kd.judging import usable_text
from blackbox_kd.progress import say
from blackbox_kd.sections import EvaluateConfig
from blackbox_kd.soft_labels import label, labelled_tokens
from blackbox_kd.student.render import IGNORE
from blackbox_kd.teachers.teacher import Questions
from blackbox_kd.types import Completion, Interval, Prompt, Request, SamplingParams, Split, scorer

if TYPE_CHECKING:  # with torch; `capture` works without it
    from blackbox_kd.project import Project
    from blackbox_kd.student.student import Student, TokenScores

Metrics = dict[Split, dict[str, Interval]]
"""Of a checkpoint."""

FIXED_SPLITS: tuple[Split, ...] = ("heldout", "ood")
DECILES = 10


class FixedAnswer(msgspec.Struct, frozen=True):
    """What the teacher says to one evaluation prompt."""

    prompt: Prompt
    greedy: Completion
    sampled: Completion
    """At temperature 1, with logprobs where the endpoint gives them."""


class FixedSet(msgspec.Struct, frozen=True):
    """Metrics with different `set_id` do not compare."""

    set_id: str
    """Hash of the completion_ids."""
    answers: list[FixedAnswer]


def fixed_sampling(config: EvaluateConfig) -> tuple[SamplingParams, SamplingParams]:
    """At temperature 0, and at 1."""
    length = config.max_completion_length
    greedy = SamplingParams(temperature=0.0, max_completion_length=length)
    return greedy, SamplingParams(temperature=1.0, max_completion_length=length, top_logprobs=config.top_logprobs)


def fixed_questions(
    config: EvaluateConfig, teacher: Questions, prompts: Iterable[Prompt]
) -> Iterator[tuple[Request, Request]]:
    """For each prompt one at temperature 0 and one at 1."""
    greedy, sampled = fixed_sampling(config)
    for prompt in prompts:
        yield teacher.request(prompt, "evaluate", greedy), teacher.request(prompt, "evaluate", sampled)


async def capture(project: Project) -> FixedSet:
    """The teacher's fixed answers; asked for once, from the corpus ever after.

    A prompt without two whole answers (cut off, filtered, rejected) is left out, and said to be.
    """
    prompts = evaluation_prompts(project)
    if not prompts:
        say("there are no heldout or ood prompts: checkpoints cannot be compared on the teacher's answers")
    asked = list(fixed_questions(project.config.evaluate, project.teacher, prompts))
    await project.teacher.ask([request for pair in asked for request in pair], description="capture the fixed set")
    fixed = captured(project)
    if len(fixed.answers) < len(prompts):
        left = len(prompts) - len(fixed.answers)
        say(f"fixed set: {left} of {len(prompts)} prompts without two whole answers are left out")
    return fixed


def captured(project: Project) -> FixedSet:
    """What the corpus holds of the fixed set; asks nobody."""
    prompts = evaluation_prompts(project)
    asked = list(fixed_questions(project.config.evaluate, project.teacher, prompts))
    found = project.corpus.answers([request.request_key for pair in asked for request in pair], logprobs=False)
    answers = []
    for prompt, pair in zip(prompts, asked, strict=True):
        one, two = (next(iter(found.get(request.request_key, ())), None) for request in pair)
        if one and two and usable_text(one) and usable_text(two):
            answers.append(FixedAnswer(prompt, one, two))
    ids = sorted(c.completion_id for a in answers for c in (a.greedy, a.sampled))
    return FixedSet(content_id(ids), answers)


def evaluation_prompts(project: Project) -> list[Prompt]:
    """Those that the teacher answers once."""
    return [prompt for split in FIXED_SPLITS for prompt in project.prompts[split]]


class Yardstick:
    """A fixed set in the tokens of a student; all checkpoints of a run share it."""

    def __init__(self, project: Project, student: Student, fixed: FixedSet) -> None:
        """Raises:
        AlignmentError: soft labels that are not about the tokens beside them.
        """
        self.set_id, self._config = fixed.set_id, project.config.evaluate
        self._splits = [answer.prompt.split for answer in fixed.answers]
        texts = [answer.sampled.text.strip() for answer in fixed.answers]
        self._rows = [
            student.renderer.render(answer.prompt.messages, text)
            for answer, text in zip(fixed.answers, texts, strict=True)
        ]
        config, context = project.config.teacher, project.teacher.context
        ids = [answer.sampled.completion_id for answer in fixed.answers]
        self._soft = label(
            project.corpus,
            student.renderer,
            config.model,
            scorer(config.model, context.context_hash),
            list(zip(ids, texts, strict=True)),
        )
        targets = [[i for i in row.labels if i != IGNORE] for row in self._rows]
        labelled = [(each, ids) for each, ids in zip(self._soft.labels, targets, strict=True) if each is not None]
        check_not_shifted([each for each, _ in labelled], [ids for _, ids in labelled])
        self._deciles = [_deciles(*each) for each in zip(self._soft.labels, targets, strict=True)]
        self.bound = self._soft.same
        """Whether `tail_kl` is a lower bound of the true KL."""

    def measure(self, student: Student) -> Metrics:
        """Metrics of each split that has answers, see the module; `tail_kl_decile_N` only where a token falls in it."""
        scores = student.score(self._rows, self._soft.labels, batch_size=self._config.batch_size)
        found = {}
        for split in FIXED_SPLITS:
            if mine := [i for i, s in enumerate(self._splits) if s == split]:
                found[split] = self._metrics(mine, [scores[i] for i in mine])
        return found

    def rows(self, student: Student, **where: Any) -> list[dict[str, Any]]:
        """The same as metric rows, for a look in the middle of a training."""
        return [
            {**where, "split": split, "set_id": self.set_id, "name": name, **msgspec.to_builtins(value)}
            for split, metrics in self.measure(student).items()
            for name, value in metrics.items()
        ]

    def _metrics(self, mine: list[int], scores: Sequence[TokenScores]) -> dict[str, Interval]:
        draws = self._config.bootstrap_samples
        found = {
            "teacher_nll": interval(
                [-float(each.logprobs.sum()) for each in scores], draws, weights=[len(each.logprobs) for each in scores]
            )
        }
        counts = [labelled_tokens(self._soft.labels[i]) for i in mine]
        if not sum(counts):
            return found
        found["tail_kl"] = interval([float(np.nansum(each.tail_kl)) for each in scores], draws, weights=counts)
        found["coverage"] = interval(counts, draws, weights=[len(each.tail_kl) for each in scores])
        for name, field in (("captured_mass", "mapped"), ("ambiguous_mass", "ambiguous")):
            masses = [getattr(self._soft.labels[i], field, 0.0) * n for i, n in zip(mine, counts, strict=True)]
            found[name] = interval(masses, draws, weights=counts)
        for d in range(DECILES):
            inside = [self._deciles[i] == d for i in mine]
            if any(each.any() for each in inside):
                sums = [float(s.tail_kl[each].sum()) for s, each in zip(scores, inside, strict=True)]
                found[f"tail_kl_decile_{d}"] = interval(sums, draws, weights=[int(each.sum()) for each in inside])
        return found


class Looks:
    """Looks at the fixed set in the middle of a training, every `evaluate.every_steps` optimiser steps.

    They change nothing: no draw, no gradient, and the model goes on in the mode that it was in.
    """

    def __init__(self, project: Project, student: Student, report: Callable[[int, dict[str, float]], None]) -> None:
        """`report` is told a step and the values by name.

        Raises:
            AlignmentError: see `Yardstick`.
        """
        self._project, self._student, self._report = project, student, report
        self._every = project.config.evaluate.every_steps or 0
        fixed = captured(project) if self._every else None
        self._yardstick = Yardstick(project, student, fixed) if fixed and fixed.answers else None
        if fixed and not fixed.answers:
            say("evaluate.every_steps: no look in between, the corpus has no fixed set yet (`evaluate` captures it)")

    def after(self, step: int, stage: str, **where: Any) -> None:
        """Metric rows of `stage`, if it is time."""
        if self._yardstick and step % self._every == 0:
            rows = self._yardstick.rows(self._student, step=step, **where)
            self._project.log(stage, rows)
            self._report(step, {f"eval_{row['split']}_{row['name']}": row["value"] for row in rows})


def _deciles(soft: SoftLabels | None, targets: Sequence[int]) -> np.ndarray:
    """(S,) 0 to 9: the decile of the teacher's probability of the token that stands there; -1 without a label.

    A loss can fall while the KL on the tokens that the teacher thought unlikely explodes: hence apart.
    """
    if soft is None:
        return np.full(len(targets), -1)
    p = np.where(soft.ids == np.array(targets)[:, None], np.exp(soft.logprobs), 0.0).max(1)
    decile = np.minimum((p * DECILES).astype(int), DECILES - 1)
    return np.where((soft.logprobs > -np.inf).any(1), decile, -1)


def interval(sums: Sequence[float], samples: int, *, weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """sum(sums) / sum(weights) with its percentile-bootstrap 95% interval over rows (Efron 1979).

    Without weights it is the mean. The same rows give the same interval.

    Raises:
        AlignmentError: as many weights as rows are needed, at least one row, and weights that are not all zero.
    """
    over = np.ones(len(sums)) if weights is None else np.asarray(weights, dtype=float)
    if len(sums) == 0 or len(over) != len(sums) or not over.any():
        raise AlignmentError(f"{len(sums)} rows with {len(over)} weights have no mean")
    values = np.asarray(sums, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    totals, counts = values[draws].sum(1), over[draws].sum(1)
    means = totals[counts > 0] / counts[counts > 0]  # a draw may hold only rows that count for nothing
    lo, hi = np.percentile(means, [2.5, 97.5])
    return Interval(value=float(values.sum() / over.sum()), lo=float(lo), hi=float(hi))
