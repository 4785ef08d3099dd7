"""Prompts in (JSONL) and templates out (Jinja). A template's content hash travels with everything it asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import jinja2
import jinja2.meta

from blackbox_kd.config import PromptsConfig, find_file
from blackbox_kd.errors import ConfigError
from blackbox_kd.hashing import canonical_json, content_id
from blackbox_kd.types import Message, Prompt, Split

SPLITS: tuple[Split, ...] = get_args(Split)
ROLES = ("system", "user", "assistant", "tool")


def load_prompts(config: PromptsConfig) -> dict[Split, list[Prompt]]:
    """All prompts of a project by split, in file order, cut to `limits`.

    A row is `{"messages": [...]}` or TRL's `{"prompt": text or messages}`, with optional `split`, `source`, `meta`.

    Raises:
        ConfigError: a missing file, a line that is not such a row (with its number), a prompt in two splits.
    """
    path = find_file(config.path, "prompts.path")
    files = [(path / f"{split}.jsonl", split) for split in SPLITS] if path.is_dir() else [(path, SPLITS[0])]
    found: dict[Split, list[Prompt]] = {split: [] for split in SPLITS}
    split_of: dict[str, Split] = {}
    for file, default in files:
        if not file.exists() and default != "train":
            continue
        for where, row in read_jsonl(file):
            prompt = _prompt(row, where, default, file)
            earlier = split_of.setdefault(prompt.prompt_id, prompt.split)
            if earlier != prompt.split:
                raise ConfigError(f"{where}: this prompt is in split {earlier!r} as well as in {prompt.split!r}")
            found[prompt.split].append(prompt)
    if not found["train"]:
        raise ConfigError(f"prompts.path {config.path!r}: no train prompts in it")
    return {split: _unique(prompts)[: config.limits.get(split)] for split, prompts in found.items()}


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, row) for each line that is not blank.

    Raises:
        ConfigError: the file is missing or a line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            canonical_json(row).encode()
        except ValueError as error:  # NaN and half surrogate pairs pass json.loads, but are neither JSON nor UTF-8
            raise ConfigError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
        yield where, row


def _prompt(row: Mapping[str, Any], where: str, default: Split, file: Path) -> Prompt:
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    split = row.get("split", default)
    if split not in SPLITS:
        raise ConfigError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise ConfigError(f"{where}: `meta` must be an object")
    checked = check_messages(messages, where)
    if checked[-1]["role"] != "user":
        raise ConfigError(f"{where}: the last message must be the user's, it is the {checked[-1]['role']}'s")
    return Prompt(messages=checked, split=split, source=str(row.get("source", file.name)), meta=meta)


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages, if they are a non-empty list of `{"role", "content"}` with text in it."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: needs `messages` (a list of role and content) or `prompt`")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ConfigError(f"{where}: a message needs a `role` out of {', '.join(ROLES)}: {message!r}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ConfigError(f"{where}: a message needs a `content` with text: {message!r}")
    return messages


def _unique(prompts: list[Prompt]) -> list[Prompt]:
    return list({prompt.prompt_id: prompt for prompt in prompts}.values())


class Template:
    """A Jinja file; a variable that it uses and does not get is an error, not a blank."""

    def __init__(self, name: str, what: str) -> None:
        self.path = find_file(name, what)
        try:
            self.source = self.path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what}: cannot read {self.path}: {error}") from error
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        try:
            self._compiled = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{what} {self.path}:{error.lineno}: {error.message}") from error

    @property
    def variables(self) -> set[str]:
        """Names that the template uses."""
        return jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(self.source))

    def render(self, **variables: Any) -> str:
        """The text with its variables filled in."""
        try:
            return self._compiled.render(**variables).strip()
        except (jinja2.TemplateError, TypeError) as error:
            raise ConfigError(f"template {self.path}: {error}; it may use {', '.join(variables)}") from error


class PrivateContext:
    """What the teacher is told and the student never sees: a system template and example conversations."""

    def __init__(self, template: str | None, examples: str | None, what: str = "teacher.prompt") -> None:
        self._template = Template(template, f"{what}.template") if template else None
        self._examples: list[Message] = []
        if examples:
            for where, row in read_jsonl(find_file(examples, f"{what}.examples")):
                self._examples += check_messages(row.get("messages"), where)
        self.context_hash = content_id([self._template.source if self._template else None, self._examples])
        """Of the template's source and the examples, not of their file names."""

    def wrap(self, messages: list[Message]) -> list[Message]:
        """The conversation as the teacher sees it: its system message, the examples, the user's turns."""
        own = [m for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        if self._template is None:
            return [*own, *self._examples, *turns]
        said = "\n\n".join(m["content"] for m in own)
        system = self._template.render(system=said)
        if said and "system" not in self._template.variables:  # the prompt's own rules still hold
            system = f"{system}\n\n{said}"
        return [{"role": "system", "content": system}, *self._examples, *turns]
