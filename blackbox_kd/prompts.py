"""Prompts in (JSONL) and templates out (Jinja). A template's content hash travels with everything it asked."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jinja2
import jinja2.meta
import msgspec
import numpy as np

from blackbox_kd.config import find_file
from blackbox_kd.errors import ConfigError
from blackbox_kd.hashing import content_id
from blackbox_kd.leaks import Leaks, find_leaks
from blackbox_kd.progress import counting, say
from blackbox_kd.sections import PromptsConfig
from blackbox_kd.types import Message, Prompt, Split

SPLITS: tuple[Split, ...] = get_args(Split)
ROLES = ("system", "user", "assistant", "tool")
PROGRESS_ROWS = 1000
"""Rows between two updates of the live line."""


class PromptSet:
    """The prompts of a project by split, in file order, each once, cut to `limits`.

    A row is `{"messages": [...]}` or TRL's `{"prompt": text or messages}`, with optional `split`, `source`, `meta`.
    All rows are checked at the start; train prompts are not held, so that a million of them cost nothing.
    """

    def __init__(self, config: PromptsConfig, tasks: Sequence[Prompt] = ()) -> None:
        """`tasks`: prompts of hold-back tasks. They are in no file of a split, and no train prompt may be one of them.

        Raises:
            ConfigError: a missing file, a line that is not such a row (with its number), a prompt in two splits.
        """
        self._config, self._limits, self._tasks = config, config.limits, tasks
        path = find_file(config.path, "prompts.path")
        files = [(path / f"{split}.jsonl", split) for split in SPLITS] if path.is_dir() else [(path, SPLITS[0])]
        self._files = [(file, default) for file, default in files if file.exists() or default == "train"]
        self._loaded: dict[Split, list[Prompt]] = {split: [] for split in SPLITS if split != "train"}
        self._repeated: set[int] = set()
        self._left_out: set[str] = set()
        self._train = self._check()
        if not self._train:
            raise ConfigError(f"prompts.path {config.path!r}: no train prompts in it")
        if config.leaks == "drop":
            self._leave_out()

    def _leave_out(self) -> None:
        found = find_leaks(self._train_prompts(), self.evaluation, self._config.leak_jaccard, self._train)
        self._left_out = found.prompt_ids
        self._train -= len(found)
        if found:
            say(f"prompts: {found}; these train prompts are left out (prompts.leaks is drop)")
        if not self._train:
            raise ConfigError(f"prompts.path {self._config.path!r}: every train prompt is in an evaluation split, too")

    @property
    def evaluation(self) -> list[Prompt]:
        """What a checkpoint is measured on: all splits but train, and the tasks."""
        return [*(prompt for split in SPLITS if split != "train" for prompt in self._loaded[split]), *self._tasks]

    @cached_property
    def leaks(self) -> Leaks:
        """Train prompts that are in an evaluation split, too; none where they are left out or nobody is to look."""
        if self._config.leaks != "stop":
            return Leaks()
        return find_leaks(self.stream("train"), self.evaluation, self._config.leak_jaccard, self.count("train"))

    def refuse_leaks(self) -> None:
        """Raises:
        ConfigError: there are some.
        """
        if self.leaks:
            raise ConfigError(
                f"prompts.path {self._config.path!r}: {self.leaks}; take them out of one of the files, or set "
                "prompts.leaks to drop (these train prompts are left out) or allow"
            )

    def _check(self) -> int:
        """One pass over all rows; returns how many train prompts there are, each counted once.

        A train prompt is remembered by the 8 bytes of `_key`.
        """
        split_of: dict[str, Split] = {}
        keys, small = array("q"), set[int]()
        with counting("checking the prompts", None) as progress:
            for number, (where, row) in enumerate(self._rows()):
                if row.split == "train":
                    keys.append(_key(row))
                else:
                    small.add(_key(row))
                    prompt = row.prompt()
                    if split_of.setdefault(prompt.prompt_id, row.split) != row.split:
                        raise _twice(where, split_of[prompt.prompt_id], row.split)
                    self._loaded[row.split].append(prompt)
                if number % PROGRESS_ROWS == 0:
                    progress.at(number)
        self._loaded = {s: list(_unique(found))[: self._limits.get(s)] for s, found in self._loaded.items()}
        if shared := small.intersection(keys):
            self._refuse_shared(shared, split_of)
        ordered = np.sort(np.frombuffer(keys, np.int64))
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        self._repeated = set(again.tolist())
        return len(keys) - len(again)

    def _refuse_shared(self, keys: set[int], split_of: Mapping[str, Split]) -> None:
        for where, row in self._rows():
            if row.split == "train" and _key(row) in keys and (other := split_of.get(row.prompt().prompt_id)):
                raise _twice(where, other, "train")

    def _rows(self) -> Iterator[tuple[str, _Row]]:
        for file, default in self._files:
            name = file.name
            for where, row in read_jsonl(file):
                yield where, _checked(row, where, default, name)

    def __getitem__(self, split: Split) -> list[Prompt]:
        if split not in self._loaded:
            self._loaded[split] = list(self.stream(split))
        return self._loaded[split]

    def stream(self, split: Split, limit: int | None = None) -> Iterator[Prompt]:
        """The prompts of a split, the first `limit` of them, read as they are taken."""
        if split in self._loaded:
            yield from self._loaded[split][:limit]
        else:
            yield from islice(self._train_prompts(), self.count(split, limit))

    def _train_prompts(self) -> Iterator[Prompt]:
        seen: set[str] = set()
        for _, row in self._rows():
            if row.split == "train":
                prompt = row.prompt()
                if self._repeated and _key(row) in self._repeated:
                    if prompt.prompt_id in seen:
                        continue
                    seen.add(prompt.prompt_id)
                if prompt.prompt_id not in self._left_out:
                    yield prompt

    def count(self, split: Split, limit: int | None = None) -> int:
        """How many `stream` yields."""
        if split in self._loaded:
            return len(self._loaded[split][:limit])
        return min(self._train, *(end for end in (limit, self._limits.get(split)) if end is not None), 1 << 62)


class _Row(NamedTuple):
    """A row that is in order; its prompt has a hash, which costs more than all the rest."""

    messages: list[Message]
    split: Split
    source: str
    meta: dict[str, Any]

    def prompt(self) -> Prompt:
        return Prompt(messages=self.messages, split=self.split, source=self.source, meta=self.meta)


def _key(row: _Row) -> int:
    """The same for the same messages; for others nearly always another (64 bits)."""
    return hash(msgspec.json.encode(row.messages, order="sorted"))


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
                if not line.isspace():
                    where = f"{path}:{number}"
                    yield where, _row(line, where)
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


def _checked(row: Mapping[str, Any], where: str, default: Split, file: str) -> _Row:
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
    return _Row(checked, split, str(row.get("source", file)), meta)


def prompt_of(row: Mapping[str, Any], where: str, split: Split) -> Prompt:
    """The prompt of a row of a file without a `split` key, `where` is `file:line`.

    Raises:
        ConfigError: it is not such a row.
    """
    return _checked(row, where, split, Path(where.rpartition(":")[0]).name).prompt()


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
