"""What a corpus knows of calls that are still to come, for `plan`: read-only, and never for long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from blackbox_kd.corpus.connection import READ_WAIT_S, connect
from blackbox_kd.types import Purpose

RECENT = 2000
"""Answered calls that are looked at, the latest."""
PAUSE_S = 60.0
"""A longer pause between two answers is one between two runs."""


class History(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's recent calls went; None where there were none."""

    answers: int = 0
    """Calls that these numbers are from."""
    tokens_per_byte: float | None = None
    """Prompt tokens for a byte of the messages' JSON."""
    rate_per_s: float | None = None
    """Answers."""
    prompt_tokens: dict[str, float] = {}
    """Mean of a call, by purpose."""
    completion_tokens: dict[str, float] = {}
    """Mean of a call, by purpose."""


_RECENT = f"""WITH recent AS (
    SELECT purpose, prompt_tokens, completion_tokens, latency_s,
           strlen((body->'messages')::VARCHAR) AS bytes, epoch(attempted_at) + latency_s AS answered_at
    FROM calls WHERE model = ? AND status = 200 AND error IS NULL AND completion_tokens > 0
    ORDER BY attempted_at DESC LIMIT {RECENT})"""

_BY_PURPOSE = f"""{_RECENT} SELECT purpose, count(*), avg(prompt_tokens), avg(completion_tokens),
    sum(prompt_tokens), sum(bytes) FROM recent GROUP BY purpose"""

_RATE = f"""{_RECENT}, gaps AS (
    SELECT answered_at - lag(answered_at) OVER (ORDER BY answered_at) AS gap, latency_s FROM recent)
    SELECT count(*) / sum(gap) FROM gaps WHERE gap < {PAUSE_S} + coalesce(latency_s, 0) HAVING sum(gap) > 0"""


def history(path: Path, model: str) -> History:
    """Of the calls to this model; an empty one where there is no such corpus."""
    if not path.exists():
        return History()
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        rows = con.execute(_BY_PURPOSE, [model]).fetchall()
        rate = con.execute(_RATE, [model]).fetchall()
    size = sum(row[5] or 0 for row in rows)
    return History(
        answers=sum(row[1] for row in rows),
        tokens_per_byte=(sum(row[4] for row in rows) / size or None) if size else None,
        rate_per_s=rate[0][0] if rate else None,
        prompt_tokens={row[0]: row[2] for row in rows},
        completion_tokens={row[0]: row[3] for row in rows},
    )


def probed(path: Path, model: str, address: str) -> dict[str, Any]:
    """What `probe` found of a model at an address, by name; empty where it did not look, or there is no corpus."""
    if not path.exists():
        return {}
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        sql = "SELECT name, value FROM capabilities WHERE model = ? AND base_url = ?"
        return {name: msgspec.json.decode(value) for name, value in con.execute(sql, [model, address]).fetchall()}


def known(path: Path, keys: Sequence[str]) -> tuple[set[str], set[str]]:
    """Those of these requests that are answered, and those that are dead letters; none where there is no corpus."""
    if not path.exists():
        return set(), set()
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        answered, dead = (
            {
                str(key)
                for (key,) in con.execute(
                    f"""SELECT DISTINCT request_key FROM {table}
                        SEMI JOIN (SELECT unnest(?::UUID[]) AS request_key) USING (request_key)""",
                    [list(keys)],
                ).fetchall()
            }
            for table in ("answered", "dead_letters")
        )
    return answered, dead - answered


def judged(path: Path, model: str, purpose: Purpose, prompt_ids: Sequence[str]) -> int:
    """Answered questions to a judge about answers to these prompts; 0 where there is no corpus."""
    if not path.exists():
        return 0
    sql = """SELECT count(*) FROM requests SEMI JOIN answered USING (request_key)
             SEMI JOIN (SELECT unnest(?::UUID[]) AS prompt_id) USING (prompt_id)
             WHERE purpose = ? AND model = ?"""
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        ((found,),) = con.execute(sql, [list(prompt_ids), purpose, model]).fetchall()
    return int(found)
