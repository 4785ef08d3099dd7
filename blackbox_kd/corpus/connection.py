"""Opening the corpus file, and reading it for a person: DuckDB lets one process write, and then nobody else read."""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import duckdb
import tenacity

from blackbox_kd.errors import CorpusBusy, CorpusError
from blackbox_kd.progress import say

still_wanted: ContextVar[Callable[[], bool] | None] = ContextVar("still_wanted", default=None)
"""Where it is set, somebody else at the corpus is waited for as long as it says yes, in threads that were started from
there, too: what a stream of questions does with the corpus then outlasts any person's query."""
READ_WAIT_S = 10.0
"""How long a reader waits for a writer; a run holds the file for a fraction of a second at a time."""
SAY_HELD_S = 5.0
"""After so long, a person is told who holds it ..."""
SAY_AGAIN_S = 60.0
"""... and again."""

_one_at_a_time = threading.Lock()
"""Connections of a process to one file share an instance. A thread that comes while another makes or drops it finds
half of it: a file handle conflict, or no `python_arrow_scan`."""
_one_transaction = threading.RLock()
"""Those of a process are taken in turn: of two at once on its shared instance neither sees what the other adds, and
they would give new tokens the same ids."""

NEW_FILE_BYTES = 12288
"""A DuckDB file has three headers of 4 kB; a smaller one is being made, or is none."""
NEW_FILE_S = 1.0
"""How long making one takes at most."""


