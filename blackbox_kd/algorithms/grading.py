"""How a judge grades groups of samples: what it is asked, in which order, and what becomes of its replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blackbox_kd import judging
from blackbox_kd.judging import Criterion, usable_text
from blackbox_kd.prompts import Template
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Prompt, Purpose, Request, Rollout, SamplingParams, scorer


class Group(NamedTuple):
    """What is graded together."""

    rollouts: list[Rollout]
    """Of one prompt."""
    references: list[str]
    """Answers of the teacher."""

    @property
    def prompt(self) -> Prompt:
        """Of all of them."""
        return self.rollouts[0].prompt

    @property
    def texts(self) -> list[str]:
        """As they are shown."""
        return [rollout.completion.text.strip() for rollout in self.rollouts]


class Graded(NamedTuple):
    """A judge's word on a group."""

    rewards: list[float]
    """0 to 1, one for each of its rollouts, in their order."""
    details: list[dict[str, Any]]
    """What each of them rests on."""


class Grader:
    """The whole procedure of one judge: a rubric of its own, an order of its own."""

    def __init__(
        self,
        judge: Teacher,
        templates: Mapping[str, Template],
        sampling: SamplingParams,
        *,
        purpose: Purpose = "judge",
    ) -> None:
        """`templates`: of the `purpose` that grades are asked for, and of `rubric` where they are points of one."""
        self._judge, self._templates, self._sampling, self._purpose = judge, templates, sampling, purpose
        self.scorer = scorer(judge.config.model, judge.context.context_hash)

    async def grade(self, groups: Sequence[Group], round_: int) -> list[Graded | None]:
        """One for each group; None where a reply is missing or cannot be read."""
        rubrics = await self._rubrics(groups, round_)
        asked = [
            self._question(group, rubric) if rubric is not None else None
            for group, rubric in zip(groups, rubrics, strict=True)
        ]
        requests = [request for request in asked if request]
        replies = await self._judge.answers(requests, round_=round_, description="grades")
        return [
            self._read(replies.get(request.request_key), group, rubric) if request and rubric is not None else None
            for group, rubric, request in zip(groups, rubrics, asked, strict=True)
        ]

    async def _rubrics(self, groups: Sequence[Group], round_: int) -> list[list[Criterion] | None]:
        """Of each group's prompt, in any round the same; empty ones where none are used."""
        if "rubric" not in self._templates:
            return [[] for _ in groups]
        asked = [
            self._request(group, "rubric", judging.rubric_format(), references=group.references) for group in groups
        ]
        found = await self._judge.answers(asked, round_=round_, description="rubrics")
        texts = [usable_text(found.get(request.request_key)) for request in asked]
        return [judging.read_rubric(text) if text else None for text in texts]

    def _shown(self, group: Group) -> list[str]:
        return judging.shuffled(group.texts, self.scorer)

    def _question(self, group: Group, rubric: list[Criterion]) -> Request:
        answers = self._shown(group)
        if not rubric:
            form = judging.grades_format(len(answers))
            return self._request(group, self._purpose, form, answers=answers, references=group.references)
        form = judging.verdicts_format(len(answers), len(rubric))
        return self._request(group, self._purpose, form, answers=answers, criteria=[line.criterion for line in rubric])

    def _request(self, group: Group, purpose: Purpose, form: dict[str, Any], **shown: Any) -> Request:
        """Greedy: the same question has one answer, and is asked once."""
        text = self._templates[purpose].render(prompt=judging.conversation(group.prompt.messages), **shown)
        messages = [{"role": "user", "content": text}]
        return self._judge.request(
            group.prompt, purpose, self._sampling, messages=messages, parameters={"response_format": form}
        )

    def _read(self, reply: Completion | None, group: Group, rubric: list[Criterion]) -> Graded | None:
        text = usable_text(reply)
        if reply is None or text is None:
            return None
        answers = self._shown(group)
        read = by_rubric(text, len(answers), rubric) if rubric else by_digits(reply, len(answers))
        if read is None:
            return None
        places = [answers.index(own) for own in group.texts]
        details = [{"place": i + 1, "said": read[i][1], "reply": reply.completion_id} for i in places]
        return Graded([read[i][0] for i in places], details)


Read = list[tuple[float, Any]]
"""For each answer in the order in which it was shown: its reward, and what the judge said."""


def by_rubric(text: str, answers: int, rubric: list[Criterion]) -> Read | None:
    """None where the reply is no verdict on each."""
    rows = judging.read_verdicts(text, answers, len(rubric))
    return [(judging.rubric_reward(rubric, row), row) for row in rows] if rows else None


def by_digits(reply: Completion, answers: int) -> Read | None:
    """The mean of each grade where its alternatives are shown, else the one that is written; None without a grade."""
    written = judging.read_grades(reply.text, answers)
    if written is None:
        return None
    means = judging.expected_grades(reply.logprobs or [], answers) or written
    return [(value / judging.BEST_GRADE, digit) for value, digit in zip(means, written, strict=True)]
