"""The best of several answers to a prompt, as a judge grades them: the only rule of curation that asks anybody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from blackbox_kd.algorithms.grading import Grader, Group
from blackbox_kd.curation import Answer
from blackbox_kd.errors import TeacherError
from blackbox_kd.progress import say
from blackbox_kd.prompts import Template
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Rollout, SamplingParams

SAMPLING = SamplingParams(temperature=0.0, max_completion_length=1024, top_logprobs=20)
"""Of the judge; where it shows alternatives, a grade is the mean over the digits."""


async def best_of_n(judge: Teacher, template: Template, answers: Sequence[Answer]) -> list[tuple[Answer, str]]:
    """Those that are not the best of their prompt, and why; of equally good ones the first draw stays.

    Where a reply cannot be read, all of the prompt's answers stay. `answers` are in the order of prompts and draws.

    Raises:
        TeacherError: none of the replies could be read.
    """
    groups = [list(draws) for _, draws in groupby(answers, key=lambda answer: answer.prompt.prompt_id)]
    several = [group for group in groups if len({answer.text for answer in group}) > 1]
    grader = Grader(judge, {"best_of_n": template}, SAMPLING, purpose="best_of_n")
    graded = await grader.grade([Group([_rollout(answer) for answer in group], []) for group in several], 0)
    found = {id(group): said.rewards for group, said in zip(several, graded, strict=True) if said}
    if several and not found:
        raise TeacherError(f"curate.best_of_n: none of the judge's {len(several)} replies could be read")
    if unread := len(several) - len(found):
        say(f"curate: the judge's grades of {unread} of {len(several)} prompts could not be read; their answers stay")
    return [each for group in groups for each in _others(group, found.get(id(group)))]


def _others(group: list[Answer], grades: list[float] | None) -> Iterator[tuple[Answer, str]]:
    if grades is None and len({answer.text for answer in group}) > 1:
        return
    grades = grades or [1.0] * len(group)
    best = grades.index(max(grades))
    for place, (answer, grade) in enumerate(zip(group, grades, strict=True)):
        if place != best:
            why = "the same text" if answer.text == group[best].text else f"grade {grade:.2f}, not {grades[best]:.2f}"
            yield answer, f"{why}; best is {group[best].completion_id}"


def _rollout(answer: Answer) -> Rollout:
    """As a judge is shown it: what it is in tokens does not matter."""
    return Rollout(prompt=answer.prompt, completion=answer.completion, prompt_ids=[], completion_ids=[], logprobs=[])
