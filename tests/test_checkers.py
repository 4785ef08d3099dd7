"""Checkers of hold-back tasks on answers worked by hand, and rows that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.checkers import CHECKERS, Choice, Written, checker_of, load_task
from blackbox_kd.errors import ConfigError

ADA = {"type": "object", "properties": {"name": {"const": "Ada"}}, "required": ["name"]}


def right(text: str, checker: str, **keys: Any) -> bool:
    made = checker_of({"checker": checker, **keys}, "task.jsonl:1")
    assert isinstance(made, Written)
    return made.right(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Paris", True), ('  "paris".\n', True), ("**Paris**!", True), ("Paris, France", False), ("It is Paris.", False)],
)
def test_exact_is_the_whole_answer_but_for_case_quotes_and_a_mark(text: str, expected: bool) -> None:
    assert right(text, "exact", answer="Paris") is expected


def test_exact_takes_any_of_several_answers() -> None:
    assert right("Hi there", "exact", answer=["hello", "hi there"])
    assert not right("hi", "exact", answer=["hello", "hi there"])


def test_exact_does_not_look_past_what_stands_before_a_number() -> None:
    assert not right("-5", "exact", answer="5")
    assert not right("1.5", "exact", answer="15")


def test_regex_is_found_anywhere_and_minds_case() -> None:
    assert right("The capital is Rome.", "regex", answer=r"\bRome\b")
    assert not right("the capital is rome", "regex", answer=r"\bRome\b")
    assert right("the capital is rome", "regex", answer=r"(?i)\bRome\b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 + 5 = 12.", True),
        ("12 is 7 + 5", False),  # the last number counts
        ("about 12.4", False),
        ("none", False),
        ("twelve", False),
    ],
)
def test_numeric_reads_the_last_number(text: str, expected: bool) -> None:
    assert right(text, "numeric", answer=12) is expected


def test_numeric_reads_signs_thousands_and_decimals() -> None:
    assert right("so -3.5", "numeric", answer=-3.5)
    assert right("1,234,567 people", "numeric", answer=1234567)
    assert right("1.5e3", "numeric", answer=1500)
    assert right("it is .25", "numeric", answer=0.25)
    assert right("1, 2, 3", "numeric", answer=3)
    assert right("\u22125", "numeric", answer=-5)  # the sign of mathematics


def test_numeric_is_right_up_to_its_tolerance() -> None:
    assert right("3.5", "numeric", answer=3, tolerance=0.5)
    assert not right("3.51", "numeric", answer=3, tolerance=0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Ada"}', True),
        ('Here it is:\n```json\n{"name": "Ada"}\n```\nIt has one key.', True),
        ('```\n{"name": "Ada"}\n```', True),
        ('```JSON\n{"name": "Ada"}\n```', True),
        ('``` json \n{"name": "Ada"}\n```', True),
        ('Here it is: {"name": "Ada"}', False),
        ('```json\n{"name": "Ada"}\n```\n```json\n{}\n```', False),
        ('{"name": "Bob"}', False),
        ('{"name": "Ada"', False),
        ("[" * 100_000, False),
    ],
)
def test_json_schema_wants_the_whole_answer_or_its_one_fence(text: str, expected: bool) -> None:
    assert right(text, "json_schema", schema=ADA) is expected


def test_json_schema_reads_the_draft_that_the_schema_names() -> None:
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}
    assert not right("3", "json_schema", schema=old)
    assert right("3", "json_schema", schema={"maximum": 3})


@pytest.mark.parametrize("ref", ["#/nowhere", "#gone", "https://example.com/schema.json"])
def test_a_reference_that_leads_nowhere_is_refused(ref: str) -> None:
    with pytest.raises(ConfigError, match=r"task.jsonl:1.*\$ref"):
        right("{}", "json_schema", schema={"properties": {"a": {"$ref": ref}}})


def test_a_schema_that_refers_to_itself_is_followed_and_without_end_never_right() -> None:
    tree = {"$ref": "#/$defs/node", "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
    assert right("[[], [[]]]", "json_schema", schema=tree)
    assert not right("[[], [3]]", "json_schema", schema=tree)
    assert not right("{}", "json_schema", schema={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})


def choice(*choices: str) -> Choice:
    made = checker_of({"checker": "choice", "choices": list(choices), "answer": choices[0]}, "task.jsonl:1")
    assert isinstance(made, Choice)
    return made


def test_a_choice_is_the_likeliest_for_its_length() -> None:
    # -6 / 2 characters = -3, -8 / 4 = -2: the longer one, though its sum is lower
    assert choice("no", "yeah").taken([-6.0, -8.0]) == "yeah"
    assert choice("no", "yeah").taken([-3.0, -8.0]) == "no"


def test_of_equal_choices_the_first_is_taken() -> None:
    assert choice("b", "a").taken([-1.0, -1.0]) == "b"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"checker": "exakt", "answer": "a"}, "checker 'exakt' is none of exact, regex, numeric, choice, json_schema"),
        ({"answer": "a"}, "checker None is none of"),
        ({"checker": "exact"}, "answer: this key is required"),
        ({"checker": "exact", "answr": "a"}, "unknown key 'answr'; did you mean 'answer'?"),
        ({"checker": "regex", "answer": "("}, "answer: not a regular expression"),
        ({"checker": "numeric", "answer": "many"}, "answer: should be a valid number"),
        ({"checker": "numeric", "answer": 1, "tolerance": -1}, "tolerance: should be greater than or equal to 0"),
        ({"checker": "choice", "answer": "a", "choices": ["b", "c"]}, "answer 'a' is none of the choices"),
        ({"checker": "choice", "answer": "a", "choices": ["a", "a"]}, "choices must have text, and be different"),
        ({"checker": "choice", "answer": "a", "choices": ["a"]}, "choices: list should have at least 2 items"),
        ({"checker": "json_schema", "schema": {"type": "thing"}}, "schema: not a JSON schema"),
        ({"checker": "json_schema", "schema": {"$ref": "http://example.com/s"}}, "nothing is fetched"),
        ({"checker": "json_schema", "schem": {}}, "unknown key 'schem'; did you mean 'schema'?"),
    ],
)
def test_a_row_that_is_none_is_named_with_its_line(
    write_jsonl: Callable[..., Path], row: dict[str, Any], said: str
) -> None:
    good = {"prompt": "Say a.", "checker": "exact", "answer": "a"}
    path = write_jsonl("task.jsonl", [good, {"prompt": "Say b.", **row}])
    with pytest.raises(ConfigError) as raised:
        load_task("letters", str(path))
    assert str(raised.value).startswith(f"{path}:2: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_row_without_a_prompt_is_named_with_its_line(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("task.jsonl", [{"checker": "exact", "answer": "a"}])
    with pytest.raises(ConfigError, match=r"task\.jsonl:1: needs `messages`"):
        load_task("letters", str(path))


def test_an_empty_task_is_refused(write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.tasks\.letters: no row in"):
        load_task("letters", str(write_jsonl("task.jsonl", [])))


def test_the_shipped_task_has_every_checker() -> None:
    items = load_task("everyday", "data/tasks/everyday.jsonl")
    assert {type(item.checker) for item in items} == set(CHECKERS.values())
    assert {item.prompt.split for item in items} == {"holdback"}
    assert len({item.prompt.prompt_id for item in items}) == len(items)
