"""Collecting, measured beside its rival and its ideal: one server process, one client process an arm, one JSON object.

    python benchmarks/collect.py --json

Loopback on shared cores: trust ratios and CPU more than absolute rates. Arms alternate; what is shown is the median.
  speedup_vs_sdk, cpu_ratio_vs_sdk   50 tokens x top-5, 64 in flight: answers into DuckDB, journal on, against
                                     AsyncOpenAI behind a semaphore, which stores nothing (see arms.py)
  cpu_ratio_vs_sdk_top20             the same at 300 tokens x top-20
  overrun_of_ideal, wasted_share     an unknown limit of 50 requests/s (burst 50, latency 0.4 s, Retry-After): time from
                                     the first question to the last row beyond the ideal one; 429s by answers
  share_of_ideal_512                 512 in flight at 0.5 s: answers/s over 1024/s, from the first fifth of 10,000 (the
                                     slow start) to the last row in DuckDB
  bytes_per_token_top20              of a compacted corpus of real answers, see storage.py
  calls_added_prompt, calls_renamed  calls of `sample` after one prompt more than 10,000 that are done; after another
                                     base_url, run directory and template name, see again.py
  sql_seconds                        mean sampled logprob of 10,000 answers x 200 tokens, file opened for it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from again import calls_again
from arms import Job, Measured, measure
from servers import Options, server
from storage import bytes_per_token, sql_seconds

RATE, LATENCY_S, LIMITED = 50, 0.4, 1500
WIDE, WIDE_LATENCY_S = 512, 0.5

Part = dict[str, Any]
"""Keys of the result, and under `raw` what they were made of."""


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _summary(runs: list[Measured]) -> dict[str, Any]:
    """Medians, and each run."""
    shown = {name: statistics.median(getattr(run, name) for run in runs) for name in ("per_s", "cpu_ms", "peak_mb")}
    return {**shown, "runs": [msgspec.structs.asdict(run) for run in runs]}


def _versus(tokens: int, top: int, counts: dict[str, int], repeats: int) -> dict[str, Any]:
    """Engine and SDK in turn on the same server; summary by arm."""
    runs: dict[str, list[Measured]] = {arm: [] for arm in counts}
    with server(Options(tokens=tokens, top=top)) as api:
        for _ in range(repeats):
            for arm, count in counts.items():
                job = Job(arm=arm, url=api.url, count=count, warmup=max(64, count // 10), tokens=tokens, top=top)  # type: ignore[arg-type]
                runs[arm].append(measure(job))
                _say(f"{tokens} x top-{top} {arm}: {runs[arm][-1].per_s:.0f}/s, {runs[arm][-1].cpu_ms:.2f} ms CPU")
    return {arm: _summary(found) for arm, found in runs.items()}


def small(scale: float, repeats: int, _: Path) -> Part:
    """50 tokens x top-5."""
    found = _versus(50, 5, {"engine": round(6000 * scale), "sdk": round(1200 * scale)}, repeats)
    return {
        "speedup_vs_sdk": found["engine"]["per_s"] / found["sdk"]["per_s"],
        "cpu_ratio_vs_sdk": found["engine"]["cpu_ms"] / found["sdk"]["cpu_ms"],
        "raw": found,
    }


def large(scale: float, repeats: int, _: Path) -> Part:
    """300 tokens x top-20."""
    found = _versus(300, 20, {"engine": round(500 * scale), "sdk": round(150 * scale)}, repeats)
    return {"cpu_ratio_vs_sdk_top20": found["engine"]["cpu_ms"] / found["sdk"]["cpu_ms"], "raw": found}


def limited(scale: float, _: int, __: Path) -> Part:
    """An unknown limit."""
    count = max(2 * RATE, round(LIMITED * scale))
    with server(Options(tokens=50, top=5, latency_s=LATENCY_S, rate=RATE)) as api:
        run = measure(Job(arm="engine", url=api.url, count=count))
        stats = api.stats()
    ideal_s, seconds = (count - RATE) / RATE + LATENCY_S, run.ended_at - stats["first_received"]
    _say(f"unknown limit: {seconds:.1f} s, ideal {ideal_s:.1f} s, {stats['rejected']} calls rejected")
    return {
        "overrun_of_ideal": (seconds - ideal_s) / ideal_s,
        "wasted_share": stats["rejected"] / count,
        "raw": {"seconds": seconds, "ideal_s": ideal_s, "rejected": stats["rejected"], "answers": run.answers},
    }


def wide(scale: float, repeats: int, __: Path) -> Part:
    """Many in flight."""
    with server(Options(tokens=50, top=5, latency_s=WIDE_LATENCY_S)) as api:
        runs = []
        for _ in range(repeats):
            runs.append(measure(Job(arm="engine", url=api.url, count=round(10_000 * scale), concurrency=WIDE)))
            _say(f"{WIDE} in flight: {runs[-1].per_s_steady:.0f}/s steady, {runs[-1].per_s:.0f}/s with slow start")
        most = api.stats()["most_in_flight"]
    ideal = WIDE / WIDE_LATENCY_S
    return {
        "share_of_ideal_512": statistics.median(run.per_s_steady for run in runs) / ideal,
        "raw": {"share_with_slow_start": statistics.median(run.per_s for run in runs) / ideal,
                "most_in_flight": most, **_summary(runs)},
    }  # fmt: skip


def stored(scale: float, _: int, out: Path) -> Part:
    """Bytes on disk."""
    found = bytes_per_token(out, max(8, round(60 * scale)))
    _say(f"{found['bytes_per_token_top20']:.1f} bytes per token x top-20 over {found['real_tokens']} real tokens")
    return {"bytes_per_token_top20": found.pop("bytes_per_token_top20"), "raw": found}


def queried(scale: float, _: int, out: Path) -> Part:
    """Seconds of a query."""
    seconds = sql_seconds(out, max(100, round(10_000 * scale)))
    _say(f"mean sampled logprob in SQL: {seconds:.3f} s")
    return {"sql_seconds": seconds, "raw": {}}


def again(scale: float, _: int, __: Path) -> Part:
    """What is asked once more."""
    found: Part = dict(calls_again(max(10, round(10_000 * scale))))
    _say(f"calls for one more prompt: {found['calls_added_prompt']}, after renaming: {found['calls_renamed']}")
    return found | {"raw": {}}


PARTS: dict[str, Callable[[float, int, Path], Part]] = {
    "small": small,
    "large": large,
    "limited": limited,
    "wide": wide,
    "stored": stored,
    "queried": queried,
    "again": again,
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="leaves the other keys out")
    parser.add_argument("--repeats", type=int, default=3, help="of each arm")
    parser.add_argument("--scale", type=float, default=1.0, help="fewer questions; numbers are then no numbers")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="keeps the corpus of real answers")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    for name in flags.only:
        part = PARTS[name](flags.scale, flags.repeats, flags.out)
        raw[name] = part.pop("raw")
        found |= part
    settings = {"repeats": flags.repeats, "scale": flags.scale, "cores": os.cpu_count()}
    if flags.json:
        print(json.dumps({**found, "settings": settings, "raw": raw}, indent=1))
    else:
        print("\n".join(f"{name:24} {value:.4g}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
