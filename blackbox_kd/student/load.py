"""Models from a hub id, a folder or a GGUF file. Only safetensors and GGUF are read, and no remote code is run."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from blackbox_kd.config import find_file
from blackbox_kd.errors import ConfigError, ModelError
from blackbox_kd.hashing import content_id, file_hash
from blackbox_kd.progress import say
from blackbox_kd.sections import StudentConfig

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Weights, config, tokenizer and chat template."""


def cache_dir() -> Path:
    """Where converted models are kept: $BLACKBOX_KD_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BLACKBOX_KD_CACHE") or Path(base) / "blackbox_kd")


def pick_device(config: StudentConfig) -> torch.device:
    """The device that the config names; auto: cuda, else mps, else cpu."""
    if config.device != "auto":
        try:
            torch.empty(0, device=config.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"student.device {config.device!r} cannot be used here: {reason:.120}") from error
        return torch.device(config.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(config: StudentConfig, device: torch.device) -> torch.dtype:
    """The dtype that the config names; auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def model_source(name: str) -> str:
    """What transformers loads for `student.model`; a GGUF is converted on first use.

    Raises:
        ModelError: there is no such file, or it cannot be converted.
    """
    if not name.endswith(".gguf"):
        return name
    try:
        return str(_converted(find_file(name, "student.model")))
    except ConfigError as error:
        raise ModelError(str(error)) from error


def load_base(config: StudentConfig) -> tuple[Any, Any]:
    """Model (in eval mode, on its device) and tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    source = model_source(config.model)
    device = pick_device(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=pick_dtype(config, device), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"student.model {config.model!r} cannot be loaded: {reason}") from error
    return model.to(device).eval(), tokenizer


def base_id(name: str, model: Any) -> str:
    """What `student.model` is, whatever its name: its commit on the hub, else a hash of its files."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit is not None:
        return str(commit)
    path = find_file(name, "student.model")
    if path.is_file():
        return _file_hash(path, path.stat().st_mtime_ns)[:32]
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES)
    return content_id([[file.name, _file_hash(file, file.stat().st_mtime_ns)] for file in files])


@functools.cache
def _file_hash(path: Path, changed_at: int) -> str:
    """Once a process: each checkpoint is evaluated on the same base."""
    return file_hash(path)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, by the model's generation config and its tokenizer."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]


def _converted(gguf: Path) -> Path:
    """A folder with the safetensors of a GGUF file: loading a GGUF costs half a minute each time."""
    target = cache_dir() / f"{gguf.stem}-{_file_hash(gguf, gguf.stat().st_mtime_ns)[:12]}"
    if (target / "config.json").exists():
        return target
    say(f"converting {gguf.name} to safetensors, once (into {target})")
    hf_logging.disable_progress_bar()
    try:
        dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # the GGUF readers raise whatever they meet in a broken file
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelError(f"student.model {gguf} cannot be read: {reason[0]}") from error
    # transformers refuses to save what it believes to be quantised: the same weights in a plain model of that class.
    config = dequantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(dequantised)(config)
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    model.generation_config = dequantised.generation_config
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return target
