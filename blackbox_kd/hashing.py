"""Content hashes: the same content has the same id in every run, on every machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no blanks, no NaN."""
    return _canonical.encode(value)


def content_id(value: Any) -> str:
    """First 128 bits of sha256 over the canonical JSON, written as a UUID (DuckDB stores it in 16 bytes)."""
    digits = hashlib.sha256(canonical_json(value).encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"


def file_hash(path: Path) -> str:
    """sha256 of a file, 32 hex digits of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def draw_seed(seed: int, messages: Any, sample_idx: int) -> int:
    """A 31-bit seed for one draw of one question.

    Each question has its own: servers draw by a generator that starts from the seed, so that under a shared one the
    same token of every answer would be drawn by the same random number.
    """
    return int(content_id([seed, messages, sample_idx])[:8], 16) >> 1


def phase_seed(seed: int, round_: int, phase: str) -> int:
    """A 31-bit seed for one phase of one round, so that a resumed round repeats what a killed one did."""
    digest = hashlib.sha256(f"{seed}/{round_}/{phase}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
