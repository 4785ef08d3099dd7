"""The same question and answer again, nearly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from blackbox_kd.curation.answer import Answer
from blackbox_kd.hashing import content_id
from blackbox_kd.near import NearIndex, jaccard, may_have_twins, normalised, shingles

SHORT = 16
"""Word pairs. A shorter answer is the same to many questions, so it is a duplicate under an equal prompt only."""
ANSWERS = 0xFFFFFFFF
"""Tells the shingles of an answer from those of a prompt."""


def duplicates(answers: Sequence[Answer], threshold: float) -> Iterator[tuple[Answer, str]]:
    """Answers with an earlier twin, and which that is. `answers` are in the order of their prompts.

    Draws of one prompt are no twins: how often the teacher says a thing is what they are drawn for.
    """
    seen = _Seen(answers, threshold)
    for _, draws in groupby(range(len(answers)), key=lambda place: answers[place].prompt.prompt_id):
        twins = {place: seen.twin(place) for place in draws}
        for place, twin in twins.items():
            if twin:
                yield answers[place], twin
            else:
                seen.add(place)


class _Seen:
    """Answers that stay, by what they say and by what they nearly say."""

    def __init__(self, answers: Sequence[Answer], threshold: float) -> None:
        self._answers, self._threshold = answers, threshold
        self._parts = [_shingles(answer, threshold) for answer in answers]
        self._candidates = may_have_twins(self._parts, threshold)
        self._index = NearIndex(threshold) if any(self._candidates) else None
        self._equal: dict[str, Answer] = {}

    def add(self, place: int) -> None:
        """One that has no twin."""
        self._equal.setdefault(_key(self._answers[place]), self._answers[place])
        if self._index and self._candidates[place]:
            self._index.add(place, self._parts[place].tolist())

    def twin(self, place: int) -> str:
        """The first that it is near to in prompt and answer; '' without one."""
        answer = self._answers[place]
        if same := self._equal.get(_key(answer)):
            return f"of {same.completion_id}, the same"
        if self._index and self._candidates[place]:
            for other, _ in self._index.near(self._parts[place].tolist()):
                twin = self._answers[other]
                parts = ((answer.asked, twin.asked), (answer.text, twin.text))
                least = min(jaccard(shingles(one), shingles(two)) for one, two in parts)
                if least >= self._threshold:
                    return f"of {twin.completion_id}, Jaccard {least:.2f}"
        return ""


def _key(answer: Answer) -> str:
    return content_id([normalised(answer.asked), normalised(answer.text)])


def _shingles(answer: Answer, threshold: float) -> np.ndarray:
    """Those of prompt and answer in one: where both are near, this is. None where only an equal one is a twin."""
    own = shingles(answer.text)
    if len(own) < SHORT or threshold == 1:
        return np.empty(0, np.int64)
    return np.array(sorted(shingles(answer.asked) | {each ^ ANSWERS for each in own}), np.int64)
