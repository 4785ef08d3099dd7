"""What an on-policy algorithm is: it turns rollouts into train samples, and knows nothing of the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from blackbox_kd.align import SoftLabels
from blackbox_kd.errors import AlignmentError, TeacherError
from blackbox_kd.lane import Lane
from blackbox_kd.sections import Section, SoftLossConfig, StudentConfig
from blackbox_kd.student.render import IGNORE, Rendered, Renderer
from blackbox_kd.teachers.base import Capabilities
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Feedback, Rollout, TopK, TrainSample


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a round of feedback gave."""

    feedback: list[Feedback]
    """Rows for the corpus."""
    samples: list[TrainSample]
    asked: int
    """Rollouts that feedback was asked for."""
    failed: int
    """Of those, how many got none that can be used; they are dropped, never scored as zero."""
    dropped: int = 0
    """Of those, how many have an answer of the teacher that curation keeps out of training; no failure."""
    metrics: dict[str, float] = {}
    """What is worth a look in each round."""
    state: dict[str, bytes] = {}
    """Files that the next round's feedback starts from; they are kept with the round's checkpoint."""

    def check(self, limit: float) -> None:
        """Stop where too little of the feedback can be used.

        Raises:
            TeacherError: the share of failures is above the limit.
        """
        if self.failed > limit * self.asked:
            raise TeacherError(
                f"{self.failed} of {self.asked} replies could not be used (missing, empty or cut off), the limit is "
                f"{limit:.0%}; look at `select text, finish_reason from completions`, or raise max_completion_length"
            )


class Tools(NamedTuple):
    """What an algorithm may work with."""

    teacher: Teacher
    renderer: Renderer
    student: StudentConfig
    lane: Lane
    """Where torch computes; an algorithm that does it elsewhere disturbs the update beside it."""
    seed: int
    """The project's; see `hashing.phase_seed`."""
    judge: Teacher | None = None
    """Who grades; never the teacher by accident."""
    unseen: Teacher | None = None
    """Another one, whose grades are looked at and not learnt."""
    soft: SoftLossConfig | None = None
    """How `sft` learns the alternatives of the teacher's own answers; None: by their text alone."""
    dropped: frozenset[str] = frozenset()
    """completion_ids that curation keeps out of training."""


class Algorithm(ABC):
    """One round: rollouts in, train samples out. Rounds are asked about in order, one at a time."""

    def restore(self, checkpoint: Path) -> None:
        """Go on from the `Outcome.state` that lies in the last committed checkpoint; files may be missing in `sft`."""
        return

    @abstractmethod
    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """Ask about the rollouts and make samples of the replies, in an order that repeats: that of the rollouts.

        Raises:
            TeacherError: the endpoint is gone or refuses.
        """


