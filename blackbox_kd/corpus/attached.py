"""The corpora that this process has open, all in one DuckDB instance.

Making an instance registers thousands of functions, 30 ms of a core; attaching a file to one that is there takes 4. A
run holds its corpus for a fraction of a second at a time, and hundreds of times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import duckdb


class _Attached(NamedTuple):
    """A file under its name in the instance."""

    name: str
    read_only: bool
    cursors: set[int]
    """Connections that use it."""


_one_at_a_time = threading.Lock()
"""A thread that comes while another attaches or detaches would find half of it."""
_instance: duckdb.DuckDBPyConnection | None = None
_files: dict[Path, _Attached] = {}


def attach(path: Path, *, read_only: bool) -> tuple[duckdb.DuckDBPyConnection, Callable[[], None]]:
    """A connection to a file, and how to close it; the last one to be closed lets go of the file.

    Raises:
        duckdb.Error: another process holds it, another thread has it open in the other way, or it cannot be read.
    """
    global _instance
    path = path.resolve()
    with _one_at_a_time:
        if _instance is None:
            _instance = duckdb.connect(config={"temp_directory": f"{path}.tmp"})
        con = _instance.cursor()
        try:
            file = _files.get(path) or _attach(con, path, read_only)
            if file.read_only != read_only:
                raise duckdb.ConnectionException(f"{path} is open with a different configuration")
            con.execute(f"USE {file.name}")
        except duckdb.ResourceInUseException:  # somebody's own connection in this process: its instance is shared
            con.close()
            own = duckdb.connect(str(path), read_only=read_only)
            return own, own.close
        except duckdb.Error:
            con.close()
            raise
        file.cursors.add(id(con))
    return con, lambda: _close(con, path)


def _attach(con: duckdb.DuckDBPyConnection, path: Path, read_only: bool) -> _Attached:
    taken = {file.name for file in _files.values()}
    name = next(name for i in range(len(taken) + 1) if (name := f"corpus_{i}" if i else "corpus") not in taken)
    file, quoted = _Attached(name, read_only, set()), str(path).replace("'", "''")
    con.execute(f"ATTACH '{quoted}' AS {name} {'(READ_ONLY)' if read_only else ''}")
    _files[path] = file
    return file


def _close(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    global _instance
    with _one_at_a_time:
        file, mine = _files.get(path), id(con)
        con.close()
        if _instance is None or file is None or mine not in file.cursors:  # of an instance that was given up
            return
        file.cursors.remove(mine)
        if file.cursors:
            return
        del _files[path]
        try:
            _instance.execute(f"DETACH {file.name}")
        except duckdb.Error:  # e.g. the disk is full: what stands in the write-ahead log is read at the next time
            _instance = None
            _files.clear()
