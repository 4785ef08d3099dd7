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
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator
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
    limits: dict[Split, NonNegativeInt] = {}
    """The first so many prompts of a split; a split that is not named is taken whole."""
    leaks: Literal["stop", "drop", "allow"] = "stop"
    """Where train prompts are in an evaluation split, too, or nearly: no training; these train prompts are left out; or
    nobody looks."""
    leak_jaccard: float = Field(0.8, gt=0, le=1)
    """Of the word pairs, from where two prompts are nearly the same; 1: only equal ones (but for case and blanks)."""


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
    batch: bool = False
    """Ask by the Batch API of the endpoint: for half the price, within a day."""
    batch_poll_s: float = Field(60.0, gt=0)
    """Seconds from one look at the open batches to the next."""
    batch_max_requests: int = Field(50_000, ge=1)
    """Questions of one batch; a provider's limit, as 200 MB are."""

    @property
    def draws(self) -> int:
        """Questions a prompt: at temperature 0 there is only one answer."""
        return self.n if self.temperature > 0 else 1

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
    layers_to_transform: list[NonNegativeInt] | None = Field(None, min_length=1)
    """Only these layers; no backward pass below the lowest. None: all."""

    @model_validator(mode="after")
    def _layers_of_names(self) -> Self:
        pattern = isinstance(self.target_modules, str) and not self.all_linear
        if pattern and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names or as all-linear")
        return self

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer but the head gets an adapter."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"


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


class SoftLossConfig(Section):
    """How soft labels are learnt."""

    alpha: float = Field(0.0, ge=0, le=1)
    """Share of the hard label on tokens that have a soft one; tokens without one are hard only."""
    beta: float = Field(0.0, ge=0, le=1)
    """0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence (as in TRL)."""
    tail: Literal["bucket", "renormalise", "none"] = "bucket"
    """What becomes of the mass outside the top-k: one more outcome, divided away, or left out."""

    @model_validator(mode="after")
    def _teacher_is_the_least(self) -> Self:
        if self.beta == 1 and self.tail == "none":  # sum_k q_k (log q_k - log p_k) over a part
            raise ValueError("beta 1 with tail none is least at q = p / e, not at the teacher's p; take another tail")
        return self


class SftConfig(Section):
    """The sequence-level stage."""

    soft_labels: bool = True
    """Learn the teacher's top-logprobs where an answer has them; false learns the text alone."""
    soft: SoftLossConfig = SoftLossConfig()
    allow_temperature_mismatch: bool = False
    """API logprobs are those of temperature 1: text drawn otherwise has another distribution than its soft labels."""
    dev_fraction: float = Field(0.15, ge=0, lt=1)
    """Share of the sampled train prompts kept aside; training stops early on their loss. 0 trains to the end."""
    early_stopping_patience: int = Field(1, ge=1)
    """Evaluations without a better dev loss before training stops; the best checkpoint is kept."""
    trainer: dict[str, Any] = {}
    """Goes to trl.SFTConfig untouched (learning_rate, num_train_epochs, per_device_train_batch_size, ...)."""


class VllmConfig(Section):
    """A vLLM server with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, which sees the run directory."""

    base_url: str = Field(min_length=1)
    """Up to and including /v1."""
    model: str
    """What it calls the student's base."""
    api_key_env: str | None = None
    """Environment variable with the key; null for a server without one."""
    concurrency: int = Field(64, ge=1)
    """Most rollouts in flight at once."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds for one rollout."""


class UpdateConfig(Section):
    """The on-policy update: AdamW on the adapter, at a constant rate, its state handed from round to round."""

    learning_rate: float = Field(1e-4, gt=0)
    batch_size: int = Field(8, ge=1)
    """Samples (or pairs) per optimiser step, over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Samples (or pairs) per forward pass; changes memory, never the gradient."""
    num_epochs: int = Field(1, ge=1)
    """Passes over a round's samples."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps of a round; overrides num_epochs."""
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class DiscriminatorConfig(Section):
    """A classifier that tells the teacher's text from the student's: a LoRA and a head, AdamW at a constant rate."""

    model: str | None = None
    """As `student.model`, or a small encoder; null: the student's own base, a second time in memory."""
    r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    batch_size: int = Field(8, ge=1)
    """Pairs per optimiser step; texts per forward pass when it scores."""
    warmup_steps: int = Field(40, ge=1)
    """Optimiser steps of the first round."""
    steps: int = Field(10, ge=1)
    """Of each later round."""
    heldout_fraction: float = Field(0.25, gt=0, lt=1)
    """Share of prompts that it never learns from; its accuracy is measured there."""


class LmEvalConfig(Section):
    """Tasks of lm-evaluation-harness, for the base model and the last checkpoint: `pip install 'blackbox-kd[lm-eval]'`.

    Most of them fetch their data sets from the hub.
    """

    tasks: list[str] = Field(min_length=1)
    """Names of tasks or groups; `lm-eval ls tasks` lists them."""
    limit: int | None = Field(None, ge=1)
    """The first so many questions of each task; null: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question; null: as the task says."""
    include_path: str | None = None
    """A folder with task files of your own."""


