"""`gad`: a discriminator learns to tell the teacher's text from the student's; how far a sample fools it is its reward.

What it is: GAD (2511.10643). Each round the discriminator D is trained on (teacher's answer over student's sample) by
the Bradley-Terry loss, then the student by group-relative policy gradient with reward D(x, y), as in GRPO.
Needs: chat. Costs: nothing for prompts that `sample` has answered, which come first; one call for each other prompt.
Loss: `pg`, advantages (r - mean) / std within the samples of a prompt.

A discriminator that cheats, or knows nothing, is worse than none. Against shortcuts both texts are rendered by the
student's chat template, with whitespace at line ends gone and an end token behind, also where a sample was cut off;
texts are scored one at a time, so order tells nothing. Its accuracy is that on prompts it never learns from, and also
on those of their pairs that are about equally long. `discriminator_alarm` is 1, with a line that says so,
- where the accuracy is not above one half by its standard error, and at least by .05. Its rewards would be noise: the
  round is a warm-up round as in the paper, in which the student learns the teacher's answers by `ce`;
- where it was above .95 for three rounds: it has found a shortcut, or the student is far away. The round goes on, as
  the order within a group may still be right; look at `reward_length_correlation` and the length-matched accuracy.

What it does not do: no KL penalty (`kl_to_start` is logged, `replay` holds the student back), no critic a token, no
teacher's answer in the group. Rewards of different rounds are not comparable: each is another discriminator's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import UUID

from pydantic import Field

from blackbox_kd import health
from blackbox_kd.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    Outcome,
    Tools,
    advantages,
    by_prompt,
    ce_sample,
    pg_sample,
)
from blackbox_kd.hashing import content_id, phase_seed
from blackbox_kd.judging import usable_text
from blackbox_kd.progress import say
from blackbox_kd.sections import DiscriminatorConfig
from blackbox_kd.types import Completion, Feedback, Rollout, TrainSample, scorer

if TYPE_CHECKING:
    from blackbox_kd.student.discriminator import Discriminator

STATE_FILE, HISTORY_FILE = "discriminator.pt", "discriminator.json"

SURE, SURE_ROUNDS = 0.95, 3
"""An accuracy above this in so many rounds on end is an alarm."""

ALIKE = 0.2
"""Two lengths are about equal where they differ by no more than this share of the longer one."""


class GadConfig(AlgorithmConfig):
    """A discriminator's score as reward."""

    name: Literal["gad"] = "gad"
    num_generations: int = Field(8, ge=2)
    """Samples for each prompt; a reward counts relative to the others of its prompt."""
    clip: float | None = Field(0.2, gt=0)
    """How far from 1 a ratio of probabilities is still pushed (PPO); null: never clipped."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Of the policy gradient."""
        return {"pg": {"clip": self.clip}}

    @property
    def prompts(self) -> Literal["fresh", "sampled"]:
        """The teacher's answers to these are paid for."""
        return "sampled"

    @property
    def rollouts_per_prompt(self) -> int:
        """A group."""
        return self.num_generations

    @property
    def calls_per_rollout(self) -> float:
        """At most: prompts that `sample` has answered cost none."""
        return 1.0 / self.num_generations

    @property
    def reply_tokens(self) -> None:
        """As by `sample`."""
        return None

    def build(self, tools: Tools) -> Gad:
        """The discriminator is loaded with the first round's feedback."""
        return Gad(self, tools)


class Group(NamedTuple):
    """A prompt with the teacher's answer and the student's samples."""

    answer: Completion
    text: str
    """The answer as it is trained on."""
    rollouts: list[Rollout]
    heldout: bool


class Judged(NamedTuple):
    """A group with D of its texts, and how long each is in the student's tokens."""

    group: Group
    teacher: float
    rewards: list[float]
    teacher_length: int
    lengths: list[int]
    same: list[bool]
    """Where a sample is the teacher's answer: no pair, since nobody could tell them apart."""


