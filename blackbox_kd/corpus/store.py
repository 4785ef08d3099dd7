"""The corpus file: short-lived connections, and the questions that stages ask of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import msgspec

from blackbox_kd.corpus import scored
from blackbox_kd.corpus.answers import Known, answers, settled
from blackbox_kd.corpus.connection import connect, said_of, transaction
from blackbox_kd.corpus.ingest import Row, completion_row, ingest, insert, insert_logprobs, timestamp
from blackbox_kd.corpus.journal import Record, damaged, leftovers, put_aside
from blackbox_kd.corpus.logprobs import Vocabs
from blackbox_kd.errors import CorpusBusy, CorpusError
from blackbox_kd.hashing import canonical_json, content_id
from blackbox_kd.progress import say
from blackbox_kd.types import (
    Completion,
    Feedback,
    Prompt,
    Request,
    TeacherTokens,
    Usage,
    VocabToken,
)

SCHEMA_VERSION = 1
LOCK_WAIT_S = 60.0
"""How long a stage waits for somebody who holds the file open."""


class Corpus:
    """One DuckDB file. Between calls it is closed, so that anybody can query it while a run goes on.

    Raises:
        CorpusError: the file is no corpus, is newer than this version, or is held open for longer than `lock_wait_s`.
    """

    def __init__(self, path: Path, *, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self.path = path
        self.journal = path.with_name(path.name + ".journal")
        self.lock_wait_s = lock_wait_s
        self.busy: CorpusBusy | None = None
        """Why the last `try_ingest` could not."""
        self.refused = 0
        """Records that DuckDB would not take; they are put aside."""
        self._inside = threading.local()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CorpusError(f"corpus: cannot make the folder {path.parent}: {error.strerror}") from error
        with self.connect() as con:
            _migrate(con, path)
        self.replay()

    @contextmanager
    def connect(self, *, wait_s: float | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-write connection, closed at the end of the block; what DuckDB says inside it is a CorpusError.

        What the same thread asks of the corpus inside the block shares it: to open a file takes longer than most
        questions. It keeps everybody else out, so nothing slow belongs into the block.
        """
        if con := getattr(self._inside, "con", None):
            with said_of(self.path):
                yield con
            return
        with connect(self.path, read_only=False, wait_s=self.lock_wait_s if wait_s is None else wait_s) as con:
            self._inside.con = con
            try:
                yield con
            finally:
                self._inside.con = None

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The result of a query."""
        with self.connect() as con:
            return con.execute(sql, parameters).fetchall()

    def replay(self) -> int:
        """Ingest what processes that are gone left in the journal; returns the number of answers found."""
        found = 0
        for path, records in leftovers(self.journal):
            if unreadable := damaged(path):
                say(
                    f"{path}: {unreadable} of its records cannot be read (a kill, a full disk or a bad one); "
                    f"{len(records)} are whole and kept, what is missing is asked again"
                )
            with self.connect() as con:
                self._ingest(con, records, Vocabs(), orphaned=True)
            path.unlink()
            found += sum(len(getattr(r, "completions", [])) for r in records)
        return found

    def try_ingest(self, records: Sequence[Record], *, vocabs: Vocabs | None = None, wait_s: float = 0.0) -> bool:
        """Ingest; False where somebody holds the file open for longer than `wait_s`.

        `vocabs` is what the caller remembers of earlier batches.

        Raises:
            CorpusError: anything else, such as a full disk.
        """
        try:
            with self.connect(wait_s=wait_s) as con:
                self._ingest(con, records, vocabs or Vocabs())
        except CorpusBusy as error:
            self.busy = error
            return False
        return True

    def _ingest(
        self, con: duckdb.DuckDBPyConnection, records: Sequence[Record], vocabs: Vocabs, *, orphaned: bool = False
    ) -> None:
        refused = ingest(con, records, vocabs, orphaned=orphaned)
        if not refused:
            return
        path = put_aside(self.journal, [record for record, _ in refused])
        self.refused += len(refused)
        say(
            f"DuckDB refuses {len(refused)} of {len(records)} records ({refused[0][1]}); they are kept in {path}, "
            "the others are stored; see `blackbox-kd doctor`"
        )

    def add_run(self, run_id: str, run_dir: Path, config: Mapping[str, Any], model: str, context_hash: str) -> None:
        """This run, or its new start."""
        from blackbox_kd import __version__

        row = {"run_id": run_id, "run_dir": str(run_dir), "config": canonical_json(config), "model": model,
               "context_hash": context_hash, "version": __version__, "started_at": timestamp(time.time())}  # fmt: skip
        with self.connect() as con:
            insert(con, "runs", [row], replace=True)

    def add_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Prompts that are not there yet. Of several splits train wins: what is trained on is not held apart."""
        now, prompts = timestamp(time.time()), list(prompts)
        trained = [prompt.prompt_id for prompt in prompts if prompt.split == "train"]
        rows = [
            {"prompt_id": p.prompt_id, "messages": canonical_json(p.messages), "split": p.split, "source": p.source,
             "meta": canonical_json(p.meta), "added_at": now}
            for p in prompts
        ]  # fmt: skip
        with self.connect() as con:
            insert(con, "prompts", rows)
            con.execute(
                """UPDATE prompts SET split = 'train'
                   WHERE split <> 'train' AND prompt_id IN (SELECT unnest(?::UUID[]))""",
                [trained],
            )

    def add_requests(self, requests: Sequence[Request]) -> None:
        """Requests that are not there yet."""
        with self.connect() as con:
            insert(con, "requests", [_request_row(r) for r in requests])

    def look_up(self, requests: Sequence[Request], *, with_answers: bool) -> Known:
        """Note these questions, and say what is known of them; what killed runs have received counts."""
        if not requests:
            return Known(set(), set(), {})
        self.replay()
        with self.connect() as con:
            insert(con, "requests", [_request_row(r) for r in requests])
            answered, dead = settled(con, [r.request_key for r in requests])
            found = answers(con, sorted(answered)) if with_answers and answered else {}
        return Known(answered, dead - answered, found)

    def answers(self, keys: Sequence[str], *, logprobs: bool = True) -> dict[str, list[Completion]]:
        """What is known already: request_key -> its choices in order, with their logprobs or without."""
        with self.connect() as con:
            return answers(con, keys, logprobs=logprobs)

    def scored_tokens(self, completion_ids: Sequence[str], scorer: str) -> dict[str, TeacherTokens]:
        """completion_id -> its tokens as `scorer` saw them, as arrays; what it did not score is left out."""
        with self.connect() as con:
            return scored.tokens(con, completion_ids, scorer)

    def whole_scored(self, scorer: str, limit: int) -> list[tuple[str, str]]:
        """(completion_id, text), by completion_id: whole answers of `sample` that have alternatives by `scorer`."""
        with self.connect() as con:
            return scored.whole(con, scorer, limit)

    def vocab(self, model: str) -> dict[int, VocabToken]:
        """All tokens of a model that were ever seen."""
        with self.connect() as con:
            return scored.vocab(con, model)

    def settled(self, keys: Sequence[str]) -> tuple[set[str], set[str]]:
        """Of these requests: those that are answered, and those that were given up."""
        with self.connect() as con:
            return settled(con, keys)

    def requests(self, keys: Sequence[str]) -> dict[str, Request]:
        """Questions to a chat endpoint, as they were asked: request_key -> request."""
        rows = self.rows(
            """SELECT purpose, body::VARCHAR, prompt_id::VARCHAR, sample_idx, context_hash::VARCHAR,
                      completion_id::VARCHAR, cut_byte
               FROM requests SEMI JOIN (SELECT unnest(?::UUID[]) AS request_key) USING (request_key)""",
            [list(keys)],
        )
        found = [
            Request(purpose=row[0], body=json.loads(row[1]), prompt_id=row[2], sample_idx=row[3], context_hash=row[4],
                    completion_id=row[5], cut_byte=row[6])
            for row in rows
        ]  # fmt: skip
        return {request.request_key: request for request in found}

    def add_completions(self, completions: Sequence[Completion], *, scorer: str, run_id: str) -> None:
        """Answers that came from no endpoint: the student's own samples, with their token logprobs."""
        now = time.time()
        with self.connect() as con, transaction(con):
            insert(con, "completions", [completion_row(c, run_id, now) for c in completions])
            insert_logprobs(con, [(c, scorer) for c in completions if c.logprobs], Vocabs())

    def whole_answers(self, keys: Sequence[str]) -> list[tuple[str, str, str]]:
        """Answers to these requests that can be learnt: (request_key, completion_id, text), by completion_id."""
        return self.rows(
            """SELECT request_key::VARCHAR, completion_id::VARCHAR, text FROM completions
               WHERE request_key IN (SELECT unnest(?::UUID[]))
                 AND author = 'teacher' AND finish_reason = 'stop' AND regexp_matches(text, '\\S')
               ORDER BY completion_id""",
            [list(keys)],
        )

    def add_feedback(self, feedback: Sequence[Feedback], *, round_: int, run_id: str) -> None:
        """What was said of student completions in a round."""
        now = timestamp(time.time())
        rows = []
        for f in feedback:
            identity = [f.completion_id, f.kind, f.scorer, f.target_completion_id, round_, run_id]
            row = msgspec.structs.asdict(f) | {"detail": canonical_json(f.detail)}
            row |= {"feedback_id": content_id(identity), "round": round_, "run_id": run_id, "created_at": now}
            rows.append(row)
        with self.connect() as con:
            insert(con, "feedback", rows)

    def log_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Upsert metric rows (the columns of `metrics` without `logged_at`)."""
        now = timestamp(time.time())
        with self.connect() as con:
            insert(con, "metrics", [{**row, "logged_at": now} for row in rows], replace=True)

    def drop_metrics(self, run_id: str, checkpoint: str, round_: int) -> None:
        """Those of a checkpoint and of all later rounds."""
        with self.connect() as con:
            con.execute(
                "DELETE FROM metrics WHERE run_id = ?::UUID AND (checkpoint = ? OR round > ?)",
                [run_id, checkpoint, round_],
            )

    def metrics_by_round(self, run_id: str, stage: str, names: Sequence[str]) -> dict[int, dict[str, float]]:
        """round -> name -> value of metrics that a round has once."""
        found: dict[int, dict[str, float]] = {}
        for round_, name, value in self.rows(
            """SELECT round, name, value FROM metrics
               WHERE run_id = ?::UUID AND stage = ? AND step = 0 AND name IN (SELECT unnest(?::VARCHAR[]))""",
            [run_id, stage, list(names)],
        ):
            found.setdefault(round_, {})[name] = value
        return found

    def set_capabilities(self, model: str, base_url: str, found: Mapping[str, tuple[Any, str]], *, run_id: str) -> None:
        """What a model at an address can do (name -> value and detail), in place of what was found before."""
        shared = {"model": model, "base_url": base_url, "run_id": run_id, "probed_at": timestamp(time.time())}
        rows = [
            {**shared, "name": name, "value": canonical_json(value), "detail": detail}
            for name, (value, detail) in found.items()
        ]
        with self.connect() as con:
            insert(con, "capabilities", rows, replace=True)

    def capabilities(self, model: str, base_url: str) -> dict[str, Any]:
        """What the last probe found, by name; empty where there was none."""
        found = self.rows("SELECT name, value FROM capabilities WHERE model = ? AND base_url = ?", [model, base_url])
        return {name: msgspec.json.decode(value) for name, value in found}

    def spend(self, run_id: str) -> dict[str, Any]:
        """What a run was ever billed for, over its restarts: calls, tokens, dollars (None: a price is not known)."""
        calls, prompt, completion, cost, unpriced, unknown = self.rows(
            """SELECT count(*) FILTER (billed), coalesce(sum(prompt_tokens), 0)::BIGINT,
                      coalesce(sum(completion_tokens), 0)::BIGINT, coalesce(sum(cost_usd), 0),
                      count(*) FILTER (billed AND cost_usd IS NULL), count(*) FILTER (billed IS NULL)
               FROM calls WHERE run_id = ?::UUID""",
            [run_id],
        )[0]
        return {"calls": calls, "prompt_tokens": prompt, "completion_tokens": completion,
                "cost_usd": None if unpriced else cost, "unknown_calls": unknown}  # fmt: skip

    def billed(self, run_id: str) -> Billed:
        """What counts against the caps of a run; its student's own calls do not."""
        (row,) = self.rows(
            """SELECT coalesce(sum(cost_usd), 0)::DOUBLE, coalesce(sum(prompt_tokens + completion_tokens), 0)::BIGINT,
                      count(*), coalesce(sum(prompt_tokens) FILTER (cost_usd IS NULL), 0)::BIGINT,
                      coalesce(sum(cached_tokens) FILTER (cost_usd IS NULL), 0)::BIGINT,
                      coalesce(sum(completion_tokens) FILTER (cost_usd IS NULL), 0)::BIGINT
               FROM calls WHERE run_id = ?::UUID AND billed AND prompt_tokens + completion_tokens > 0""",
            [run_id],
        )
        uncertain = self.rows(
            """SELECT body FROM calls WHERE run_id = ?::UUID AND body IS NOT NULL
               AND (billed IS NULL OR (billed AND prompt_tokens + completion_tokens = 0))""",
            [run_id],
        )
        unpriced = Usage(prompt_tokens=row[3], cached_tokens=row[4], completion_tokens=row[5])
        return Billed(row[0], row[1], row[2], unpriced, [json.loads(body) for (body,) in uncertain])


