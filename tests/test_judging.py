"""What the teacher is asked about a student's text, and which replies can be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.errors import ConfigError
from blackbox_kd.judging import (
    Criterion,
    RewritePrompt,
    conversation,
    expected_grades,
    grades_format,
    read_grades,
    read_rubric,
    read_verdicts,
    rubric_format,
    rubric_reward,
    shuffled,
    usable_text,
    verdicts_format,
)
from blackbox_kd.types import Completion, Message, Prompt, Rollout, TokenLogprob, TopLogprob

WriteJsonl = Callable[[str, list[dict[str, Any]]], Path]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def rollout(draft: str, *earlier: Message, asks: str = "Say 1") -> Rollout:
    prompt = Prompt(messages=[*earlier, user(asks)], split="train", source="test")
    completion = Completion(
        request_key="k", prompt_id=prompt.prompt_id, author="student", model="s", text=draft, finish_reason="stop"
    )
    return Rollout(prompt=prompt, completion=completion, prompt_ids=[1], completion_ids=[2], logprobs=[-1.0])


def written(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


@pytest.fixture
def template(tmp_path: Path) -> str:
    return written(tmp_path / "rewrite.md.j2", "Asked: {{ prompt }}\nDraft: {{ draft }}\nCorrect it.\n")


def test_the_last_question_is_replaced_by_question_and_draft(template: str) -> None:
    made = RewritePrompt(None, template, None, "x").messages(rollout("Won <1> & {{ two }}"))
    assert made == [user("Asked: Say 1\nDraft: Won <1> & {{ two }}\nCorrect it.")]


def test_earlier_turns_stay_as_they_are(template: str) -> None:
    earlier = [{"role": "system", "content": "Be kind"}, user("Hi"), {"role": "assistant", "content": "Hello"}]
    made = RewritePrompt(None, template, None, "x").messages(rollout("one", *earlier))
    assert made[:-1] == earlier
    assert made[-1]["content"].startswith("Asked: Say 1\n")


def test_an_empty_draft_can_be_asked_about(template: str) -> None:
    assert RewritePrompt(None, template, None, "x").messages(rollout("")) == [
        user("Asked: Say 1\nDraft: \nCorrect it.")
    ]


def test_the_private_context_stands_before_the_rewrite(template: str, tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    system = written(tmp_path / "system.md.j2", "Secret rules. {{ system }}")
    shown = [user("Asked: a\nDraft: b"), {"role": "assistant", "content": "c"}]
    examples = write_jsonl("examples.jsonl", [{"messages": shown}])
    rewrite = RewritePrompt(system, template, str(examples), "x")
    asked = rewrite.context.wrap(rewrite.messages(rollout("one", {"role": "system", "content": "Be kind"})))
    assert asked[0] == {"role": "system", "content": "Secret rules. Be kind"}
    assert asked[1:3] == shown
    assert asked[3]["content"].startswith("Asked: Say 1\nDraft: one")
    assert len(asked) == 4


def test_other_examples_are_another_context(template: str, write_jsonl: WriteJsonl) -> None:
    def context_hash(text: str) -> str:
        examples = write_jsonl("examples.jsonl", [{"messages": [user(text), {"role": "assistant", "content": "c"}]}])
        return RewritePrompt(None, template, str(examples), "x").context.context_hash

    assert context_hash("a") == context_hash("a")
    assert context_hash("a") != context_hash("b")


def test_a_template_that_wants_something_else_says_what_there_is(tmp_path: Path) -> None:
    path = written(tmp_path / "wrong.j2", "{{ question }}")
    with pytest.raises(ConfigError, match=r"question.*prompt, draft"):
        RewritePrompt(None, path, None, "x").messages(rollout("one"))


@pytest.mark.parametrize("missing", ["template", "examples", "system"])
def test_a_missing_file_is_named_with_its_key(template: str, missing: str) -> None:
    files: dict[str, Any] = {"system": None, "template": template, "examples": None} | {missing: "nowhere/x.j2"}
    with pytest.raises(ConfigError, match=r"onpolicy\.algorithm.*nowhere/x\.j2"):
        RewritePrompt(**files, where="onpolicy.algorithm")


def reply(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(
        request_key="k", prompt_id="p", author="teacher", model="m", text=text, finish_reason=finish_reason
    )


def test_a_whole_answer_is_usable_without_the_blanks_around_it() -> None:
    assert usable_text(reply("  Servus,\n Welt \n")) == "Servus,\n Welt"


@pytest.mark.parametrize("finish_reason", ["length", "content_filter", "tool_calls", "unknown", ""])
def test_an_answer_that_did_not_stop_by_itself_is_not_usable(finish_reason: str) -> None:
    assert usable_text(reply("Servus", finish_reason)) is None


@pytest.mark.parametrize("completion", [None, reply(""), reply(" \n\t ")])
def test_a_missing_or_empty_answer_is_not_usable(completion: Completion | None) -> None:
    assert usable_text(completion) is None


def test_a_lone_question_is_shown_as_it_is_and_turns_with_their_roles() -> None:
    assert conversation([user("Say 1")]) == "Say 1"
    assert conversation([{"role": "system", "content": "Be kind"}, user("Hi")]) == "system: Be kind\n\nuser: Hi"


def test_the_order_is_one_for_the_same_texts_whatever_order_they_come_in() -> None:
    texts = [f"t{i}" for i in range(8)]
    order = shuffled(texts, "judge")
    assert order == shuffled(texts[::-1], "judge")
    assert sorted(order) == texts != order
    assert order != shuffled(texts, "another judge")
    assert shuffled(["a", "b", "a"], "") in (["a", "b"], ["b", "a"])


def test_every_place_is_taken_by_every_text_now_and_then() -> None:
    firsts = {shuffled(["a", "b", "c"], str(i))[0] for i in range(50)}
    assert firsts == {"a", "b", "c"}


def rubric(*points: int) -> str:
    return json.dumps({"criteria": [{"criterion": f"has {p}", "points": p} for p in points]})


def test_a_rubric_is_read_with_whatever_stands_around_it() -> None:
    expected = [Criterion(criterion=f"has {p}", points=p) for p in (1, 2, 5, 3)]
    assert read_rubric(f"Sure!\n```json\n{rubric(1, 2, 5, 3)}\n```") == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "no JSON", "{", "[]", '{"criteria": []}', rubric(1, 2, 3), rubric(*[1] * 13), rubric(1, 2, 3, 6),
        rubric(1, 2, 3, 0), rubric(1, 1, 1, 1).replace('"points": 1', '"points": true'),
        rubric(1, 1, 1, 1).replace("has 1", ""), rubric(1, 2, 3, 4)[:-3], "{" * 100_000,
    ],
    ids=range(13),
)  # fmt: skip
def test_another_rubric_is_none(text: str) -> None:
    assert read_rubric(text) is None


def test_verdicts_are_in_the_order_in_which_answers_were_shown() -> None:
    text = '{"answer_2": [false, true], "answer_1": [true, true]}'
    assert read_verdicts(text, 2, 2) == [[True, True], [False, True]]


@pytest.mark.parametrize(
    "text",
    [
        '{"answer_1": [true, true]}',
        '{"answer_1": [true, true], "answer_2": [true, true], "answer_3": [true, true]}',
        '{"answer_1": [true, true], "answer_3": [true, true]}',
        '{"answer_1": [true, true], "answer_2": [true]}',
        '{"answer_1": [true, true], "answer_2": [1, 0]}',
        '{"answer_1": [true, true], "answer_2": [true, true], "answer_1": [false, false]}',
        '{"answer_1": [true, true], "answer_2": null}',
    ],
)
def test_a_verdict_for_another_number_of_answers_or_criteria_is_none(text: str) -> None:
    assert read_verdicts(text, 2, 2) is None


@pytest.mark.parametrize("text", ['{"answer_1": 10}', '{"answer_1": -1}', '{"answer_1": 7.5}', '{"answer_1": true}'])
def test_a_grade_is_a_digit(text: str) -> None:
    assert read_grades('{"answer_1": 7}', 1) == [7]
    assert read_grades(text, 1) is None


def test_a_reward_is_the_share_of_points() -> None:
    lines = [Criterion(criterion="x", points=p) for p in (1, 2, 5)]
    assert rubric_reward(lines, [True, False, True]) == 6 / 8
    with pytest.raises(ValueError, match="zip"):
        rubric_reward(lines, [True])


def tokens(*texts: str, **shown: dict[str, float]) -> list[TokenLogprob]:
    """Tokens whose alternatives are given by name: `_3={"3": 0.5}` for the token 3."""
    found = []
    for text in texts:
        others = shown.get(f"_{text.strip()}", {})
        top = [TopLogprob(token=other, logprob=math.log(p)) for other, p in others.items()]
        found.append(TokenLogprob(token=text, logprob=math.log(others.get(text, 0.5)), top_logprobs=top))
    return found


def test_a_grade_is_the_mean_over_the_digits_that_are_shown() -> None:
    written = tokens('{"', "answer", "_", "1", '":', " 3", ", ", '"answer_2"', ":", "8", "}", "",
                     _3={" 3": 0.4, " 5": 0.2, " nine": 0.3}, _8={"8": 0.1, "0": 0.1})  # fmt: skip
    assert expected_grades(written, 2) == pytest.approx([(3 * 0.4 + 5 * 0.2) / 0.6, 4.0])


def test_a_digit_that_is_two_tokens_has_the_mass_of_both() -> None:
    written = tokens('{"answer_1":', " 7", "}", _7={" 7": 0.6, "7": 0.1, " 3": 0.2, "3": 0.1})
    assert expected_grades(written, 1) == pytest.approx([7 * 0.7 + 3 * 0.3])


@pytest.mark.parametrize(
    "written",
    [
        [],
        tokens('{"answer_1":', " 3", ', "answer_2":', " 7}"),
        tokens('{"answer_1": 3, "answer_2": ', "7", "}"),
        tokens('{"answer_1":', " 3", "}"),
    ],
    ids=["no logprobs", "not of its own", "inside another", "one is missing"],
)
def test_a_grade_that_is_no_token_of_its_own_has_no_mean(written: list[TokenLogprob]) -> None:
    assert expected_grades(written, 2) is None


@pytest.mark.parametrize("form", [rubric_format(), verdicts_format(3, 5), grades_format(3)])
def test_a_schema_is_strict_everywhere(form: dict[str, Any]) -> None:
    def check(schema: dict[str, Any]) -> None:
        if schema["type"] == "object":
            assert schema["required"] == list(schema["properties"])
            assert schema["additionalProperties"] is False
        for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
            check(inner)

    assert form["json_schema"]["strict"] is True
    check(form["json_schema"]["schema"])
