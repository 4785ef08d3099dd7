"""Hold-back tasks: prompts with checkers that say whether an answer is right. Pure.

A task is a JSONL file. A row is a prompt (`messages` or `prompt`) with a `checker` and its keys:

    {"prompt": "What is 5 times 6?", "checker": "numeric", "answer": 30}

A checker is a class with a name in `CHECKERS`; its fields are the keys of a row.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jsonschema
from pydantic import Field, field_validator, model_validator
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from blackbox_kd.config import find_file, validate
from blackbox_kd.errors import ConfigError
from blackbox_kd.prompts import prompt_of, read_jsonl
from blackbox_kd.sections import Section
from blackbox_kd.types import Prompt

NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+\u2212]?\.\d+")
FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class Checker(Section):
    """What a right answer is."""


class Written(Checker):
    """Of an answer that the student writes, greedily."""

    @abstractmethod
    def right(self, text: str) -> bool:
        """Whether this whole answer is one."""


class Exact(Written):
    """The whole answer; case, white space, quotes around it and a mark at its end aside."""

    answer: str | list[str]
    """One of these is right."""

    def right(self, text: str) -> bool:
        """See the class."""
        answers = [self.answer] if isinstance(self.answer, str) else self.answer
        return plain(text) in map(plain, answers)


class Regex(Written):
    """A Python regular expression that is found somewhere in the answer (`^`, `$` and `(?i)` say more)."""

    answer: str

    @field_validator("answer")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
        return pattern

    def right(self, text: str) -> bool:
        """See the class."""
        return re.search(self.answer, text) is not None


class Numeric(Written):
    """The last number in the answer (as GSM8K is read), at most `tolerance` away; commas between thousands aside."""

    answer: float
    tolerance: float = Field(0.0, ge=0)

    def right(self, text: str) -> bool:
        """See the class."""
        found = NUMBER.findall(text)
        numbers = [float(each.replace(",", "").replace("\u2212", "-")) for each in found[-1:]]
        return any(abs(number - self.answer) <= self.tolerance for number in numbers)


class JsonSchema(Written):
    """The whole answer, or the one fenced block in it, is JSON that a schema accepts (https://json-schema.org)."""

    schema_: dict[str, Any] = Field(alias="schema")

    @field_validator("schema_")
    @classmethod
    def _is_one(cls, schema: dict[str, Any]) -> dict[str, Any]:
        try:
            jsonschema.validators.validator_for(schema).check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a JSON schema ({error.message})") from error
        text = json.dumps(schema)
        if re.search(r'"\$(dynamicR|r)ef": "(?!#)', text):
            raise ValueError("a $ref must begin with #, nothing is fetched")
        within = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
        for ref in re.findall(r'"\$ref": "(#[^"]*)"', text):
            try:
                within.lookup(ref)
            except Unresolvable as error:
                raise ValueError(f"$ref {ref!r} leads nowhere") from error
        return schema

    def right(self, text: str) -> bool:
        """See the class."""
        fenced = FENCE.findall(text)
        try:
            found = json.loads(fenced[0] if len(fenced) == 1 else text)
            return bool(jsonschema.validators.validator_for(self.schema_)(self.schema_).is_valid(found))
        except (ValueError, RecursionError):  # also of a schema that refers to itself without end
            return False


class Choice(Checker):
    """Multiple choice: nothing is written, the likeliest of `choices` for its length has to be `answer`."""

    choices: list[str] = Field(min_length=2)
    answer: str

    @model_validator(mode="after")
    def _is_a_choice(self) -> Choice:
        if self.answer not in self.choices:
            raise ValueError(f"answer {self.answer!r} is none of the choices")
        if not all(self.choices) or len(set(self.choices)) < len(self.choices):
            raise ValueError("choices must have text, and be different")
        return self

    def taken(self, logprobs: Sequence[float]) -> str:
        """The choice with the most log-probability a character, as lm-eval's acc_norm; the first of equals.

        `logprobs`: nats of each choice as the beginning of the answer, its end token not counted.
        """
        rates = [logprob / len(choice) for logprob, choice in zip(logprobs, self.choices, strict=True)]
        return self.choices[rates.index(max(rates))]


CHECKERS: dict[str, type[Checker]] = {
    "exact": Exact,
    "regex": Regex,
    "numeric": Numeric,
    "choice": Choice,
    "json_schema": JsonSchema,
}


class Item(NamedTuple):
    """One row of a task."""

    prompt: Prompt
    checker: Checker


def load_task(name: str, path: str) -> list[Item]:
    """The rows of a task.

    Raises:
        ConfigError: no such file, no row in it, or a row that is not one (with its line).
    """
    rows = read_jsonl(find_file(path, f"evaluate.tasks.{name}"))
    items = [Item(prompt_of(row, where, "holdback"), checker_of(row, where)) for where, row in rows]
    if not items:
        raise ConfigError(f"evaluate.tasks.{name}: no row in {path!r}")
    return items


def task_prompts(tasks: Mapping[str, str]) -> list[Prompt]:
    """Those of all tasks, by name and file.

    Raises:
        ConfigError: see `load_task`.
    """
    return [item.prompt for name, path in tasks.items() for item in load_task(name, path)]


def checker_of(row: Mapping[str, Any], where: str) -> Checker:
    """What a row says of a right answer.

    Raises:
        ConfigError: an unknown checker, or keys that are not its own.
    """
    keys = {key: value for key, value in row.items() if key not in ("messages", "prompt", "source", "meta", "checker")}
    kind = CHECKERS.get(str(row.get("checker")))
    if kind is None:
        raise ConfigError(f"{where}: checker {row.get('checker')!r} is none of {', '.join(CHECKERS)}")
    return validate(kind, keys, where)


def plain(text: str) -> str:
    """Without what `Exact` does not look at."""
    return " ".join(text.split()).rstrip(".!?").strip("\"'`*").rstrip(".!?").casefold()