class Gad(Algorithm):
    """See the module."""

    def __init__(self, config: GadConfig, tools: Tools) -> None:
        self._config, self._tools = config, tools
        self._discriminator: Discriminator | None = None
        self._state: bytes | None = None
        self._accuracies: list[float | None] = []
        """Of all rounds so far, None where there was nothing to measure it on."""

    def restore(self, checkpoint: Path) -> None:
        """Discriminator, optimiser and the history of accuracies; `sft` has none of them."""
        if (checkpoint / STATE_FILE).exists():
            self._state = (checkpoint / STATE_FILE).read_bytes()
            self._accuracies = json.loads((checkpoint / HISTORY_FILE).read_text("utf-8"))

    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """One reward for each rollout whose prompt has a whole answer of the teacher."""
        groups, dropped = await self._groups(rollouts, round_)
        judged, metrics = await self._tools.lane.run(self._judge, groups, round_)
        alarm = self._alarm(judged, round_)
        told = sum(len(group.rollouts) for group in groups)
        return Outcome(
            feedback=[f for each in judged for f in self._said(each)],
            samples=self._warm_up(groups) if alarm == "chance" else await self._advantages(judged),
            asked=len(rollouts),
            failed=len(rollouts) - told - dropped,
            dropped=dropped,
            metrics={**metrics, **of_discriminator(judged), "discriminator_alarm": float(alarm is not None)},
            state={STATE_FILE: self._state or b"", HISTORY_FILE: json.dumps(self._accuracies).encode()},
        )

    async def _groups(self, rollouts: Sequence[Rollout], round_: int) -> tuple[list[Group], int]:
        """Those with an answer to learn; and how many rollouts have one that curation dropped."""
        teacher, found = self._tools.teacher, by_prompt([rollout for rollout in rollouts if rollout.completion_ids])
        requests = [teacher.answer(group[0].prompt) for group in found]
        answers = await teacher.answers(requests, round_=round_, description="gad")
        groups, dropped = list[Group](), 0
        for request, group in zip(requests, found, strict=True):
            answer = answers.get(request.request_key)
            text = usable_text(answer)
            if answer is not None and answer.completion_id in self._tools.dropped:
                dropped += len(group)
            elif answer is not None and text is not None and self._fits(group[0], text):
                heldout = UUID(group[0].prompt.prompt_id).int / 2**128 < self._config.discriminator.heldout_fraction
                groups.append(Group(answer, text, group, heldout))
        return groups, dropped

    def _fits(self, rollout: Rollout, text: str) -> bool:
        return len(self._rendered(rollout, text)) <= self._tools.student.max_length

    def _rendered(self, rollout: Rollout, text: str) -> list[int]:
        return [*rollout.prompt_ids, *self._tools.renderer.completion(tidy(text))]

    def _judge(self, groups: list[Group], round_: int) -> tuple[list[Judged], dict[str, float]]:
        """Refresh the discriminator, then score; in the lane."""
        from blackbox_kd.student.discriminator import Discriminator, Pair

        config, tools = self._config.discriminator, self._tools
        if self._discriminator is None:
            start = phase_seed(tools.seed, 0, "discriminator")
            self._discriminator = Discriminator(config, tools.student, tools.renderer, seed=start, state=self._state)
        teacher = [self._rendered(group.rollouts[0], group.text) for group in groups]
        student = [[self._rendered(r, r.completion.text) for r in group.rollouts] for group in groups]
        pairs = [Pair(t, s) for group, t, texts in zip(groups, teacher, student, strict=True)
                 if not group.heldout for s in texts if s != t]  # fmt: skip
        metrics = {}
        if pairs:
            steps = config.steps if self._accuracies else config.warmup_steps
            seed = phase_seed(tools.seed, round_, "discriminator")
            metrics["discriminator_loss"] = self._discriminator.train(pairs, steps=steps, seed=seed)
        self._state = self._discriminator.state()
        scores = iter(self._discriminator.score([*teacher, *(text for texts in student for text in texts)]))
        of_teacher = [next(scores) for _ in teacher]
        judged = [
            Judged(group, d, [next(scores) for _ in texts], len(t), [len(s) for s in texts], [s == t for s in texts])
            for group, d, t, texts in zip(groups, of_teacher, teacher, student, strict=True)
        ]
        return judged, metrics

    def _alarm(self, judged: Sequence[Judged], round_: int) -> Literal["chance", "sure"] | None:
        heldout = [each for each in judged if each.group.heldout]
        found = accuracy(heldout)
        self._accuracies.append(found)
        seen = "unknown" if found is None else f"{found:.2f}"
        where = f"gad: round {round_}: held-out accuracy {seen} on {len(heldout)} prompts:"
        if at_chance(found, len(heldout)):
            say(
                f"warning: {where} the discriminator may be guessing, so the student learns the teacher's answers; "
                "raise its warmup_steps or prompts_per_round, or stop here: the student may write as the teacher does"
            )
            return "chance"
        recent = self._accuracies[-SURE_ROUNDS:]
        if len(recent) == SURE_ROUNDS and all(a is not None and a > SURE for a in recent):
            say(
                f"warning: {where} above {SURE} for {SURE_ROUNDS} rounds; the discriminator may live on a shortcut "
                "(length, format), or the student is too far from the teacher: see its length-matched accuracy"
            )
            return "sure"
        return None

    def _warm_up(self, groups: Sequence[Group]) -> list[TrainSample]:
        renderer = self._tools.renderer
        return [
            ce_sample(g.answer.completion_id, renderer.join(g.rollouts[0].prompt_ids, renderer.completion(g.text)))
            for g in groups
        ]

    async def _advantages(self, judged: Sequence[Judged]) -> list[TrainSample]:
        rows = await self._tools.lane.run(advantages, [each.rewards for each in judged], "group")
        return [
            pg_sample(rollout, advantage)
            for each, row in zip(judged, rows, strict=True)
            for rollout, advantage in zip(each.group.rollouts, row, strict=True)
            if advantage
        ]

    def _said(self, judged: Judged) -> list[Feedback]:
        config = self._config.discriminator
        by = scorer(config.model or self._tools.student.model, content_id(config.model_dump(mode="json")))
        return [
            Feedback(completion_id=rollout.completion.completion_id, kind="discriminator", scorer=by, value=reward)
            for rollout, reward in zip(judged.group.rollouts, judged.rewards, strict=True)
        ]


