"""`reward`: a judge grades a group of the student's samples, and the student goes where the better ones are.

What it is: ROPD (2605.07396) with a rubric from the teacher's answers, or OVD's grades from 0 to 9 (2601.21968). The
update is the best of n (learnt as an answer, if it is whole and above its group's mean), or the policy gradient of
GRPO (Shao et al. 2024) with advantages within the group.
Needs: chat, and the section `judge`; the teacher itself judges only as `judge: {same_as: teacher}`.
Costs: one rubric a prompt, asked once; one call a group and round, all of its samples in one shuffled list; the
teacher's answers that the rubric rests on are those of `sample`, which come first, else one call each. With
`evaluate.judge`, that judge is asked the same about `unseen_share` of the groups.
Loss: `ce` on the best sample, or `pg` on all.
What it does not do: no reward model is trained, and a reward says nothing of single words. The rubric is written
without the student's samples (ROPD shows them), so that it can be kept over rounds. A group whose reply cannot be read
is dropped, never scored; one whose rewards are all equal teaches nothing. Length is reported, not corrected for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

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
from blackbox_kd.algorithms.grading import Graded, Grader, Group
from blackbox_kd.errors import AlignmentError, ConfigError, TeacherError
from blackbox_kd.hashing import content_id
from blackbox_kd.judging import usable_text
from blackbox_kd.progress import say
from blackbox_kd.prompts import Template
from blackbox_kd.types import Feedback, Rollout, SamplingParams, TrainSample


class RewardConfig(AlgorithmConfig):
    """A judge's grades, as best of n or as a policy gradient."""

    name: Literal["reward"] = "reward"
    grades: Literal["rubric", "digits"] = "rubric"
    """What a reward is made of: points of the criteria that are met, or one grade from 0 to 9."""
    update: Literal["best_of_n", "pg"] = "best_of_n"
    num_generations: int = Field(4, ge=2)
    """Samples for one prompt: a group."""
    references: int = Field(1, ge=0)
    """Answers of the teacher that rubric or grader are shown; those of `sample` cost nothing."""
    rubric_template: str = "prompts/rubric.md.j2"
    """Jinja file of the question for a rubric; it may use {{ prompt }} and {{ references }}."""
    verdicts_template: str = "prompts/verdicts.md.j2"
    """Of the question which criteria are met; it may use {{ prompt }}, {{ answers }} and {{ criteria }}."""
    grades_template: str = "prompts/grades.md.j2"
    """Of the question for grades from 0 to 9; it may use {{ prompt }}, {{ answers }} and {{ references }}."""
    max_completion_length: int = Field(1024, ge=1)
    """Tokens of a judge's reply."""
    top_logprobs: int | None = Field(20, ge=0)
    """Alternatives a token in a reply with digits: a grade is then the mean over the digits by their probability,
    where the endpoint shows them. null: the digit that is written."""
    scale: Literal["none", "group", "batch"] = "none"
    """Update pg: whose deviation divides the advantages (ROPD: none; GRPO: group, which also makes a judge's noise in a
    group of nearly equal samples as large as any difference)."""
    clip: float | None = Field(0.2, gt=0)
    """Update pg: how far from 1 a ratio of probabilities is still pushed."""
    unseen_share: float = Field(0.25, gt=0, le=1)
    """Of the groups, that `evaluate.judge` grades too; at least one."""

    @property
    def learning_rate(self) -> float:
        """The best of n is a text."""
        return 1e-5 if self.update == "best_of_n" else super().learning_rate

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Of the policy gradient."""
        return {"pg": {"clip": self.clip}} if self.update == "pg" else {}

    @property
    def prompts(self) -> Literal["fresh", "sampled"]:
        """The teacher's answers to those of `sample` are paid for."""
        return "sampled" if self.references else "fresh"

    @property
    def rollouts_per_prompt(self) -> int:
        """The group."""
        return self.num_generations

    @property
    def needs_judge(self) -> bool:
        """Yes."""
        return True

    @property
    def calls_per_rollout(self) -> float:
        """Of the judge, in a round of new prompts."""
        return (2 if self.grades == "rubric" else 1) / self.num_generations

    @property
    def reply_tokens(self) -> int:
        """Of the judge."""
        return self.max_completion_length

    def templates(self) -> dict[str, Template]:
        """Those that are used, by purpose."""
        if self.grades == "digits":
            return {"judge": Template(self.grades_template, "onpolicy.algorithm.grades_template")}
        return {
            "rubric": Template(self.rubric_template, "onpolicy.algorithm.rubric_template"),
            "judge": Template(self.verdicts_template, "onpolicy.algorithm.verdicts_template"),
        }

    @property
    def sampling(self) -> SamplingParams:
        """Of the judge. Greedy: the same question has one answer, and is asked once."""
        top = self.top_logprobs if self.grades == "digits" else None
        return SamplingParams(temperature=0.0, max_completion_length=self.max_completion_length, top_logprobs=top)

    def files_hash(self) -> str:
        """Of the templates."""
        return content_id({purpose: template.source for purpose, template in self.templates().items()})

    def build(self, tools: Tools) -> Reward:
        """With its templates read."""
        return Reward(self, tools)


