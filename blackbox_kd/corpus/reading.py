"""Single questions with all that belongs to them, for `show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb

from blackbox_kd.corpus.connection import READ_WAIT_S, connect

LEAST_SURE = 5
"""Tokens of an answer that are shown: those with the lowest logprob."""

Row = dict[str, Any]

_KEYS = {
    "id": """SELECT request_key, created_at FROM requests r
             WHERE starts_with(request_key::VARCHAR, $1) OR starts_with(prompt_id::VARCHAR, $1)
                OR request_key IN (
                    SELECT request_key FROM completions WHERE starts_with(completion_id::VARCHAR, $1))""",
    "text": """SELECT r.request_key, r.created_at FROM requests r JOIN prompts p USING (prompt_id)
               WHERE contains(lower(p.messages::VARCHAR), lower($1))""",
    "last": """SELECT request_key, max(created_at) AS created_at FROM
               (SELECT request_key, created_at FROM completions UNION ALL
                SELECT request_key, created_at FROM dead_letters)
               WHERE $1 <> '' GROUP BY request_key""",
}

_QUESTION = """SELECT r.request_key::VARCHAR AS request_key, r.purpose, r.model,
    r.context_hash::VARCHAR AS context_hash, r.sample_idx, r.created_at, r.prompt_id::VARCHAR AS prompt_id,
    p.split, p.messages, r.completion_id::VARCHAR AS about, draft.text AS draft,
    dead.status AS dead_status, dead.error AS dead_error, a.calls, a.cost_usd
FROM requests r
LEFT JOIN prompts p USING (prompt_id)
LEFT JOIN completions draft ON draft.completion_id = r.completion_id
LEFT JOIN dead_letters dead ON dead.request_key = r.request_key
LEFT JOIN (SELECT request_key, count(*) AS calls, sum(cost_usd) AS cost_usd FROM attempts GROUP BY ALL) a
    ON a.request_key = r.request_key
WHERE r.request_key = ?::UUID"""

_ANSWERS = """SELECT completion_id::VARCHAR AS completion_id, choice_idx, author, model, served_model, policy, round,
    finish_reason, text, reasoning, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, created_at
FROM completions WHERE request_key = ?::UUID ORDER BY choice_idx"""

_FEEDBACK = """SELECT f.kind, f.value, f.scorer, f.round, f.detail,
    f.target_completion_id::VARCHAR AS target_completion_id, t.text AS target
FROM feedback f LEFT JOIN completions t ON t.completion_id = f.target_completion_id
WHERE f.completion_id = ?::UUID ORDER BY f.created_at"""

_SCORERS = """SELECT scorer, len(token_ids) AS tokens, list_avg(token_logprobs) AS mean_logprob, k
FROM logprobs WHERE completion_id = ?::UUID ORDER BY scorer"""

_LEAST_SURE = f"""WITH least AS (
    SELECT * FROM token_logprobs WHERE completion_id = $1::UUID AND scorer = $2
    ORDER BY logprob, position LIMIT {LEAST_SURE})
SELECT least.position, least.token, least.logprob, top.token AS likeliest, top.logprob AS likeliest_logprob
FROM least LEFT JOIN (SELECT * FROM top_logprobs WHERE completion_id = $1::UUID AND scorer = $2 AND rank = 1) top
    USING (position) ORDER BY least.logprob, position"""


def found(path: Path, how: str, what: str, limit: int) -> tuple[list[Row], int]:
    """The latest `limit` questions, oldest first, and how many there are in all.

    `how`: "id" (`what` begins the id of a request, prompt or completion), "text" (is in a prompt), "last" (any).
    """
    what = json.dumps(what, ensure_ascii=False)[1:-1] if how == "text" else what  # as in the stored JSON
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        keys = con.execute(
            f"SELECT request_key::VARCHAR FROM ({_KEYS[how]}) ORDER BY created_at DESC", [what]
        ).fetchall()
        return [_question(con, key) for (key,) in reversed(keys[:limit])], len(keys)


def _question(con: duckdb.DuckDBPyConnection, key: str) -> Row:
    (question,) = _rows(con, _QUESTION, [key])
    question["messages"] = json.loads(question["messages"] or "[]")
    question["answers"] = [_answer(con, row) for row in _rows(con, _ANSWERS, [key])]
    return question


def _answer(con: duckdb.DuckDBPyConnection, answer: Row) -> Row:
    given = [answer["completion_id"]]
    answer["feedback"] = [row | {"detail": json.loads(row["detail"])} for row in _rows(con, _FEEDBACK, given)]
    answer["logprobs"] = [
        row | {"least_sure": _rows(con, _LEAST_SURE, [*given, row["scorer"]])} for row in _rows(con, _SCORERS, given)
    ]
    return answer


def _rows(con: duckdb.DuckDBPyConnection, sql: str, parameters: list[Any]) -> list[Row]:
    con.execute(sql, parameters)
    names = [column[0] for column in con.description or []]
    return [dict(zip(names, row, strict=True)) for row in con.fetchall()]
