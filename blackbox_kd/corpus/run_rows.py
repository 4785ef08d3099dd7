"""What a corpus holds of one run, for `report`: read-only, in one connection, and nothing of the other runs in it.

What a run was billed, wrote and logged carries its run_id. The teacher's answers are found by what was asked (`Asked`,
its model and private prompt), since another run on the corpus may have paid for them; the student's, by its policy and
by what it was asked. What another run got after the last sign of this one is not this one's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from blackbox_kd.corpus.connection import READ_WAIT_S, connect
from blackbox_kd.errors import ConfigError

Row = dict[str, Any]


class Asked(NamedTuple):
    """How a run asks: bodies of its questions as JSON; their messages and seed do not count."""

    sample: str
    draws: int
    """Of each sampled prompt."""
    greedy: str
    drawn: str
    """The two of the fixed set, at temperature 0 and 1."""
    length: int
    """Tokens of an evaluation answer at most, also of the student's."""


Ask = Callable[..., list[Row]]
"""`ask(name, **parameters)`: the rows of one of the questions below."""

BUCKETS = 160
"""Moments of a timeline, however many calls there were."""
LATER_TABLES = {"curation"}
"""A corpus that an earlier version made may lack them; a reader adds nothing."""
DRAFTS = 6
"""The student's drafts that are shown, those of which it was least sure."""

_TABLE = "SELECT 1 FROM duckdb_tables() WHERE table_name = ?"

_BILLABLE = """SELECT a.*, coalesce(r.purpose, 'unknown') AS purpose, epoch(a.attempted_at) AS at_s
    FROM attempts a LEFT JOIN requests r USING (request_key)
    WHERE a.run_id = $run_id::UUID AND r.purpose IS DISTINCT FROM 'rollout'"""

_TEACHER = """c.author = 'teacher' AND r.model = run.model AND r.context_hash IS NOT DISTINCT FROM run.context_hash
    AND (c.run_id = run.run_id OR c.created_at <= run.last_sign)"""


def _how(body: str) -> str:
    """How a question is asked: its body without what is each question's own."""
    return f"""json_merge_patch({body}::JSON, '{{"messages": null, "seed": null}}')::VARCHAR"""


_SAMPLE = f"r.purpose = 'sample' AND {_how('r.body')} = {_how('$sample')} AND r.sample_idx < $draws"
_GREEDY = f"{_how('r.body')} = {_how('$greedy')}"
_FIXED = f"r.purpose = 'evaluate' AND ({_GREEDY} OR {_how('r.body')} = {_how('$drawn')})"

_RUN = """WITH run AS (SELECT *, greatest(started_at,
        (SELECT max(logged_at) FROM metrics WHERE run_id = $run_id::UUID),
        (SELECT max(attempted_at) FROM attempts WHERE run_id = $run_id::UUID)) AS last_sign
    FROM runs WHERE run_id = $run_id::UUID)"""

