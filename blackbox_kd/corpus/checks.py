"""What can be wrong or odd about a corpus, each with what to do about it. For `doctor`."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb

from blackbox_kd.corpus.connection import READ_WAIT_S, connect
from blackbox_kd.corpus.journal import REFUSED, alone, damaged, read_segment
from blackbox_kd.corpus.store import SCHEMA_VERSION
from blackbox_kd.errors import CorpusError
from blackbox_kd.hashing import content_id

HASHED_ROWS = 1000
"""Answers whose content is hashed again, drawn at random."""
LENGTH_SHARE = 0.05
"""Cut-off answers above this share are worth a word."""
DEAD_SHARE = 0.25
"""Unused blocks above this share of the file, too."""

Level = Literal["ok", "note", "fix"]


class Finding(NamedTuple):
    """One thing that is so. `fix`: something must be done; `note`: worth knowing."""

    check: str
    level: Level
    found: str
    advice: str = ""


class Check(NamedTuple):
    """A query with one row for each finding, or none where all is well; `{}` in `found` are its columns."""

    name: str
    level: Level
    sql: str
    found: str
    advice: str


CHECKS = [
    Check(
        "in flight at a kill", "note",
        "SELECT count(*) FROM calls WHERE billed IS NULL HAVING count(*) > 0",
        "{} calls of which nobody knows whether they were billed",
        "compare the provider's bill; budgets count them at their worst case",
    ),
    Check(
        "answers without a question", "fix",
        "SELECT count(*) FROM completions ANTI JOIN requests USING (request_key) HAVING count(*) > 0",
        "{} completions whose request is not there",
        "no stage will use them; import the missing rows of `requests` from where these came from",
    ),
    Check(
        "answers without a prompt", "fix",
        "SELECT count(*) FROM completions ANTI JOIN prompts USING (prompt_id) HAVING count(*) > 0",
        "{} completions whose prompt is not there",
        "run a stage whose prompts.path holds these prompts: it adds them",
    ),
    Check(
        "logprobs that do not fit", "fix",
        "SELECT count(*), min(completion_id) FROM logprobs WHERE len(token_logprobs) <> len(token_ids) "
        "OR len(missing_mass) <> len(token_ids) OR len(top_ids) <> k * len(token_ids) "
        "OR len(top_logprobs) <> k * len(token_ids) HAVING count(*) > 0",
        "{} rows of logprobs whose lists differ in length, such as that of completion {}",
        "delete them (`delete from logprobs where ...` in any DuckDB client); training must not read them",
    ),
    Check(
        "logprobs without an answer", "fix",
        "SELECT count(*) FROM logprobs ANTI JOIN completions USING (completion_id) HAVING count(*) > 0",
        "{} rows of logprobs whose completion is not there",
        "delete them (`delete from logprobs where ...` in any DuckDB client)",
    ),
    Check(
        "logprobs asked for and not given", "note",
        "SELECT c.model, count(*) FILTER (l.completion_id IS NULL) AS without, count(*) FROM completions c "
        "JOIN requests r USING (request_key) LEFT JOIN (SELECT DISTINCT completion_id FROM logprobs) l "
        "ON l.completion_id = c.completion_id WHERE (r.body->>'logprobs')::BOOLEAN AND c.text <> '' "
        "GROUP BY c.model HAVING without > 0",
        "{}: {} of {} answers came without",
        "soft labels are missing there; ask an endpoint that gives them, or set top_logprobs to null",
    ),
    Check(
        "duplicate answers", "fix",
        "SELECT count(*) FROM (SELECT 1 FROM completions GROUP BY request_key, choice_idx HAVING count(*) > 1) "
        "HAVING count(*) > 0",
        "{} questions with two answers for one choice",
        "the file has lost its constraints: export it, and import it into a new corpus",
    ),
    Check(
        "several teachers", "note",
        "SELECT count(*), string_agg(model || ' under ' || coalesce(left(context_hash::VARCHAR, 8), 'no prompt'), ', ')"
        " FROM (SELECT DISTINCT r.model, r.context_hash FROM completions c JOIN requests r USING (request_key) "
        "WHERE c.author = 'teacher' AND r.purpose = 'sample' ORDER BY ALL) HAVING count(*) > 1",
        "{} models or private prompts: {}",
        "the view `sft` takes those of the last run only; filter `teacher_rows` by model and context_hash yourself",
    ),
    Check(
        "an alias that moved", "note",
        "SELECT model, count(DISTINCT served_model), string_agg(DISTINCT served_model, ', ') FROM completions "
        "WHERE author <> 'student' GROUP BY model HAVING count(DISTINCT served_model) > 1",
        "{} was served by {} models: {}",
        "name a dated model in teacher.model, so that one teacher answers throughout",
    ),
    Check(
        "answers cut off", "note",
        "SELECT r.purpose, c.model, (100 * avg((c.finish_reason = 'length')::INTEGER))::INTEGER AS share "
        "FROM completions c JOIN requests r USING (request_key) WHERE c.author <> 'student' "
        f"GROUP BY ALL HAVING avg((c.finish_reason = 'length')::INTEGER) > {LENGTH_SHARE} ORDER BY ALL",
        "{} by {}: {}% end at the maximum length",
        "raise max_completion_length; cut-off answers are not learnt",
    ),
    Check(
        "dead letters", "note",
        "SELECT count(*), error FROM dead_letters GROUP BY error ORDER BY count(*) DESC, error LIMIT 10",
        "{} times: {}",
        "`show --last N` shows such questions; mend them, or ask again with --teacher.retry_dead_letters true",
    ),
]  # fmt: skip


def findings(path: Path) -> list[Finding]:
    """All checks; of a corpus of another schema version only that it is one.

    Raises:
        CorpusError: there is no such file, it is no corpus, or it is held open.
    """
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        version = _version(con, path)
        if version.level != "ok":
            return [version, *journal(path)]
        found = [version, *journal(path)]
        for check in CHECKS:
            rows = con.execute(check.sql).fetchall()
            found += [Finding(check.name, check.level, check.found.format(*row), check.advice) for row in rows]
            found += [] if rows else [Finding(check.name, "ok", "none")]
        return [*found, _hashes(con), _dead_space(con), *_runs(con)]


def journal(path: Path) -> Iterator[Finding]:
    """Each segment beside the corpus (being written, waiting, torn, or not ours), and what was refused."""
    folder = path.with_name(path.name + ".journal")
    if not folder.exists():
        return
    with alone(folder):  # a start must not find a segment locked by us
        yield from [_segment(segment) for segment in sorted(folder.glob("*.journal"))]
    if (refused := folder / REFUSED).exists():
        found = f"{len(read_segment(refused))} records that DuckDB refused are kept in {refused}"
        advice = (
            "please report it; their questions are asked again; a version that can store them ingests the file once "
            "it is renamed to 0.journal, and if you do not want them, delete it"
        )
        yield Finding("refused records", "fix", found, advice)


def _segment(path: Path) -> Finding:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return Finding("journal", "note", f"{path.name} is being written by a run", "nothing: it will be ingested")
        try:
            records = len(read_segment(path))
        except CorpusError as error:
            return Finding("journal", "fix", str(error), "run any stage with the version that wrote it")
        lost = damaged(path)
        cut = f", {lost} more cannot be read (a kill, a full disk or a bad one): what is whole is kept" if lost else ""
        return Finding("journal", "fix", f"{records} records wait in {path.name}{cut}",
                       "run any stage, or `blackbox-kd compact`: both ingest it")  # fmt: skip


def _version(con: duckdb.DuckDBPyConnection, path: Path) -> Finding:
    tables = {name for (name,) in con.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    if "meta" not in tables:
        raise CorpusError(f"{path} is a DuckDB file, but no corpus")
    version = int(con.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchall()[0][0])
    if version == SCHEMA_VERSION:
        return Finding("schema version", "ok", str(version))
    advice = "run any stage, it migrates the file" if version < SCHEMA_VERSION else "upgrade blackbox_kd"
    return Finding("schema version", "fix", f"{version}, this blackbox_kd speaks {SCHEMA_VERSION}", advice)


def _hashes(con: duckdb.DuckDBPyConnection) -> Finding:
    rows = con.execute(
        "SELECT completion_id::VARCHAR, request_key::VARCHAR, choice_idx, author, text FROM completions "
        f"USING SAMPLE {HASHED_ROWS} ROWS"
    ).fetchall()
    changed = [completion_id for completion_id, *content in rows if content_id(content) != completion_id]
    if not changed:
        return Finding("changed answers", "ok", f"none of {len(rows)}")
    advice = "somebody edited rows: restore the file, or delete these completions and sample again"
    return Finding("changed answers", "fix", f"{len(changed)} of {len(rows)}, such as {changed[0]}", advice)


def _dead_space(con: duckdb.DuckDBPyConnection) -> Finding:
    size, total, free = con.execute(
        "SELECT block_size, total_blocks, free_blocks FROM pragma_database_size()"
    ).fetchall()[0]
    found = f"{free * size / 1e6:.1f} of {total * size / 1e6:.1f} MB are unused"
    advice = "`blackbox-kd compact` gives them back" if free > DEAD_SHARE * total else ""
    return Finding("dead space", "note" if advice else "ok", found, advice)


def _runs(con: duckdb.DuckDBPyConnection) -> list[Finding]:
    runs: list[tuple[Any, ...]] = con.execute("SELECT run_dir, run_id::VARCHAR FROM runs ORDER BY ALL").fetchall()
    advice = "its rows stay; a relative path is meant from where the run was started"
    gone = [f"{run_dir} (run {run_id[:8]})" for run_dir, run_id in runs if not Path(run_dir).exists()]
    return [Finding("run directory gone", "note", where, advice) for where in gone] or [
        Finding("run directory gone", "ok", f"none of {len(runs)}")
    ]
