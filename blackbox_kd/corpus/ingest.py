"""Journal records -> rows. Ingesting a record twice changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import duckdb
import msgspec
import pyarrow as pa

from blackbox_kd.corpus.journal import Answered, Record, Sent
from blackbox_kd.types import Completion, TokenLogprob, TopLogprob

Row = dict[str, Any]

SENTINEL_LOGPROB = -9999.0
"""OpenAI's stand-in for `not among the likeliest`; stored as NULL."""


def insert(con: duckdb.DuckDBPyConnection, table: str, rows: list[Row], *, replace: bool = False) -> None:
    """Insert rows through Arrow; a row whose key is there already is left (or replaced)."""
    if not rows:
        return
    schema = con.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table().schema
    # Columns that no row names keep their NULL.
    batch = pa.Table.from_pylist(rows, schema=schema)
    con.register("batch", batch)
    con.execute(f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO {table} BY NAME SELECT * FROM batch")
    con.unregister("batch")


def ingest(con: duckdb.DuckDBPyConnection, records: Sequence[Record], *, orphaned: bool = False) -> None:
    """One transaction. `orphaned`: their process is gone, so what was sent and never answered is known to be lost."""
    answered = [r for r in records if isinstance(r, Answered)]
    attempts = [_attempt_row(r) for r in answered]
    if orphaned:
        settled = {r.attempt.attempt_id for r in answered}
        attempts += [_lost_row(r) for r in records if isinstance(r, Sent) and r.attempt_id not in settled]
    con.execute("BEGIN")
    try:
        insert(con, "attempts", attempts)
        insert(con, "completions", [completion_row(c, r.attempt.run_id, r.attempt.attempted_at)
                                    for r in answered for c in r.completions])  # fmt: skip
        scored = [(c, r.scorer) for r in answered for c in r.completions if c.logprobs]
        insert_logprobs(con, scored)
        insert(con, "dead_letters", [_dead_row(r) for r in answered if r.dead_letter])
        con.execute("COMMIT")
    except BaseException:
        con.execute("ROLLBACK")
        raise


def timestamp(seconds: float) -> datetime:
    """Seconds since the epoch as DuckDB takes them."""
    return datetime.fromtimestamp(seconds, UTC)


def _attempt_row(record: Answered) -> Row:
    row = msgspec.structs.asdict(record.attempt)
    usage = msgspec.structs.asdict(row.pop("usage"))
    return row | usage | {"attempted_at": timestamp(record.attempt.attempted_at)}


def _lost_row(record: Sent) -> Row:
    return {
        "attempt_id": record.attempt_id,
        "request_key": record.request_key,
        "run_id": record.run_id,
        "error": "in flight when the process died",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "attempted_at": timestamp(record.attempted_at),
    }


def _dead_row(record: Answered) -> Row:
    attempt = record.attempt
    return {
        "request_key": attempt.request_key,
        "status": attempt.status,
        "error": attempt.error or "",
        "run_id": attempt.run_id,
        "created_at": timestamp(attempt.attempted_at),
    }


def completion_row(completion: Completion, run_id: str, created_at: float) -> Row:
    """A row of `completions`."""
    row = msgspec.structs.asdict(completion)
    usage = msgspec.structs.asdict(row.pop("usage"))
    row.pop("logprobs")
    return row | usage | {"run_id": run_id, "created_at": timestamp(created_at)}


def insert_logprobs(con: duckdb.DuckDBPyConnection, scored: list[tuple[Completion, str]]) -> None:
    """Rows of `logprobs` and the new tokens of `vocab`; `scored` = (completion with logprobs, scorer)."""
    rows = []
    for model in {c.model for c, _ in scored}:
        vocab = _Vocab(con, model)
        rows += [logprobs_row(c, by, vocab) for c, by in scored if c.model == model]
        insert(con, "vocab", vocab.new)
    insert(con, "logprobs", rows)


class _Vocab:
    """Token ids of one model: the endpoint's own, else -1, -2, ... in order of arrival."""

    def __init__(self, con: duckdb.DuckDBPyConnection, model: str) -> None:
        known = con.execute("SELECT token_id, text, bytes FROM vocab WHERE model = ?", [model]).fetchall()
        self.model = model
        self.new: list[Row] = []
        self._ids = {token_id for token_id, _, _ in known}
        self._interned = {(text, raw): token_id for token_id, text, raw in known if token_id < 0}

    def id_of(self, token: TopLogprob) -> int:
        raw = bytes(token.bytes) if token.bytes is not None else None
        token_id = token.id
        if token_id is None:
            token_id = self._interned.setdefault((token.token, raw), -len(self._interned) - 1)
        if token_id not in self._ids:
            self._ids.add(token_id)
            self.new.append({"model": self.model, "token_id": token_id, "text": token.token, "bytes": raw})
        return token_id


def logprobs_row(completion: Completion, scorer: str, vocab: _Vocab) -> Row:
    """A row of `logprobs`: flat lists, T tokens and T * k alternatives."""
    tokens: list[TokenLogprob] = completion.logprobs or []
    k = max((len(t.top_logprobs) for t in tokens), default=0)
    slots = [slot for t in tokens for slot in [*t.top_logprobs, *[None] * (k - len(t.top_logprobs))]]
    return {
        "completion_id": completion.completion_id,
        "scorer": scorer,
        "token_ids": [vocab.id_of(t) for t in tokens],
        "token_logprobs": [_stored(t.logprob) for t in tokens],
        "top_ids": [None if slot is None else vocab.id_of(slot) for slot in slots],
        "top_logprobs": [None if slot is None else _stored(slot.logprob) for slot in slots],
        "k": k,
        "missing_mass": [_missing_mass(t) for t in tokens],
    }


def _stored(logprob: float) -> float | None:
    return None if logprob <= SENTINEL_LOGPROB else round(logprob, 3)


def _missing_mass(token: TokenLogprob) -> float:
    shown = math.fsum(math.exp(t.logprob) for t in token.top_logprobs if t.logprob > SENTINEL_LOGPROB)
    return max(0.0, 1.0 - shown)
