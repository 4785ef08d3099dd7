"""The one YAML: how a file and flags become a validated config. Nothing here imports torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources, util
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from blackbox_kd.errors import ConfigError


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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
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
        return f"{where}: should be a section with keys of its own, it is a {type(error['input']).__name__}"
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
        key, members = prefix + name, _members(info.annotation)
        if not members:
            default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
            if get_origin(info.annotation) is Literal:
                default = f"{', '.join(map(str, get_args(info.annotation)))}; {default}"
            yield key, f"{' '.join((info.description or '').split())} [{default}]".strip()
        elif info.discriminator:
            yield from _walk_union(members, str(info.discriminator), f"{key}.")
        else:
            yield from walk(members[0], f"{key}.")


def _walk_union(members: Sequence[type[BaseModel]], discriminator: str, prefix: str) -> Iterator[tuple[str, str]]:
    """The keys of all members; whose a key is, and where members explain it in other words, whose words."""
    names = [str(member.model_fields[discriminator].default) for member in members]
    told: dict[str, dict[str, list[str]]] = {}
    for name, member in zip(names, members, strict=True):
        for key, text in walk(member, prefix):
            told.setdefault(key, {}).setdefault(text, []).append(name)
    for key, texts in told.items():
        if key == prefix + discriminator:
            yield key, f"One of {', '.join(names)}. [required]"
        else:
            yield key, " | ".join(text if of == names else f"{', '.join(of)}: {text}" for text, of in texts.items())
