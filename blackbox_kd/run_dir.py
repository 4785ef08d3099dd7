"""The run directory: who the run is, its config, its metrics and its checkpoints. A checkpoint commits by rename.

runs/x/run.json             run_id, kept over restarts
runs/x/config.yaml          the resolved config; `--config runs/x/config.yaml` repeats the run
runs/x/metrics.jsonl        one metric a line, as in the corpus table `metrics`
runs/x/checkpoints/sft/     a PEFT adapter with its model card; round-1/, round-2/, ...
runs/x/summary.json         what `evaluate` found and what was spent
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from blackbox_kd.config import dump_config
from blackbox_kd.errors import ConfigError
from blackbox_kd.hashing import content_id, file_hash

SETTINGS_FILE = "settings.json"
"""In each checkpoint: the sections of the config that made it."""
NEWER_SECTIONS = {"curate": "curation"}
"""Sections of which checkpoints of earlier versions say nothing, and what they brought."""
ADAPTER_FILE = "adapter_model.safetensors"
"""In each checkpoint: its weights, as PEFT names them."""


class RunDir:
    """One process at a time; use as a context manager.

    Raises:
        ConfigError: another process is running in this directory, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / "run.lock").open("w")
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write in {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"{path} is in use by another run; wait for it or choose another --run_dir") from error
        identity = path / "run.json"
        if not identity.exists():
            write_atomically(identity, json.dumps({"run_id": str(uuid.uuid4()), "created_at": time.time()}))
        self.run_id = str(json.loads(identity.read_text())["run_id"])

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.close()

    def save_config(self, config: Mapping[str, Any]) -> None:
        """The resolved config, in the form that `--config` reads."""
        write_atomically(self.path / "config.yaml", dump_config(config))

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Append metric rows to metrics.jsonl (the corpus holds the same, upserted)."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """summary.json; returns its path."""
        path = self.path / "summary.json"
        write_atomically(path, json.dumps(summary, indent=2) + "\n")
        return path

    def checkpoint(self, name: str) -> Path:
        """Where a checkpoint is, or will be."""
        return self.path / "checkpoints" / name

    def checkpoints(self) -> list[str]:
        """Committed checkpoints in the order in which they were trained."""
        return committed(self.path)

    @contextmanager
    def committing(self, name: str, settings: Mapping[str, Any]) -> Iterator[Path]:
        """A folder to fill; it becomes the checkpoint `name` when the block ends without an error."""
        final = self.checkpoint(name)
        partial = final.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        write_atomically(partial / SETTINGS_FILE, json.dumps(settings, sort_keys=True, indent=2))
        shutil.rmtree(final, ignore_errors=True)  # left from before an earlier checkpoint was deleted and made anew
        partial.rename(final)

    def done(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether the checkpoint exists already.

        Raises:
            ConfigError: it was made with other settings, so going on would mix two experiments.
        """
        if name not in self.checkpoints():
            return False
        made = made_with(self.path, name)
        if why := _differing(made, json.loads(json.dumps(settings))):
            raise ConfigError(
                f"{self.checkpoint(name)} was made {why}; choose another --run_dir, or delete that folder and the "
                "later ones"
            )
        return True


def _differing(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How settings were others than those that are wanted."""
    for section, brought in NEWER_SECTIONS.items():
        if section in wanted and section not in made:
            return f"before {brought} existed (the section {section})"
    old, new = flatten(made), flatten(wanted)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"with {key} {old.get(key)!r}, the config now says {new.get(key)!r}"
    return None


def committed(path: Path) -> list[str]:
    """Checkpoints of the run directory `path` in the order in which they were trained; none where there is no such."""
    found = [file.parent.name for file in (path / "checkpoints").glob(f"*/{SETTINGS_FILE}")]
    # A kill just before the rename leaves a whole folder under its partial name.
    return sorted((name for name in found if re.fullmatch(r"sft|round-\d+", name)), key=round_of)


def made_with(path: Path, name: str) -> dict[str, Any]:
    """The settings of a committed checkpoint of the run directory `path`."""
    return dict(json.loads((path / "checkpoints" / name / SETTINGS_FILE).read_text()))


def round_of(checkpoint: str) -> int:
    """base -> -1, sft -> 0, round-N -> N: the order of training."""
    if checkpoint.startswith("round-"):
        return int(checkpoint.removeprefix("round-"))
    return {"base": -1, "sft": 0}[checkpoint]


def policy_of(base: str, adapter: Path | None) -> str:
    """Hash of the base's hash and of an adapter on it, `base:HASH` without one; the names of both are not in it."""
    return f"base:{base}" if adapter is None else content_id([base, file_hash(adapter / ADAPTER_FILE)])


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