QUESTIONS = {
    "run": f"""{_RUN} SELECT run_id::VARCHAR AS run_id, run_dir, config, model, context_hash::VARCHAR AS context_hash,
        version FROM run""",
    "metrics": """SELECT stage, checkpoint, round, step, split, name, value, lo, hi, set_id, epoch(logged_at) AS at_s
        FROM metrics WHERE run_id = $run_id::UUID
        ORDER BY stage, round, checkpoint, step, split, name, at_s, set_id""",
    "prompts": f"""{_RUN} SELECT p.split, count(DISTINCT p.prompt_id) AS prompts
        FROM run, prompts p JOIN completions c USING (prompt_id) JOIN requests r USING (request_key)
        WHERE r.purpose <> 'probe' AND (c.run_id = run.run_id OR ({_TEACHER} AND ({_SAMPLE} OR {_FIXED})))
        GROUP BY ALL""",
    # `rows`: whole answers; of `sample`, to train prompts: what the sequence-level stage can learn
    "answers": f"""{_RUN} SELECT r.purpose, count(*) AS answers, count(*) FILTER (c.run_id = run.run_id) AS own,
            count(*) FILTER (whole) AS rows, count(*) FILTER (whole AND c.run_id = run.run_id) AS own_rows,
            sum(c.completion_tokens)::BIGINT AS completion_tokens
        FROM run, (SELECT *, finish_reason = 'stop' AND regexp_matches(text, '\\S') AS whole FROM completions) c
        JOIN requests r USING (request_key)
        WHERE {_TEACHER} AND r.purpose IN ('sample', 'evaluate')
            AND (c.run_id = run.run_id OR {_SAMPLE} OR {_FIXED})
        GROUP BY ALL ORDER BY ALL""",
    "spend": f"""WITH billable AS ({_BILLABLE})
        SELECT purpose, count(*) AS calls, count(*) FILTER (billed) AS billed, count(*) FILTER (billed IS NULL) AS lost,
            count(*) FILTER (status = 429) AS rate_limited,
            sum(prompt_tokens)::BIGINT AS prompt_tokens, sum(completion_tokens)::BIGINT AS completion_tokens,
            sum(cached_tokens)::BIGINT AS cached_tokens,
            sum(cost_usd) AS cost_usd, count(*) FILTER (billed AND cost_usd IS NULL) AS unpriced
        FROM billable GROUP BY ALL ORDER BY min(at_s), purpose""",
    # seconds from the first call to the end of a bucket, and what was billed in it
    "timeline": f"""WITH billable AS ({_BILLABLE}), span AS (SELECT min(at_s) AS t0, max(at_s) - min(at_s) AS s
        FROM billable)
        SELECT purpose, round(bucket * s / {BUCKETS}, 6) AS at_s,
            sum(prompt_tokens + completion_tokens)::BIGINT AS tokens, sum(cost_usd) AS cost_usd
        FROM (SELECT b.*, s, ceil(({BUCKETS} * (at_s - t0)) / greatest(s, 1e-9)) AS bucket FROM billable b, span)
        GROUP BY ALL ORDER BY ALL""",
    "rollouts": """SELECT c.round, count(*) AS rollouts, sum(c.completion_tokens)::BIGINT AS completion_tokens
        FROM completions c JOIN requests r USING (request_key)
        WHERE c.author = 'student' AND r.purpose = 'rollout' AND (c.run_id = $run_id::UUID
            OR c.completion_id IN (SELECT completion_id FROM feedback WHERE run_id = $run_id::UUID))
        GROUP BY ALL ORDER BY ALL""",
    "feedback": """SELECT f.round, f.kind, count(*) AS said, count(DISTINCT f.completion_id) AS drafts,
            avg(f.value) AS mean_value,
            avg((trim(better.text) = trim(draft.text))::INTEGER) AS unchanged
        FROM feedback f JOIN completions draft ON draft.completion_id = f.completion_id
        LEFT JOIN completions better ON better.completion_id = f.target_completion_id
        WHERE f.run_id = $run_id::UUID GROUP BY ALL ORDER BY ALL""",
    "drafts": f"""SELECT draft.completion_id::VARCHAR AS completion_id, any_value(p.messages) AS messages,
            any_value(f.round) AS round, any_value(draft.text) AS text, min(better.text) AS better,
            avg(f.value) AS value, string_agg(DISTINCT f.kind, ', ' ORDER BY f.kind) AS kinds
        FROM feedback f JOIN completions draft ON draft.completion_id = f.completion_id
        JOIN prompts p ON p.prompt_id = draft.prompt_id
        LEFT JOIN completions better ON better.completion_id = f.target_completion_id
        LEFT JOIN logprobs l ON l.completion_id = draft.completion_id AND l.scorer = draft.model || '@' || draft.policy
        WHERE f.run_id = $run_id::UUID
          AND f.round = (SELECT max(round) FROM feedback WHERE run_id = $run_id::UUID)
        GROUP BY draft.completion_id
        ORDER BY min(list_avg(l.token_logprobs)) NULLS LAST, draft.completion_id LIMIT {DRAFTS}""",
    "bases": """SELECT DISTINCT policy FROM completions
        WHERE author = 'student' AND model = $model AND starts_with(policy, 'base:') ORDER BY policy""",
    # the teacher's two of the fixed set, and the student's greedy ones; later answers of one author come last
    "heldout": f"""{_RUN} SELECT c.completion_id::VARCHAR AS completion_id, c.prompt_id::VARCHAR AS prompt_id,
            p.messages, c.author, c.policy, c.author = 'student' OR {_GREEDY} AS greedy,
            c.text, c.finish_reason
        FROM run, completions c JOIN requests r USING (request_key) JOIN prompts p ON p.prompt_id = c.prompt_id
        WHERE r.purpose = 'evaluate' AND p.split = 'heldout' AND c.choice_idx = 0
          AND (({_TEACHER} AND {_FIXED})
            OR (c.author = 'student' AND c.policy IN (SELECT unnest($policies::VARCHAR[]))
                AND (r.body->>'temperature')::DOUBLE = 0 AND (r.body->>'max_tokens')::INTEGER = $length))
        ORDER BY c.created_at, c.completion_id""",
    # by the writer itself, in the order of the text, of each text the first $most; the lists are unnested beside each
    # other, since the view `token_logprobs` copies a whole one for each of its tokens
    "tokens": """SELECT t.completion_id, coalesce(v.text, '') AS token, t.logprob
        FROM (SELECT c.completion_id::VARCHAR AS completion_id, c.model, unnest(l.token_ids[:$most]) AS token_id,
                unnest(l.token_logprobs[:$most]) AS logprob, generate_subscripts(l.token_ids[:$most], 1) AS position
            FROM logprobs l JOIN completions c USING (completion_id) JOIN requests r USING (request_key)
            WHERE l.completion_id IN (SELECT unnest($ids::UUID[]))
              AND l.scorer = c.model || '@' || coalesce(c.policy, r.context_hash::VARCHAR, 'bare')) t
        LEFT JOIN vocab v ON v.model = t.model AND v.token_id = t.token_id
        ORDER BY t.completion_id, t.position""",
    "dead_letters": """SELECT error, count(*) AS requests FROM dead_letters WHERE run_id = $run_id::UUID
        GROUP BY ALL ORDER BY requests DESC, error""",
    "curation": """SELECT reason, action, count(DISTINCT completion_id) AS answers FROM curation
        WHERE run_id = $run_id::UUID GROUP BY ALL ORDER BY ALL""",
}


@contextmanager
def reading(path: Path, run_id: str, asked: Callable[[Row], Asked]) -> Iterator[Ask]:
    """Ask about a run of a corpus until the end of the block; `asked` is told its config.

    Raises:
        ConfigError: the corpus knows no such run.
        CorpusError: see `connect`.
    """
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        known = {"run_id": run_id}
        if not (run := _ask(con, known, "run")):
            raise ConfigError(f"{path} knows no run {run_id}: name its corpus with --corpus")
        yield partial(_ask, con, known | asked(json.loads(run[0]["config"]))._asdict())


def _ask(con: duckdb.DuckDBPyConnection, known: Row, name: str, **given: Any) -> list[Row]:
    sql = QUESTIONS[name]
    if name in LATER_TABLES and not con.execute(_TABLE, [name]).fetchall():
        return []
    con.execute(sql, given | {key: value for key, value in known.items() if f"${key}" in sql})
    names = [column[0] for column in con.description or []]
    return [dict(zip(names, row, strict=True)) for row in con.fetchall()]