class Reward(Algorithm):
    """See the module."""

    def __init__(self, config: RewardConfig, tools: Tools) -> None:
        """Raises:
        ConfigError: there is no judge, or a template that cannot be read.
        """
        if tools.judge is None:
            raise ConfigError("onpolicy.algorithm reward needs a judge: set judge, or judge: {same_as: teacher}")
        self._config, self._tools = config, tools
        asked = config.templates(), config.sampling
        self._judge = Grader(tools.judge, *asked)
        self._unseen = Grader(tools.unseen, *asked) if tools.unseen else None

    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """A reward for each rollout of a group whose grades can be read."""
        groups, dropped = await self._groups(rollouts, round_)
        judged = zip(groups, await self._judge.grade(groups, round_), strict=True)
        graded = [(group, found) for group, found in judged if found]
        rewards = [found.rewards for _, found in graded]
        feedback = [row for group, found in graded for row in self._rows(self._judge, group, found)]
        metrics: dict[str, float] = {}
        if graded:
            lengths = [[len(rollout.completion_ids) for rollout in group.rollouts] for group, _ in graded]
            metrics = health.of_rewards(rewards, lengths)
            if self._unseen:
                others, agreement = await self._second_opinion(self._unseen, graded, round_)
                feedback, metrics = feedback + others, metrics | agreement
        samples = await self._samples([group.rollouts for group, _ in graded], rewards)
        if graded and not samples:
            say("reward: no group teaches anything: all rewards are equal, or what is better than the mean was cut off")
        return Outcome(
            feedback=feedback,
            samples=samples,
            asked=len(rollouts),
            failed=len(rollouts) - dropped - sum(map(len, rewards)),
            dropped=dropped,
            metrics=metrics,
        )

    async def _groups(self, rollouts: Sequence[Rollout], round_: int) -> tuple[list[Group], int]:
        """Rollouts by prompt, with the teacher's answers; without one that it has not answered.

        And of how many rollouts curation has dropped all answers.
        """
        groups = by_prompt(rollouts)
        if odd := [group for group in groups if len(group) != self._config.num_generations]:
            raise AlignmentError(f"{len(odd[0])} rollouts of a prompt, not {self._config.num_generations}")
        teacher = self._tools.teacher
        asked = [
            [teacher.answer(group[0].prompt, sample_idx=i) for i in range(self._config.references)] for group in groups
        ]
        requests = [request for each in asked for request in each]
        found = await teacher.answers(requests, round_=round_, description="references")
        answered, dropped = list[Group](), 0
        for group, references in zip(groups, asked, strict=True):
            answers = [found.get(request.request_key) for request in references]
            kept = [answer for answer in answers if answer is None or answer.completion_id not in self._tools.dropped]
            usable = list(dict.fromkeys(text for text in map(usable_text, kept) if text))
            if usable or not references:
                answered.append(Group(group, usable))
            elif not kept:
                dropped += len(group)
        return answered, dropped

    async def _second_opinion(
        self, unseen: Grader, graded: list[tuple[Group, Graded]], round_: int
    ) -> tuple[list[Feedback], dict[str, float]]:
        """What the unseen judge says of a part of the groups; nothing is learnt from it.

        Raises:
            TeacherError: nothing that it says can be read, so that nobody would be watching.
        """
        part = graded[: max(1, round(self._config.unseen_share * len(graded)))]
        found = await unseen.grade([group for group, _ in part], round_)
        both = [(group, mine, other) for (group, mine), other in zip(part, found, strict=True) if other]
        if not both:
            raise TeacherError(f"evaluate.judge: none of its grades for {len(part)} groups could be read")
        rows = [row for group, _, other in both for row in self._rows(unseen, group, other)]
        agreement = health.agreement([mine.rewards for _, mine, _ in both], [other.rewards for _, _, other in both])
        return rows, agreement | {"unseen_failed": 1 - len(both) / len(part)}

    def _rows(self, grader: Grader, group: Group, found: Graded) -> list[Feedback]:
        return [
            Feedback(
                completion_id=rollout.completion.completion_id,
                kind=self._config.grades,
                scorer=grader.scorer,
                value=value,
                detail=detail,
            )
            for rollout, value, detail in zip(group.rollouts, *found, strict=True)
        ]

    async def _samples(self, groups: list[list[Rollout]], rewards: list[list[float]]) -> list[TrainSample]:
        differing = [len(set(values)) > 1 for values in rewards]
        if not any(differing):
            return []
        if self._config.update == "best_of_n":
            best = [best_whole(*each) for each in zip(groups, rewards, strict=True)]
            return [self._learnt(rollout) for rollout in best if rollout]
        rows = await self._tools.lane.run(advantages, rewards, self._config.scale)
        return [
            pg_sample(rollout, advantage)
            for group, row, differs in zip(groups, rows, differing, strict=True)
            for rollout, advantage in zip(group, row, strict=True)
            if differs and advantage
        ]

    def _learnt(self, rollout: Rollout) -> TrainSample:
        rendered = self._tools.renderer.join(rollout.prompt_ids, rollout.completion_ids)
        return ce_sample(rollout.completion.completion_id, rendered)


def best_whole(group: list[Rollout], rewards: list[float]) -> Rollout | None:
    """The first with the highest reward of those that were not cut off; None where it is not above the mean."""
    whole = [(r, value) for r, value in zip(group, rewards, strict=True) if r.completion.finish_reason == "stop"]
    best, value = max(whole, key=lambda pair: pair[1], default=(None, 0.0))
    return best if len(set(rewards)) > 1 and value > sum(rewards) / len(rewards) else None
