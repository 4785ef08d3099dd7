"""Rows of `logprobs` -> arrays, for alignment: no object for each of millions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa

from blackbox_kd.types import TeacherTokens, VocabToken

_TOKENS = """SELECT completion_id::VARCHAR AS completion_id, k, token_ids, token_logprobs, top_ids, top_logprobs
FROM logprobs WHERE scorer = $2 AND completion_id IN (SELECT unnest($1::UUID[]))"""


def tokens(con: duckdb.DuckDBPyConnection, completion_ids: Sequence[str], scorer: str) -> dict[str, TeacherTokens]:
    """completion_id -> T tokens and (T, K) alternatives of one scorer."""
    found = con.sql(_TOKENS, params=[list(completion_ids), scorer]).to_arrow_table()
    ids, values = _lists(found, "token_ids", 0), _lists(found, "token_logprobs", np.nan)
    top_ids, top_values = _lists(found, "top_ids", 0), _lists(found, "top_logprobs", -np.inf)
    shapes = [(len(row), k) for row, k in zip(ids, found["k"].to_pylist(), strict=True)]
    return {
        completion_id: TeacherTokens(ids[i], values[i], top_ids[i].reshape(shapes[i]), top_values[i].reshape(shapes[i]))
        for i, completion_id in enumerate(found["completion_id"].to_pylist())
    }


def whole(con: duckdb.DuckDBPyConnection, scorer: str, limit: int) -> list[tuple[str, str]]:
    """(completion_id, text) of whole answers of the sequence-level stage with alternatives by `scorer`."""
    return con.execute(
        """SELECT c.completion_id::VARCHAR, c.text FROM completions c JOIN requests r USING (request_key)
             JOIN logprobs l ON l.completion_id = c.completion_id
           WHERE l.scorer = ? AND l.k > 0 AND r.purpose = 'sample' AND c.author = 'teacher' AND c.finish_reason = 'stop'
             AND regexp_matches(c.text, '\\S')
           ORDER BY c.completion_id LIMIT ?""",
        [scorer, limit],
    ).fetchall()


def vocab(con: duckdb.DuckDBPyConnection, model: str) -> dict[int, VocabToken]:
    """token_id -> token of one model."""
    rows = con.execute("SELECT token_id, text, bytes FROM vocab WHERE model = ?", [model]).fetchall()
    return {token_id: VocabToken(text, raw) for token_id, text, raw in rows}


def _lists(found: pa.Table, name: str, null: float) -> list[np.ndarray]:
    """A list column as one array a row: int64 or float64, `null` where an element is NULL."""
    parts: list[np.ndarray] = []
    for chunk in found[name].chunks:
        flat = chunk.flatten()
        kind = np.int64 if pa.types.is_integer(flat.type) else np.float64
        values = flat.fill_null(kind(null)).to_numpy(zero_copy_only=False).astype(kind)
        ends = np.cumsum(chunk.value_lengths().to_numpy())
        parts += np.split(values, ends)[: len(ends)]
    return parts
