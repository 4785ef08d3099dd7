"""`status`: what a run does right now, what the corpus holds, what each run was billed, and how far it is.

    blackbox-kd status
    blackbox-kd status --full       # also reads the corpus of a run that goes on, between two of its writes

While a run asks, its progress comes from a small file beside the corpus; the corpus itself is not opened.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from blackbox_kd.command import OneLineParser, guarded
from blackbox_kd.corpus import query
from blackbox_kd.corpus.heartbeat import Heartbeat, read_heartbeats
from blackbox_kd.errors import CorpusBusy
from blackbox_kd.sql import add_corpus_flag, corpus_of, show

QUESTIONS = {
    "answers": "SELECT author, purpose, round, count(*) AS answers FROM completions JOIN requests USING (request_key) "
    "GROUP BY ALL ORDER BY ALL",
    "unanswered": "SELECT 'pending' AS state, count(*) AS requests FROM pending UNION ALL "
    "SELECT 'dead letters', count(*) FROM dead_letters",
    "spend": "SELECT run_dir, model, sum(calls)::BIGINT AS calls, sum(billed)::BIGINT AS billed, "
    "sum(unknown)::BIGINT AS unknown, sum(prompt_tokens)::BIGINT AS prompt_tokens, "
    "sum(completion_tokens)::BIGINT AS completion_tokens, sum(cost_usd) AS cost_usd "
    "FROM (SELECT * EXCLUDE (model) FROM spend) JOIN runs USING (run_id) GROUP BY ALL ORDER BY ALL",
    "heldout": "SELECT left(set_id, 8) AS fixed_set, run_dir, checkpoint, name, round(value, 3) AS value, "
    "round(lo, 3) AS lo, round(hi, 3) AS hi "
    "FROM leaderboard JOIN runs USING (run_id) WHERE split = 'heldout' AND name IN ('teacher_nll', 'tail_kl', 'chrf')",
}

BUSY_WAIT_S = 1.0
"""A person does not want to wait longer for somebody who holds the file."""


def lines(beat: Heartbeat) -> list[str]:
    """A heartbeat as a person reads it: where it is, how fast, what it costs, what went wrong last."""
    state = beat.state if beat.alive or beat.state == "ended" else "gone without saying so"
    ago = time.time() - beat.updated_at
    per_s = f"{beat.rate_per_s:.1f}/s" if beat.rate_per_s is not None else "rate unknown"
    found = [
        f"{beat.run_dir} ({state}, pid {beat.pid}, {duration(ago)} ago): {beat.description}",
        f"  {beat.done} of {'?' if beat.total is None else beat.total} done, {beat.cached} known before, "
        f"{beat.failed} failed, {beat.in_flight} in flight, {per_s}, {beat.limited_share:.0%} were 429, "
        f"{duration(beat.eta_s)} left",
        f"  spent {money(beat.spent_usd)}, {beat.spent_tokens} tokens, {beat.spent_requests} calls; "
        f"reserved {money(beat.reserved_usd)}; {caps(beat)}",
    ]
    return found + ([f"  last error: {beat.last_error}"] if beat.last_error else [])


def caps(beat: Heartbeat) -> str:
    """The limits that hold."""
    found = [f"{name} {value:g}" for name, value in (beat.cap or {}).items() if value is not None]
    return f"cap {', '.join(found)}" if found else "no cap"


def money(dollars: float | None) -> str:
    """Dollars, cents and the first fractions of a cent."""
    if dollars is None:
        return "$ unknown"
    return f"${dollars:.2f}" if dollars >= 1 else f"${round(dollars, 4) + 0.0:.4f}"  # a sum may end at -1e-19


def duration(seconds: float | None) -> str:
    """The two largest units."""
    if seconds is None:
        return "time unknown"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} m"
    return f"{minutes} m {rest} s" if minutes else f"{rest} s"


def shown(beats: list[Heartbeat]) -> list[Heartbeat]:
    """Those that are alive; where nobody is, the latest."""
    return [beat for beat in beats if beat.alive] or beats[:1]


def tables(path: Path) -> tuple[dict[str, Any], str]:
    """Each question's columns and rows, or why there are none."""
    try:
        return {name: query(path, sql, wait_s=BUSY_WAIT_S) for name, sql in QUESTIONS.items()}, ""
    except CorpusBusy as error:
        return {}, str(error)


def print_json(path: Path, beats: list[Heartbeat], found: dict[str, Any], note: str) -> None:
    """Everything as one object."""
    rows = {name: [dict(zip(columns, r, strict=True)) for r in rows] for name, (columns, rows) in found.items()}
    live = [beat.as_dict() for beat in beats]
    print(json.dumps({"corpus": str(path), "live": live, "note": note or None, **rows}, default=str))


def print_text(beats: list[Heartbeat], found: dict[str, Any], note: str) -> None:
    """For a person."""
    for line in [line for beat in beats for line in lines(beat)]:
        print(line)
    for name, (columns, rows) in found.items():
        print(f"\n{name}")
        show(columns, rows)
    if note:
        print(note)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(
        prog="blackbox-kd status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_flag(parser)
    parser.add_argument("--full", action="store_true", help="read the corpus although a run goes on")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        path = corpus_of(flags.corpus)
        beats = shown(read_heartbeats(path.with_name(path.name + ".journal")))
        if any(beat.alive for beat in beats) and not flags.full:
            found: dict[str, Any] = {}
            note = "a run goes on: the corpus was not opened (`status --full` opens it)"
        else:
            found, note = tables(path)
        if flags.json:
            print_json(path, beats, found, note)
        else:
            print_text(beats, found, note)
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
