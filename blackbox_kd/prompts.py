"""Prompts in (JSONL) and templates out (Jinja). A template's content hash travels with everything it asked."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import jinja2
import jinja2.meta
import msgspec

from blackbox_kd.config import PromptsConfig, find_file
from blackbox_kd.errors import ConfigError
from blackbox_kd.hashing import content_id
from blackbox_kd.progress import counting
from blackbox_kd.types import Message, Prompt, Split

SPLITS: tuple[Split, ...] = get_args(Split)
ROLES = ("system", "user", "assistant", "tool")


class PromptSet:
    """The prompts of a project by split, in file order, each once, cut to `limits`.

    A row is `{"messages": [...]}` or TRL's `{"prompt": text or messages}`, with optional `split`, `source`, `meta`.
    All rows are checked at the start; train prompts are not held, so that a million of them cost nothing.
    """

    def __init__(self, config: PromptsConfig) -> None:
        """Raises:
        ConfigError: a missing file, a line that is not such a row (with its number), a prompt in two splits.
        """
        self._limits = config.limits
        path = find_file(config.path, "prompts.path")
        files = [(path / f"{split}.jsonl", split) for split in SPLITS] if path.is_dir() else [(path, SPLITS[0])]
        self._files = [(file, default) for file, default in files if file.exists() or default == "train"]
        self._loaded: dict[Split, list[Prompt]] = {split: [] for split in SPLITS if split != "train"}
        self._counts = dict.fromkeys(SPLITS, 0)
        self._check()
        if not self._counts["train"]:
            raise ConfigError(f"prompts.path {config.path!r}: no train prompts in it")

    def _check(self) -> None:
        """Two passes: what is small is loaded, then the train prompts are held against it."""
        split_of: dict[str, Split] = {}
        with counting("checking the prompts", None) as progress:
            for where, prompt in self._rows():
                if prompt.split != "train":
                    if split_of.setdefault(prompt.prompt_id, prompt.split) != prompt.split:
                        raise _twice(where, split_of[prompt.prompt_id], prompt.split)
                    self._loaded[prompt.split].append(prompt)
                self._counts[prompt.split] += 1
                progress.advance()
            for where, prompt in self._rows() if split_of else ():
                if prompt.split == "train" and prompt.prompt_id in split_of:
                    raise _twice(where, split_of[prompt.prompt_id], "train")
        self._loaded = {s: list(_unique(found))[: self._limits.get(s)] for s, found in self._loaded.items()}

    def _rows(self) -> Iterator[tuple[str, Prompt]]:
        for file, default in self._files:
            for where, row in read_jsonl(file):
                yield where, _prompt(row, where, default, file)

    def __getitem__(self, split: Split) -> list[Prompt]:
        if split not in self._loaded:
            self._loaded[split] = list(_unique(self.stream(split)))
        return self._loaded[split]

    def stream(self, split: Split, limit: int | None = None) -> Iterator[Prompt]:
        """The prompts of a split, the first `limit` of them, read as they are taken."""
        if split in self._loaded:
            yield from self._loaded[split][:limit]
            return
        found = (prompt for _, prompt in self._rows() if prompt.split == split)
        ends = [end for end in (limit, self._limits.get(split)) if end is not None]
        # Without a limit a repeated prompt does no harm: its question is known by then.
        yield from islice(_unique(found), min(ends)) if ends else found

    def count(self, split: Split, limit: int | None = None) -> int:
        """No fewer than `stream` yields: a repeated prompt counts twice."""
        return min(self._counts[split], *(end for end in (limit, self._limits.get(split)) if end is not None), 1 << 62)


def _twice(where: str, one: Split, other: Split) -> ConfigError:
    return ConfigError(f"{where}: this prompt is in split {one!r} as well as in {other!r}")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, row) for each line that is not blank.

    Raises:
        ConfigError: the file is missing or a line is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _row(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(line.removeprefix(codecs.BOM_UTF8))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


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


def _unique(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.prompt_id not in seen:
            seen.add(prompt.prompt_id)
            yield prompt


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
