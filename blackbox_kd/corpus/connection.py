"""Opening the corpus file, and reading it for a person: DuckDB lets one process write, and then nobody else read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import tenacity

from blackbox_kd.errors import CorpusBusy, CorpusError

READ_WAIT_S = 10.0
"""How long a reader waits for a writer; a run holds the file for a fraction of a second at a time."""


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
        yield con
    except duckdb.Error as error:
        raise CorpusError(f"{path}: {_one_line(error)}") from error
    finally:
        con.close()


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


def _open(path: Path, *, read_only: bool, wait_s: float) -> duckdb.DuckDBPyConnection:
    if read_only and not path.exists():
        raise CorpusError(f"no corpus {str(path)!r}: run a stage first, or name one with --corpus")
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _is_locked(error) or _is_being_made(path, error)),
        wait=tenacity.wait_random(0.02, 0.1),
        stop=tenacity.stop_after_delay(wait_s),
        reraise=True,
    )
    try:
        return retrying(duckdb.connect, str(path), read_only=read_only)
    except duckdb.Error as error:
        if not _is_locked(error):
            raise CorpusError(f"cannot open {path}: {_one_line(error)}") from error
        holder = str(error).partition("held in ")[2].partition(". ")[0] or "unknown"
        raise CorpusBusy(
            f"{path} is held open by another program ({holder}) for over {wait_s:.0f} s; close it there"
        ) from error


def _is_locked(error: BaseException) -> bool:
    text = str(error)
    return "Could not set lock" in text or "different configuration" in text


def _is_being_made(path: Path, error: BaseException) -> bool:
    """Another process creates the file right now: it has its name, but not yet its header."""
    if "not a valid DuckDB" not in str(error):
        return False
    found = path.stat()
    return found.st_size < NEW_FILE_BYTES and time.time() - found.st_mtime < NEW_FILE_S


def _one_line(error: duckdb.Error) -> str:
    return " ".join(str(error).split())
