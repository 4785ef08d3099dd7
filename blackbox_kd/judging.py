"""What a teacher or judge is asked about a student's text, and how its reply is read. Pure.

A judge sees all of a prompt's answers at once, numbered in a shuffled order, and replies with one JSON object that has
a key for each. A reply that lacks an answer, has one too many or a value of another kind is None, never a score.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from blackbox_kd.hashing import content_id
from blackbox_kd.prompts import PrivateContext, Template
from blackbox_kd.types import Completion, Message, Rollout, TokenLogprob

MOST_POINTS = 5
"""Of a criterion; the least is 1 (ROPD, 2605.07396)."""
FEWEST_CRITERIA, MOST_CRITERIA = 4, 12
"""Of a rubric (ibid.)."""
BEST_GRADE = 9
"""Of a grade without a rubric; the worst is 0 (OVD, 2601.21968)."""

_POINTS = {"answer_1": 1.0, "answer_2": 0.0, "tie": 0.5}
"""Of the answer that is shown first."""

T = TypeVar("T")


class RewritePrompt:
    """Shows the draft and asks for a corrected version, under the teacher's own private rules."""

    def __init__(self, system: str | None, template: str, examples: str | None, where: str) -> None:
        """`system` is the teacher's own template; `examples` show rewrites, already rendered."""
        self._template = Template(template, f"{where}.template")
        self.context = PrivateContext(system, examples, where)
        self.content_hash = content_id([self._template.source, self.context.context_hash])
        """Of the files, not of their names."""

    def messages(self, rollout: Rollout) -> list[Message]:
        """The conversation with its last question replaced by question and draft."""
        *earlier, _ = rollout.prompt.messages
        text = self._template.render(prompt=rollout.prompt.text, draft=rollout.completion.text)
        return [*earlier, {"role": "user", "content": text}]


def usable_text(completion: Completion | None) -> str | None:
    """The text of a whole, non-empty answer; None for one that is missing, empty, cut off or filtered."""
    if completion is None or completion.finish_reason != "stop":
        return None
    return completion.text.strip() or None


class Criterion(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a rubric: it is met, or not."""

    criterion: Annotated[str, msgspec.Meta(min_length=1)]
    points: Annotated[int, msgspec.Meta(ge=1, le=MOST_POINTS)]


class _Rubric(msgspec.Struct, frozen=True):
    criteria: Annotated[list[Criterion], msgspec.Meta(min_length=FEWEST_CRITERIA, max_length=MOST_CRITERIA)]


def conversation(messages: Sequence[Message]) -> str:
    """A prompt as one text: a lone question as it is, else each message behind its role."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def shuffled(texts: Sequence[str], salt: str) -> list[str]:
    """The different ones among `texts` in an order that depends on them and `salt` alone: asked again, it is the same.

    Equal texts are shown, and graded, once.
    """
    found = sorted(set(texts))
    random.Random(content_id([salt, found])).shuffle(found)
    return found


def rubric_format() -> dict[str, Any]:
    """`response_format` of a rubric (https://platform.openai.com/docs/guides/structured-outputs)."""
    points = {"type": "integer", "enum": list(range(1, MOST_POINTS + 1))}
    line = _object({"criterion": {"type": "string"}, "points": points})
    lines = {"type": "array", "items": line, "minItems": FEWEST_CRITERIA, "maxItems": MOST_CRITERIA}
    return _format("rubric", _object({"criteria": lines}))


def verdicts_format(answers: int, criteria: int) -> dict[str, Any]:
    """`response_format` of a verdict on each of so many criteria for each of so many answers."""
    row = {"type": "array", "items": {"type": "boolean"}, "minItems": criteria, "maxItems": criteria}
    return _format("verdicts", _object(dict.fromkeys(_keys(answers), row)))


def grades_format(answers: int) -> dict[str, Any]:
    """`response_format` of a grade for each of so many answers."""
    grade = {"type": "integer", "enum": list(range(BEST_GRADE + 1))}
    return _format("grades", _object(dict.fromkeys(_keys(answers), grade)))


def better_format() -> dict[str, Any]:
    """`response_format` of which of two answers is better."""
    return _format("better", _object({"better": {"type": "string", "enum": list(_POINTS)}}))


def read_better(text: str) -> float | None:
    """Of the answer that was shown first: 1 where it is the better one, 0 where the other is, 0.5 for a tie; None where
    the reply is no such verdict.
    """
    found = _read(text, dict[str, str])
    return _POINTS.get(found["better"]) if found is not None and found.keys() == {"better"} else None


def read_rubric(text: str) -> list[Criterion] | None:
    """The criteria; None where they are not 4 to 12 with 1 to 5 points each."""
    rubric = _read(text, _Rubric)
    return rubric.criteria if rubric else None


def read_verdicts(text: str, answers: int, criteria: int) -> list[list[bool]] | None:
    """For each answer as shown, whether it meets each criterion; None where one is missing or too many."""
    rows = _in_order(_read(text, dict[str, list[bool]]), answers)
    return rows if rows and all(len(row) == criteria for row in rows) else None


def read_grades(text: str, answers: int) -> list[int] | None:
    """For each answer as shown, 0 to 9; None where one is missing or too many."""
    return _in_order(_read(text, dict[str, Annotated[int, msgspec.Meta(ge=0, le=BEST_GRADE)]]), answers)


def expected_grades(tokens: Sequence[TokenLogprob], answers: int) -> list[float] | None:
    """`sum_d d p(d) / sum_d p(d)` over the digits that are shown as alternatives where each grade is written (OVD).

    None where a grade is not a token of its own, or no digit is shown for it.
    """
    text = "".join(token.token for token in tokens)
    starts = {match[1]: match.start(2) for match in re.finditer(r'"(answer_\d+)"\s*:\s*(\d)', text)}
    places, at = dict[int, TokenLogprob](), 0
    for token in tokens:
        places[at + len(token.token) - len(token.token.lstrip())] = token
        at += len(token.token)
    found = [_expected(places.get(starts.get(key, -1))) for key in _keys(answers)]
    return None if None in found else [value for value in found if value is not None]


def rubric_reward(rubric: Sequence[Criterion], met: Sequence[bool]) -> float:
    """`sum_j w_j v_j / sum_j w_j`, 0 to 1 (ROPD)."""
    points = [line.points for line in rubric]
    return sum(p for p, v in zip(points, met, strict=True) if v) / sum(points)


def _expected(token: TokenLogprob | None) -> float | None:
    """None where no digit is to be seen."""
    if token is None or not re.fullmatch(r"\d", token.token.strip()):
        return None
    shown = {top.token: math.exp(top.logprob) for top in (token, *token.top_logprobs)}
    # a digit may be several tokens, with blanks in front of it and without
    mass = [(int(text), p) for text, p in shown.items() if re.fullmatch("[0-9]", text.strip())]
    total = sum(p for _, p in mass)
    return sum(digit * p for digit, p in mass) / total if total else None


def _keys(answers: int) -> list[str]:
    return [f"answer_{i}" for i in range(1, answers + 1)]


def _in_order(found: dict[str, T] | None, answers: int) -> list[T] | None:
    keys = _keys(answers)
    return [found[key] for key in keys] if found is not None and found.keys() == set(keys) else None


def _read(text: str, kind: type[T]) -> T | None:
    """The JSON object in a reply, whatever stands around it; None where it is not of this kind."""
    start, end = text.find("{"), text.rfind("}")
    try:
        return msgspec.convert(json.loads(text[start : end + 1], object_pairs_hook=_once), kind)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}
