"""Judges that grade by a function of an answer's text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from blackbox_kd.corpus import Corpus
from blackbox_kd.teachers.base import Transport
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig, scripted
from blackbox_kd.teachers.teacher import Teacher
from tests.conftest import RUN_ID

POINTS = [1, 2, 3, 4]
RUBRIC = json.dumps({"criteria": [{"criterion": f"It has {p}.", "points": p} for p in POINTS]})

Verdict = Callable[[str], Any]
"""An answer -> what is said of it: a list of booleans, or a digit."""


def met(*numbers: int) -> list[bool]:
    """A verdict on the rubric: these of its criteria, by their points."""
    return [p in numbers for p in POINTS]


def shown(text: str) -> list[str]:
    """The answers in a question to a judge, in its order."""
    return re.findall(r"<answer_\d+>\n(.*?)\n</answer_\d+>", text, re.DOTALL)


def is_rubric(text: str) -> bool:
    return text.startswith("Write a rubric")


def says(text: str, verdict: Verdict) -> str:
    """The reply to a question of our templates."""
    if is_rubric(text):
        return RUBRIC
    return json.dumps({f"answer_{i}": verdict(answer) for i, answer in enumerate(shown(text), 1)})


class ScriptedJudge(ScriptedTeacherConfig):
    model: str = "judge"
    script: Any = None

    def connect(self) -> AbstractAsyncContextManager[Transport]:
        return scripted(lambda body: self.script(body["messages"][-1]["content"]))


def judge(corpus: Corpus, script: Callable[[str], str] | None = None, model: str = "judge") -> Teacher:
    """By default longer answers meet more criteria."""
    by_length = script or (lambda text: says(text, lambda answer: [len(answer) % 5 > i for i in range(4)]))
    return Teacher(ScriptedJudge(model=model, script=by_length), corpus, RUN_ID, author="judge")
