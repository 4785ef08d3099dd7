"""The one YAML: its plain sections, and how a file and flags become a validated config.

Sections with a choice inside (`teacher`, `onpolicy.algorithm`) live beside what they configure;
`project.Config` puts all of it together. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources, util
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from blackbox_kd.errors import ConfigError
from blackbox_kd.types import SamplingParams, Split


class Section(BaseModel):
    """A part of the YAML: unknown keys are errors, values do not change, attribute docstrings are the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PromptsConfig(Section):
    """The conversations to answer: only what the student sees."""

    path: str
    """A folder with train.jsonl, heldout.jsonl, ood.jsonl and holdback.jsonl, or one .jsonl with a `split` key."""
    limits: dict[Split, int] = {}
    """The first so many prompts of a split; a split that is not named is taken whole."""


class SampleConfig(Section):
    """What is asked of the teacher for the sequence-level stage."""

    n: int = Field(1, ge=1)
    """Answers per prompt."""
    max_prompts: int | None = Field(None, ge=1)
    """The first so many train prompts; the rest is fresh ground for the on-policy stage. None: all."""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(256, ge=1)
    """Tokens."""
    top_logprobs: int | None = Field(20, ge=0)
    """Alternatives a token (hosted APIs allow up to 20); null asks for no logprobs."""

    @property
    def sampling(self) -> SamplingParams:
        """As the teacher takes them."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_completion_length=self.max_completion_length,
            top_logprobs=self.top_logprobs,
        )


class LoraSection(Section):
    """Passed to peft.LoraConfig."""

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    layers_to_transform: list[int] | None = None
    """Only these layers; no backward pass below the lowest. None: all."""


class StudentConfig(Section):
    """The model that learns."""

    model: str
    """A hub id, a folder, a .gguf file, or `package:file.gguf` for one that a Python package carries."""
    lora: LoraSection = LoraSection()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU that has it, float32 elsewhere (bfloat16 is many times slower on most CPUs)."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt plus completion, in tokens; a longer row is left out of training and counted."""


class SftConfig(Section):
    """The sequence-level stage."""

    dev_fraction: float = Field(0.15, ge=0, lt=1)
    """Share of the sampled train prompts kept aside; training stops early on their NLL. 0 trains to the end."""
    early_stopping_patience: int = Field(1, ge=1)
    """Evaluations without a better dev NLL before training stops; the best checkpoint is kept."""
    trainer: dict[str, Any] = {}
    """Goes to trl.SFTConfig untouched (learning_rate, num_train_epochs, per_device_train_batch_size, ...)."""


class UpdateConfig(Section):
    """The on-policy update: AdamW on the adapter, at a constant rate, its state handed from round to round."""

    learning_rate: float = Field(1e-4, gt=0)
    batch_size: int = Field(8, ge=1)
    """Samples per optimiser step, over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Samples per forward pass; changes memory, never the gradient."""
    num_epochs: int = Field(1, ge=1)
    """Passes over a round's samples."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps of a round; overrides num_epochs."""
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class EvaluateConfig(Section):
    """How checkpoints are compared."""

    max_completion_length: int = Field(256, ge=1)
    """Tokens, for the teacher's fixed answers and the student's greedy ones."""
    top_logprobs: int | None = Field(20, ge=0)
    """Alternatives kept with the teacher's fixed temperature-1 answers."""
    batch_size: int = Field(16, ge=1)
    bootstrap_samples: int = Field(2000, ge=100)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; everybody who writes a learning rate means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

SHIPPED = Path(str(resources.files("blackbox_kd")))
"""Where configs/ is; data/ and prompts/ are in `shipped/` of a wheel and beside the package in a checkout."""

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def find_file(name: str, what: str) -> Path:
    """A user's path: as given, else `package:file`, else a file that we ship (data/..., prompts/...).

    Raises:
        ConfigError: there is no such file or folder.
    """
    package, colon, inside = name.partition(":")
    if colon and re.fullmatch(r"\w+(\.\w+)*", package) and len(package) > 1:
        spec = util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"{what} {name!r}: Python package {package!r} is not installed")
        candidates = [Path(spec.submodule_search_locations[0]) / inside]
    else:
        candidates = [Path(name).expanduser(), SHIPPED / "shipped" / name, SHIPPED.parent / name]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ConfigError(f"{what}: no such file or folder {name!r} (in {Path.cwd()})")


def config_path(name: str) -> Path:
    """A path to a YAML, or the name of a shipped one (`quickstart`)."""
    shipped = sorted((SHIPPED / "configs").glob("*.yaml"))
    by_name = {path.stem: path for path in shipped}
    if name in by_name and not Path(name).is_file():
        return by_name[name]
    if not Path(name).is_file():
        raise ConfigError(f"--config: no file {name!r}; shipped configs are {', '.join(by_name)}")
    return Path(name)


def load_config(model: type[ConfigT], name: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigT:
    """The validated config of a YAML with dotted overrides; values of overrides are read as YAML.

    Raises:
        ConfigError: an unreadable file, an unknown key (with a did-you-mean) or a value out of range.
    """
    path = config_path(name)
    try:
        data = yaml.load(path.read_text("utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, it is a {type(data).__name__}")
    for key, value in overrides:
        _set(data, key.split("."), yaml.load(value, _Loader), key)
    return validate(model, data, str(path))


def validate(model: type[ConfigT], data: Mapping[str, Any], source: str) -> ConfigT:
    """`data` as `model`; the first thing wrong with it as one line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, item) for item in error.errors()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {problems[0]}{more}") from error


def _set(data: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--{key}: {part!r} is a value, not a section")
    data[path[-1]] = value


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    tags = {tag for keys in _choices(model).values() for tag in keys}
    loc = [str(part) for part in error["loc"] if str(part) not in tags or part == error["loc"][-1]]
    where = ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = [key for key, _ in walk(model)] + list(model.model_fields)
        leaf = {key for key in known if key.rpartition(".")[0] == ".".join(loc[:-1])}
        close = difflib.get_close_matches(where, leaf, n=1, cutoff=0.5) or difflib.get_close_matches(
            where, known, n=1, cutoff=0.5
        )
        hint = f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(sorted(leaf))}"
        return f"unknown key {where!r}{hint}"
    message = error["msg"].replace("Input should be", "should be").replace("Value error, ", "")
    seen = "" if error["type"] in ("missing", "union_tag_invalid") else f", it is {error['input']!r}"
    return f"{where}: {message[:1].lower()}{message[1:]}{seen}"


def _choices(model: type[BaseModel]) -> dict[str, list[str]]:
    """Discriminated unions below a model: dotted key -> the names to choose from."""
    found: dict[str, list[str]] = {}
    for key, info in model.model_fields.items():
        members = _members(info.annotation)
        if info.discriminator:
            tags = [str(m.model_fields[str(info.discriminator)].default) for m in members]
            found[key] = tags
        for member in members:
            found |= {f"{key}.{inner}": tags for inner, tags in _choices(member).items()}
    return found


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The section types in an annotation: itself, or those of its union."""
    options = get_args(annotation) or (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key with its help: the attribute docstring and the default."""
    for name, info in model.model_fields.items():
        key = prefix + name
        members = _members(info.annotation)
        if not members:
            default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
            yield key, f"{' '.join((info.description or '').split())} [{default}]".strip()
        seen: set[str] = set()
        for member in members:
            for inner in walk(member, f"{key}."):
                if inner[0] not in seen:
                    seen.add(inner[0])
                    yield inner