class AlgorithmConfig(Section):
    """An algorithm's part of the YAML; its defaults are the vetted setting."""

    name: str
    """The one that `onpolicy.algorithm.name` chooses by; a Literal in each algorithm."""

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Options of the loss components that it gives weights to, by name (`student.components`)."""
        return {}

    @property
    def writer(self) -> Literal["student", "base"]:
        """Who writes the rollouts: the student as it is, or the base model that it started from."""
        return "student"

    @property
    def prompts(self) -> Literal["fresh", "sampled"]:
        """Which train prompts come first: those that `sample` did not use, or those that the teacher has answered."""
        return "fresh"

    @property
    def rollouts_per_prompt(self) -> int:
        """Samples of the student for one prompt in a round: a group, of which each member has its `draw`."""
        return 1

    @property
    def needs_judge(self) -> bool:
        """Whether it cannot do without the section `judge`."""
        return False

    @property
    def learning_rate(self) -> float:
        """Of the update, where the config names none.

        By the trials in docs/equal_spend.md a safe one: at three times as much some of those that learn a distribution
        come a little nearer to the teacher, and others go far away from it. A text is one out of many that the teacher
        might have written, and takes a tenth.
        """
        return 1e-4

    def resolve(
        self, rounds: int, prompts: int, unanswered: int, left: Callable[[], int | None]
    ) -> tuple[AlgorithmConfig, str]:
        """The algorithm that is meant, and why: itself, but for `auto`.

        `prompts` are those of one round; `unanswered` those of all rounds that `sample` does not ask about; `left()`
        the calls that the budget leaves for all rounds, None where it sets no limit.
        """
        return self, ""

    def lacking(self, can: Capabilities) -> str | None:
        """What the endpoint would have to be able to do, and cannot; None where nothing is lacking."""
        return None

    @property
    def calls_per_rollout(self) -> float:
        """Questions to the teacher for one rollout, on average."""
        raise NotImplementedError

    def calls_for(self, can: Capabilities, length: int) -> float:
        """The same as calls to this endpoint, for a rollout of so many tokens: what `plan` counts with."""
        return self.calls_per_rollout

    @property
    def reply_tokens(self) -> int | None:
        """The most that the teacher may write in one reply; None: it is asked as by `sample`, once a prompt."""
        raise NotImplementedError

    def files_hash(self) -> str | None:
        """Hash of the files that the algorithm reads, so that an edit is not taken for the same experiment."""
        return None

    def build(self, tools: Tools) -> Algorithm:
        """The algorithm, its files read and checked."""
        raise NotImplementedError


def ce_sample(
    sample_id: str, rendered: Rendered, labels: SoftLabels | None = None, soft: SoftLossConfig | None = None
) -> TrainSample:
    """Learn the supervised tokens, each with weight 1: as the text says, or by its soft label where it has one.

    `soft.alpha` of the weight of a labelled token is left to its text; under `tail: renormalise` a label of one
    candidate says nothing, and is none (as in `student.trainer`).

    Raises:
        AlignmentError: another number of `labels` than of supervised tokens.
    """
    alpha, least = (soft.alpha, 2 if soft.tail == "renormalise" else 1) if soft else (0.0, 1)
    learnt = np.array([label != IGNORE for label in rendered.labels])
    size = int(learnt.sum())
    has_label = np.zeros(size, bool) if labels is None else np.isfinite(labels.logprobs).sum(axis=1) >= least
    if len(has_label) != size:
        raise AlignmentError(f"{len(has_label)} soft labels for {size} supervised tokens")
    hard, kl = np.zeros(len(learnt)), np.zeros(len(learnt))
    hard[learnt], kl[learnt] = np.where(has_label, alpha, 1.0), np.where(has_label, 1 - alpha, 0.0)
    weights = {name: stream.tolist() for name, stream in (("ce", hard), ("topk_kl", kl)) if stream.any()}
    taught = TopK(labels.ids[has_label], labels.logprobs[has_label]) if labels is not None and kl.any() else None
    return TrainSample(
        sample_id=sample_id, input_ids=rendered.input_ids, weights=weights or {"ce": hard.tolist()}, soft=taught
    )


def on_completion(prompt_ids: list[int], values: Sequence[float] | float, size: int) -> list[float]:
    """A stream over prompt and completion: 0 on the prompt, then one value for each of `size` completion tokens."""
    inside = [float(values)] * size if isinstance(values, int | float) else list(values)
    if len(inside) != size:
        raise AlignmentError(f"{len(inside)} values for {size} completion tokens")
    return [*[0.0] * len(prompt_ids), *inside]


def advantages(rewards: list[list[float]], scale: Literal["none", "group", "batch"]) -> list[list[float]]:
    """See `losses.group_advantages`."""
    from blackbox_kd.losses import group_advantages

    found: list[list[float]] = group_advantages(rewards, scale=scale).tolist()
    return found


def by_prompt(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The groups, in the order of their first members."""
    found: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt.prompt_id, []).append(rollout)
    return list(found.values())


def soft_sample(rollout: Rollout, at: Sequence[bool], soft: TopK) -> TrainSample:
    """Its own tokens, with what the teacher would have written where `at` says so."""
    return TrainSample(
        sample_id=rollout.completion.completion_id,
        input_ids=[*rollout.prompt_ids, *rollout.completion_ids],
        weights={"topk_kl": on_completion(rollout.prompt_ids, list(map(float, at)), len(rollout.completion_ids))},
        soft=soft,
    )


def pg_sample(rollout: Rollout, advantage: Sequence[float] | float) -> TrainSample:
    """Its tokens with their advantage, one for all or one for each, and the log-probs of the policy that drew them."""
    size = len(rollout.completion_ids)
    return TrainSample(
        sample_id=rollout.completion.completion_id,
        input_ids=[*rollout.prompt_ids, *rollout.completion_ids],
        weights={"pg": on_completion(rollout.prompt_ids, advantage, size)},
        logprobs={"old": on_completion(rollout.prompt_ids, rollout.logprobs, size)},
    )