class EvaluateConfig(Section):
    """How checkpoints are compared."""

    max_completion_length: int = Field(256, ge=1)
    """Tokens, for the teacher's fixed answers and the student's greedy ones."""
    top_logprobs: int | None = Field(20, ge=0)
    """Alternatives kept with the teacher's fixed temperature-1 answers."""
    batch_size: int = Field(32, ge=1)
    bootstrap_samples: int = Field(2000, ge=100)
    every_steps: int | None = Field(50, ge=1)
    """Optimiser steps of `sft`, or of a round of `onpolicy`, from one look at the fixed set to the next; null: none."""
    diversity_prompts: int = Field(64, ge=0)
    """The first so many prompts of heldout and of ood: checkpoints answer them at temperature 1, too."""
    tasks: dict[str, str] = {}
    """What must not be forgotten: a name and a JSONL file of prompts with checkers, for each task."""
    lm_eval: LmEvalConfig | None = None
    gate: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """By task: how far the last checkpoint's share of right answers may be below the base model's; beyond it the
    command ends with exit code 5."""

    @model_validator(mode="after")
    def _gates_have_tasks(self) -> Self:
        harness = self.lm_eval.tasks if self.lm_eval else []
        if twice := sorted(self.tasks.keys() & set(harness)):
            raise ValueError(f"{twice[0]!r} is a task in tasks and in lm_eval.tasks; rename the one in tasks")
        names = {*self.tasks, *harness}
        if drops := sorted(name for name in names if name.removesuffix("_drop") in names - {name}):
            raise ValueError(f"task {drops[0]!r}: so the drop of another one is called; rename it")
        if unknown := sorted(self.gate.keys() - self.tasks.keys() - set(harness)):
            known = ", ".join([*self.tasks, *harness]) or "none"
            raise ValueError(f"gate: there is no task {unknown[0]!r} (known: {known})")
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; everybody who writes a learning rate means a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the loader would read as a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
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
    if colon and re.fullmatch(r"\w+(\.\w+)*", package) and len(package) > 1 and not Path(name).exists():
        try:
            spec = util.find_spec(package)
        except ModuleNotFoundError:  # the parent of a dotted name
            spec = None
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
        data = _read_yaml(path.read_text("utf-8"), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, it is a {type(data).__name__}")
    for key, value in overrides:
        _set(data, key.split("."), _read_yaml(value, f"--{key}"), key)
    return validate(model, data, str(path))


def dump_config(data: Mapping[str, Any]) -> str:
    """YAML that `load_config` reads back as the same values."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: not valid YAML: {' '.join(str(error).split())}") from error


def validate(model: type[ConfigT], data: Mapping[str, Any], source: str) -> ConfigT:
    """`data` as `model`; the first thing wrong with it as one line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # An unknown key first: a misspelt one is often also the one that is missing.
        found = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        problems = [_explain(model, item) for item in found]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {problems[0]}{more}") from error


def _set(data: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise ConfigError(f"--{key}: {part!r} is a value, not a section")
    data[path[-1]] = value


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    section, keys, names = _locate(model, error["loc"])
    where, kind, context = ".".join(keys), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {where!r}{_hint(model, section, keys)}"
    if kind == "missing":
        return f"{where}: this key is required"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = f"{context.get('tag')!r} is none of" if "tag" in context else "this key is required, one of"
        return f"{where}.{str(context['discriminator']).strip(chr(39))}: {tag} {', '.join(names)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: should be a section with keys of its own, it is {error['input']!r}"
    message = error["msg"].replace("Input should be", "should be").replace("Value error, ", "")
    if not keys:  # of several sections together; it names them
        return message
    seen = "" if isinstance(error["input"], Mapping) else f", it is {error['input']!r}"  # it may hold a secret
    return f"{where}: {message[:1].lower()}{message[1:]}{seen}"


def _locate(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[type[BaseModel], list[str], list[str]]:
    """(section, keys, names) of pydantic's location: keys as the user wrote them, names of the union it ends in."""
    section, keys, union = model, list[str](), dict[str, type[BaseModel]]()
    inside: Any = model  # what the next part is looked up in
    for part in map(str, loc):
        if part in union:
            inside = section = union[part]
            union = {}
        elif inside is section:
            keys.append(part)
            info = section.model_fields.get(part)
            if info is None:
                break
            members = _members(info.annotation)
            if info.discriminator:
                union = {str(m.model_fields[str(info.discriminator)].default): m for m in members}
            section = members[0] if members else section
            inside = section if members else info.annotation
        elif get_origin(inside) in (dict, list) and part != "[key]":  # not a type's name, as of `str | list[str]`
            keys.append(part)
    return section, keys, list(union)


def _hint(model: type[BaseModel], section: type[BaseModel], keys: list[str]) -> str:
    """What an unknown key may have meant: a key of its section, else one of another."""
    parent, fields = ".".join(keys[:-1]), [info.alias or name for name, info in section.model_fields.items()]
    if close := difflib.get_close_matches(keys[-1], fields, n=1):
        return f"; did you mean {'.'.join([*keys[:-1], close[0]])!r}?"
    elsewhere = [key for key, _ in walk(model) if key.rpartition(".")[2] == keys[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; known {f'in {parent}' if parent else 'here'}: {', '.join(sorted(fields))}"


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