def tidy(text: str) -> str:
    """Without blanks around it and at its line ends: teachers and students differ in them, and mean nothing by it."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def accuracy(judged: Sequence[Judged], *, alike: bool = False) -> float | None:
    """Share of pairs in which the teacher's text has the higher score, a tie counted half; None where there are none.

    `alike`: of those that are about equally long.
    """
    won = [
        1.0 if each.teacher > reward else 0.5 if each.teacher == reward else 0.0
        for each in judged
        for reward, length, same in zip(each.rewards, each.lengths, each.same, strict=True)
        if not same and (not alike or abs(length - each.teacher_length) <= ALIKE * max(length, each.teacher_length))
    ]
    return sum(won) / len(won) if won else None


def at_chance(found: float | None, prompts: int) -> bool:
    """Whether an accuracy can be a coin's. Pairs of one prompt share the teacher's text, so prompts are counted."""
    return found is None or found < 0.5 + max(0.05, 0.5 / math.sqrt(prompts))


def of_discriminator(judged: Sequence[Judged]) -> dict[str, float]:
    """What is worth a look in each round; an accuracy that there are no pairs for is left out."""
    heldout, learnt = ([each for each in judged if each.group.heldout is side] for side in (True, False))
    found = {
        "discriminator_accuracy": accuracy(heldout),
        "discriminator_accuracy_alike": accuracy(heldout, alike=True),
        "discriminator_train_accuracy": accuracy(learnt),
        "discriminator_heldout": float(len(heldout)),
    }
    if judged:
        found |= health.of_rewards([each.rewards for each in judged], [each.lengths for each in judged])
        found["reward_teacher"] = sum(each.teacher for each in judged) / len(judged)
        same = [value for each in judged for value in each.same]
        found["equal_answers"] = sum(same) / len(same)
    return {name: value for name, value in found.items() if value is not None}