class Billed(NamedTuple):
    """What a run was billed in all its starts."""

    cost_usd: float
    """Of the calls whose price was known."""
    tokens: int
    calls: int
    unpriced: Usage
    """Of the calls whose price was not known."""
    uncertain: list[dict[str, Any]]
    """Bodies of calls of which nobody knows what they cost: in flight at a kill, or answered without usage."""


def _migrate(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    files = resources.files("blackbox_kd.corpus")
    tables = {name for (name,) in con.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    if tables and "meta" not in tables:
        raise CorpusError(f"{path} is a DuckDB file, but no corpus (its tables: {', '.join(sorted(tables)[:5])})")
    with transaction(con):
        con.execute(files.joinpath("schema.sql").read_text("utf-8"))  # also a table that an older version did not have
        if not tables:
            con.execute("INSERT INTO meta VALUES ('schema_version', ?)", [str(SCHEMA_VERSION)])
        version = int(con.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchall()[0][0])
        if version != SCHEMA_VERSION:
            raise CorpusError(
                f"{path} has schema version {version}, this blackbox_kd speaks {SCHEMA_VERSION}: upgrade it"
            )
        con.execute(files.joinpath("views.sql").read_text("utf-8"))


def _request_row(request: Request) -> Row:
    return {
        "request_key": request.request_key,
        "purpose": request.purpose,
        "prompt_id": request.prompt_id,
        "completion_id": request.completion_id,
        "cut_byte": request.cut_byte,
        "context_hash": request.context_hash,
        "model": request.model,
        "body": canonical_json(request.body),
        "sample_idx": request.sample_idx,
        "created_at": timestamp(time.time()),
    }
