"""How far a run is, as a small file beside the journal: read without touching DuckDB's lock."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

FRESH_S = 15.0
"""A run writes about every second; one that has not for so long has stopped, or is stuck."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """What a run says of itself while it asks; times are seconds since the epoch, durations seconds."""

    run_id: str
    run_dir: str
    pid: int
    description: str
    """What it is asking."""
    total: int | None
    """Questions, where they can be counted beforehand."""
    done: int = 0
    """Of those, answered now."""
    cached: int = 0
    """Of those, answered before."""
    in_flight: int = 0
    window: float | None = None
    """Calls that may be in flight."""
    rate_per_s: float | None = None
    """Answers; None as long as it is not known."""
    limited_share: float = 0.0
    """429s in all calls."""
    failed: int = 0
    spent_usd: float | None = None
    """None where the price is not known."""
    spent_tokens: int = 0
    spent_requests: int = 0
    reserved_usd: float | None = None
    """The worst case of what is in flight."""
    cap: dict[str, float | None] | None = None
    """max_usd, max_tokens, max_requests, where there are any."""
    eta_s: float | None = None
    last_error: str | None = None
    started_at: float
    updated_at: float
    state: Literal["running", "draining", "ended"] = "running"

    @property
    def alive(self) -> bool:
        """Whether somebody is asking right now."""
        return self.state != "ended" and time.time() - self.updated_at < FRESH_S and _exists(self.pid)

    def as_dict(self) -> dict[str, Any]:
        """With `alive`, for --json."""
        return {**msgspec.to_builtins(self), "alive": self.alive}


def write_heartbeat(folder: Path, heartbeat: Heartbeat) -> None:
    """Replace `<run_id>.status.json` in the journal's folder; a full disk is no reason to stop a run."""
    path = folder / f"{heartbeat.run_id}.status.json"
    partial = path.with_suffix(".partial")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.encode(heartbeat))
        partial.replace(path)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """All of a corpus, the latest first; one that another version wrote is left out."""
    found = []
    for path in folder.glob("*.status.json"):
        with suppress(OSError, msgspec.DecodeError):
            found.append(msgspec.json.decode(path.read_bytes(), type=Heartbeat))
    return sorted(found, key=lambda heartbeat: heartbeat.updated_at, reverse=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True