@contextmanager
def connect(path: Path, *, read_only: bool, wait_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection, closed at the end of the block; what DuckDB says inside it is a CorpusError.

    Raises:
        CorpusBusy: another process holds the file for longer than `wait_s`.
        CorpusError: there is no such file, or DuckDB cannot read it.
    """
    con = _open(path, read_only=read_only, wait_s=wait_s)
    try:
        with said_of(path):
            yield con
    finally:
        with _one_at_a_time:
            con.close()


@contextmanager
def said_of(path: Path) -> Iterator[None]:
    """What DuckDB says inside the block is a CorpusError."""
    try:
        yield
    except duckdb.Error as error:
        raise CorpusError(f"{path}: {_one_line(error)}") from error


@contextmanager
def transaction(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """All of the block or nothing, when no other thread is in one. Blocks cannot be nested."""
    with _one_transaction:
        con.execute("BEGIN")
        try:
            yield
            con.execute("COMMIT")
        except BaseException:
            with suppress(duckdb.Error):  # a COMMIT that failed has ended it; why it did is what counts
                con.execute("ROLLBACK")
            raise


def query(path: Path, sql: str, *, wait_s: float = READ_WAIT_S) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Columns and rows of a user's read-only query."""
    with connect(path, read_only=True, wait_s=wait_s) as con:
        con.execute(sql)
        return [column[0] for column in con.description or []], con.fetchall()


def export(path: Path, select: str, target: Path) -> int:
    """Write a query's rows to a Parquet or JSONL file; returns how many."""
    form = "FORMAT parquet, COMPRESSION zstd" if target.suffix == ".parquet" else "FORMAT json"
    quoted = str(target).replace("'", "''")
    with connect(path, read_only=True, wait_s=READ_WAIT_S) as con:
        return int(con.execute(f"COPY ({select}) TO '{quoted}' ({form})").fetchall()[0][0])


def compact(path: Path, *, wait_s: float = READ_WAIT_S) -> tuple[int, int]:
    """Rewrite the file without its dead space: bytes before and after. What goes wrong leaves the old file as it was.

    Raises:
        CorpusBusy: another program holds it, or has written to it meanwhile.
        CorpusError: the copy could not be made, or does not hold the same rows.
    """
    path = path.resolve()  # a link stays one
    fresh = path.with_name(path.name + ".compact")
    try:
        _discard(fresh)  # of a compaction that was killed
        with connect(path, read_only=False, wait_s=wait_s) as con:
            _copy(con, fresh)
            con.execute("CHECKPOINT")  # the write-ahead log would be taken for the new file's
            read = path.stat()
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        _replace(path, fresh, read)
    except OSError as error:
        raise CorpusError(f"cannot compact {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            _discard(fresh)
    return read.st_size, path.stat().st_size


def _copy(con: duckdb.DuckDBPyConnection, fresh: Path) -> None:
    ((source,),) = con.execute("SELECT current_database()").fetchall()
    quoted = str(fresh).replace("'", "''")
    con.execute(f"ATTACH '{quoted}' AS fresh")
    con.execute(f"""COPY FROM DATABASE "{source}" TO fresh""")
    if (lost := _contents(con, source) - _contents(con, "fresh")) or _contents(con, "fresh") - _contents(con, source):
        raise CorpusError(f"the compact copy {fresh} is not the same, the corpus stays as it is: {sorted(lost)[:3]}")
    con.execute("DETACH fresh")


def _contents(con: duckdb.DuckDBPyConnection, database: str) -> set[tuple[Any, ...]]:
    """Every table with its rows, every constraint, every view."""
    tables = con.execute("SELECT table_name FROM duckdb_tables() WHERE database_name = ?", [database]).fetchall()
    counts = {
        (name, con.execute(f'SELECT count(*) FROM "{database}".main."{name}"').fetchall()[0][0]) for (name,) in tables
    }
    schema = """SELECT table_name, constraint_type || array_to_string(constraint_column_names, ', ')
                FROM duckdb_constraints() WHERE database_name = $1
                UNION ALL SELECT view_name, 'VIEW' FROM duckdb_views() WHERE database_name = $1 AND NOT internal"""
    return counts | set(con.execute(schema, [database]).fetchall())


def _replace(path: Path, fresh: Path, read: os.stat_result) -> None:
    """Put the copy in the file's place, under DuckDB's own lock, unless somebody has written since it was read."""
    with path.open("r+b") as old:
        try:
            fcntl.lockf(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CorpusBusy(f"{path} is in use by another program; compact it when that has ended") from error
        now, wal = path.stat(), path.with_name(path.name + ".wal")
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (read.st_ino, read.st_size, read.st_mtime_ns) or wal.exists():
            raise CorpusBusy(f"{path} was written to while it was copied; compact it when nobody uses it")
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        time.sleep(0.1)  # who opened the old file before it was replaced finds it locked, and opens the new one


def _discard(database: Path) -> None:
    for leftover in (database, database.with_name(database.name + ".wal")):
        leftover.unlink(missing_ok=True)


def _open(path: Path, *, read_only: bool, wait_s: float) -> duckdb.DuckDBPyConnection:
    if read_only and not path.exists():
        raise CorpusError(f"no corpus {str(path)!r}: run a stage first, or name one with --corpus")
    wanted = still_wanted.get()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _is_locked(error) or _is_being_made(path, error)),
        wait=_pause_s,
        stop=(lambda _: not wanted()) if wanted else tenacity.stop_after_delay(wait_s),
        before_sleep=_say_waiting(path),
        reraise=True,
    )
    try:
        return retrying(_connect, path, read_only)
    except duckdb.Error as error:
        if not _is_locked(error):
            raise CorpusError(f"cannot open {path}: {_one_line(error)}") from error
        waited = f" for over {wait_s:.0f} s" if wait_s >= 1 and not wanted else ""
        raise CorpusBusy(f"{_held(path, error)}{waited}; close it there") from error


def _connect(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    with _one_at_a_time:
        return duckdb.connect(str(path), read_only=read_only)


def _held(path: Path, error: BaseException) -> str:
    holder = str(error).partition("held in ")[2].partition(". ")[0] or "unknown"
    return f"{path} is held open by another program ({holder})"


def _pause_s(state: tenacity.RetryCallState) -> float:
    return random.uniform(0.02, 0.1) if (state.seconds_since_start or 0) < SAY_HELD_S else 0.5


def _say_waiting(path: Path) -> Callable[[tenacity.RetryCallState], None]:
    say_at = SAY_HELD_S

    def look(state: tenacity.RetryCallState) -> None:
        nonlocal say_at
        error, waited_s = state.outcome.exception() if state.outcome else None, state.seconds_since_start or 0
        if error and waited_s > say_at:
            say_at = waited_s + SAY_AGAIN_S
            say(f"{_held(path, error)}; waiting until it lets go. Ctrl-C is safe: what was received is kept")

    return look


def _is_locked(error: BaseException) -> bool:
    """By another process, or by another thread of ours that has it open in the other way."""
    return any(sign in str(error) for sign in ("Could not set lock", "different configuration"))


def _is_being_made(path: Path, error: BaseException) -> bool:
    """Another process creates the file right now: it has its name, but not yet its header."""
    if "not a valid DuckDB" not in str(error):
        return False
    found = path.stat()
    return found.st_size < NEW_FILE_BYTES and time.time() - found.st_mtime < NEW_FILE_S


def _one_line(error: duckdb.Error) -> str:
    return " ".join(str(error).split())
