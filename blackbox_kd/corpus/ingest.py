"""Journal records -> rows. Ingesting a record twice changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import duckdb
import msgspec
import pyarrow as pa

from blackbox_kd.corpus import logprobs
from blackbox_kd.corpus.connection import transaction
from blackbox_kd.corpus.journal import Answered, Record, Sent
from blackbox_kd.corpus.logprobs import Vocabs
from blackbox_kd.types import Completion, Scores

Row = dict[str, Any]


WITH_COMPLETION = "AND EXISTS (FROM completions AS c WHERE c.completion_id = batch.completion_id::UUID)"
"""A second answer to a question is left out (two runs asked at once), and so are its logprobs."""
REFUSALS = (duckdb.DataError, duckdb.IntegrityError, duckdb.InvalidInputException, ValueError, OverflowError)
"""What is wrong with a record, by DuckDB, Arrow or Python, and not with the disk or the file."""
UUID_KEY = "::UUID"
KEYS = {
    "prompts": {"prompt_id": UUID_KEY},
    "requests": {"request_key": UUID_KEY},
    "attempts": {"attempt_id": UUID_KEY},
    "completions": {"request_key": UUID_KEY, "choice_idx": ""},  # completion_id is a hash of them and the text
    "logprobs": {"completion_id": UUID_KEY, "scorer": ""},
    "vocab": {"model": "", "token_id": ""},
    "feedback": {"feedback_id": UUID_KEY},
    "dead_letters": {"request_key": UUID_KEY},
}
"""What makes a row of a table the same row, and the type that Arrow lacks."""


def insert(con: duckdb.DuckDBPyConnection, table: str, rows: list[Row], *, replace: bool = False) -> None:
    """Insert rows through Arrow; a row whose key is there already is left (or replaced)."""
    if not rows:
        return
    schema = con.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table().schema
    # Columns that no row names keep their NULL.
    insert_table(con, table, pa.Table.from_pylist(rows, schema=schema), replace=replace)


def insert_table(
    con: duckdb.DuckDBPyConnection, table: str, batch: pa.Table, *, replace: bool = False, only_with: str = ""
) -> None:
    """Insert an Arrow table; see `insert`. `only_with` is a further condition on its rows.

    INSERT OR IGNORE takes quadratic time where a table has two unique keys (16,000 rows: 78 s), hence the anti-join.
    """
    con.register("batch", batch if replace else batch.take(_new(con, table, batch, only_with)))
    con.execute(f"INSERT {'OR REPLACE' if replace else ''} INTO {table} BY NAME SELECT * FROM batch")
    con.unregister("batch")


def _new(con: duckdb.DuckDBPyConnection, table: str, batch: pa.Table, only_with: str) -> pa.Array:
    """Places of the rows to insert. They are found by their keys alone: rows are wide."""
    con.register("batch", batch.select([*KEYS[table]]).append_column("place", pa.array(range(len(batch)))))
    same = " AND ".join(f"known.{key} = batch.{key}{cast}" for key, cast in KEYS[table].items())
    places = con.execute(
        f"""SELECT min(place) FROM batch
            WHERE NOT EXISTS (FROM {table} AS known WHERE {same}) {only_with}
            GROUP BY {", ".join(KEYS[table])}"""
    ).fetchall()
    con.unregister("batch")
    return pa.array(sorted(place for (place,) in places), pa.int64())


def ingest(
    con: duckdb.DuckDBPyConnection, records: Sequence[Record], vocabs: Vocabs, *, orphaned: bool = False
) -> list[tuple[Record, str]]:
    """Store all records in one transaction, but for those that DuckDB refuses: these are returned, with why.

    `orphaned`: their process is gone, so what was sent and never answered is known to be lost.
    """
    answered = [r for r in records if isinstance(r, Answered)]
    settled = {r.attempt.attempt_id for r in answered}
    lost = [r for r in records if isinstance(r, Sent) and r.attempt_id not in settled] if orphaned else []
    return _store(con, [*answered, *lost], vocabs)


def _store(con: duckdb.DuckDBPyConnection, records: list[Record], vocabs: Vocabs) -> list[tuple[Record, str]]:
    """All of them; else each half, down to the records that are refused."""
    try:
        _transact(con, records, vocabs)
    except REFUSALS as error:
        vocabs.forget()
        if len(records) == 1:
            return [(records[0], " ".join(str(error).split()))]
        half = len(records) // 2
        return _store(con, records[:half], vocabs) + _store(con, records[half:], vocabs)
    return []


def _transact(con: duckdb.DuckDBPyConnection, records: list[Record], vocabs: Vocabs) -> None:
    answered = [r for r in records if isinstance(r, Answered)]
    lost = [_lost_row(r) for r in records if isinstance(r, Sent)]
    with transaction(con):
        insert(con, "attempts", [_attempt_row(r) for r in answered] + lost)
        insert(con, "completions", [completion_row(c, r.attempt.run_id, r.attempt.attempted_at)
                                    for r in answered for c in r.completions])  # fmt: skip
        insert_logprobs(con, [(c, r.scorer) for r in answered for c in r.completions if c.logprobs], vocabs)
        insert_logprobs(con, [(r.scores, r.scorer) for r in answered if r.scores], vocabs, only_with="")
        insert(con, "dead_letters", [_dead_row(r) for r in answered if r.dead_letter])


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
    del row["logprobs"], row["text_bytes"]
    return row | usage | {"run_id": run_id, "created_at": timestamp(created_at)}


def insert_logprobs(
    con: duckdb.DuckDBPyConnection,
    scored: Sequence[tuple[Completion | Scores, str]],
    vocabs: Vocabs,
    *,
    only_with: str = WITH_COMPLETION,
) -> None:
    """Rows of `logprobs` and the new tokens of `vocab`; `scored` = (what has logprobs, scorer)."""
    for model in {c.model for c, _ in scored}:
        vocab = vocabs.of(con, model)
        batch = logprobs.table([(c, by) for c, by in scored if c.model == model], vocab)
        insert(con, "vocab", vocab.new)
        vocab.new = []
        insert_table(con, "logprobs", batch, only_with=only_with)
