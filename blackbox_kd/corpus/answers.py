"""What is known of questions: answered, given up, and the answers as they were received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import duckdb

from blackbox_kd.errors import CorpusError
from blackbox_kd.types import Completion, TokenLogprob, TopLogprob, Usage


class Known(NamedTuple):
    """Of some questions."""

    answered: set[str]
    """request_keys."""
    dead: set[str]
    """request_keys of those that were given up and never answered."""
    answers: dict[str, list[Completion]]
    """request_key -> its choices in order, with logprobs."""


def settled(con: duckdb.DuckDBPyConnection, keys: Sequence[str]) -> tuple[set[str], set[str]]:
    """Of these requests: those that are answered, and those that were given up."""
    con.execute("CREATE OR REPLACE TEMP TABLE asked AS SELECT unnest(?::UUID[]) AS request_key", [list(keys)])
    answered, dead = (
        con.execute(f"SELECT request_key::VARCHAR FROM asked SEMI JOIN {table} USING (request_key)").fetchall()
        for table in ("answered", "dead_letters")
    )
    return {key for (key,) in answered}, {key for (key,) in dead}


def answers(
    con: duckdb.DuckDBPyConnection, keys: Sequence[str], *, logprobs: bool = True
) -> dict[str, list[Completion]]:
    """What is known already: request_key -> its choices in order, with their logprobs or without."""
    select = f"""SELECT {", ".join(_COMPLETION_COLUMNS)} FROM completions
                 SEMI JOIN (SELECT unnest(?::UUID[]) AS request_key) USING (request_key)
                 ORDER BY request_key, choice_idx"""
    rows = con.execute(select, [list(keys)]).fetchall()
    scored = _logprobs(con, [row[0] for row in rows]) if logprobs else {}
    found: dict[str, list[Completion]] = {}
    for row in rows:
        completion = _completion(row, scored.get(str(row[0])))
        found.setdefault(completion.request_key, []).append(completion)
    return found


_COMPLETION_COLUMNS = (
    "completion_id::VARCHAR", "request_key::VARCHAR", "choice_idx", "prompt_id::VARCHAR", "author", "model", "policy",
    "round", "text", "reasoning", "finish_reason", "served_model", "system_fingerprint",
    "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens",
)  # fmt: skip


def _completion(row: tuple[Any, ...], logprobs: list[TokenLogprob] | None) -> Completion:
    completion = Completion(
        request_key=row[1], choice_idx=row[2], prompt_id=row[3], author=row[4], model=row[5], policy=row[6],
        round=row[7], text=row[8], reasoning=row[9], finish_reason=row[10], served_model=row[11],
        system_fingerprint=row[12], logprobs=logprobs,
        usage=Usage(prompt_tokens=row[13], completion_tokens=row[14], cached_tokens=row[15], reasoning_tokens=row[16]),
    )  # fmt: skip
    if completion.completion_id != row[0]:
        raise CorpusError(f"completion {row[0]} does not hash to its id: the row was changed")
    return completion


def _logprobs(con: duckdb.DuckDBPyConnection, completion_ids: list[Any]) -> dict[str, list[TokenLogprob]]:
    """Each completion's tokens as scored by its own author when it wrote them."""
    rows = con.execute(
        """SELECT l.completion_id::VARCHAR, token_ids, token_logprobs, top_ids, top_logprobs, k, c.model
           FROM logprobs l JOIN completions c USING (completion_id) JOIN requests r USING (request_key)
           WHERE l.completion_id IN (SELECT unnest(?::UUID[]))
             AND l.scorer = c.model || '@' || coalesce(c.policy, r.context_hash::VARCHAR, 'bare')""",
        [completion_ids],
    ).fetchall()
    vocab = {
        (model, token_id): (text, list(raw) if raw is not None else None)
        for model, token_id, text, raw in con.execute("SELECT model, token_id, text, bytes FROM vocab").fetchall()
    }
    found = {}
    for completion_id, ids, values, top_ids, top_values, k, model in rows:
        found[completion_id] = [
            TokenLogprob(
                **_token(model, token_id, value, vocab),
                top_logprobs=[
                    TopLogprob(**_token(model, i, v, vocab))
                    for i, v in zip(top_ids[t * k : t * k + k], top_values[t * k : t * k + k], strict=True)
                    if i is not None
                ],
            )
            for t, (token_id, value) in enumerate(zip(ids, values, strict=True))
        ]
    return found


def _token(model: str, token_id: int, logprob: float | None, vocab: dict[tuple[str, int], Any]) -> dict[str, Any]:
    text, raw = vocab.get((model, token_id), ("", None))
    value = logprob if logprob is not None else -9999.0
    return {"token": text, "bytes": raw, "id": token_id if token_id >= 0 else None, "logprob": value}
