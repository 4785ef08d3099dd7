"""Files in the one DuckDB instance of a process: each is let go of as soon as nobody here uses it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import pytest

from blackbox_kd.corpus.attached import attach

COUNT = "import sys, duckdb; print(duckdb.connect(sys.argv[1]).sql('select count(*) from t').fetchall()[0][0])"


def elsewhere(path: Path) -> str:
    """What another process that wants to write says: a count, or why not."""
    done = subprocess.run([sys.executable, "-c", COUNT, path], capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with duckdb.connect(str(tmp_path / "c.duckdb")) as con:
        con.execute("create table t as select range as i from range(3)")
    return tmp_path / "c.duckdb"


def test_a_file_is_held_until_the_last_connection_is_closed(file: Path) -> None:
    one, close_one = attach(file, read_only=False)
    two, close_two = attach(file, read_only=False)
    one.execute("insert into t values (7)")
    close_one()
    assert two.execute("select count(*) from t").fetchall() == [(4,)]
    assert "Could not set lock" in elsewhere(file)
    close_two()
    assert elsewhere(file) == "4"
    assert not file.with_name("c.duckdb.wal").exists()


def test_what_was_not_committed_is_gone(file: Path) -> None:
    con, close = attach(file, read_only=False)
    con.execute("begin")
    con.execute("insert into t values (7)")
    close()
    assert elsewhere(file) == "3"


def test_two_files_of_one_name_do_not_see_each_other(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other \"folder'" / "c.duckdb"
    other.parent.mkdir()
    one, close_one = attach(file, read_only=True)
    two, close_two = attach(other, read_only=False)
    two.execute("create table t as select 1 as j")
    two.execute("create view v as select j + 1 as k from t")
    assert one.execute("select count(*) from t").fetchall() == [(3,)]
    close_one()
    close_two()
    alone, close = attach(other, read_only=True)  # under another name than the one its view was made with
    assert alone.execute("from v").fetchall() == [(2,)]
    with pytest.raises(duckdb.Error, match="read-only"):
        alone.execute("drop view v")
    close()


def test_a_connection_that_somebody_has_here_is_shared(file: Path) -> None:
    with duckdb.connect(str(file)) as theirs:
        con, close = attach(file, read_only=False)
        con.execute("insert into t values (7)")
        close()
        assert theirs.execute("select count(*) from t").fetchall() == [(4,)]


def test_the_other_way_of_opening_waits(file: Path) -> None:
    _, close = attach(file, read_only=True)
    with pytest.raises(duckdb.ConnectionException, match="different configuration"):
        attach(file, read_only=False)
    close()
    attach(file, read_only=False)[1]()


def test_a_file_that_cannot_be_attached_leaves_nothing_behind(file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.duckdb").write_bytes(b"x" * 20_000)
    for _ in range(2):
        with pytest.raises(duckdb.IOException, match="not a valid DuckDB"):
            attach(tmp_path / "bad.duckdb", read_only=False)
    attach(file, read_only=False)[1]()
    assert elsewhere(file) == "3"


def test_threads_may_come_and_go(file: Path) -> None:
    failed = []

    def work() -> None:
        try:
            for _ in range(20):
                con, close = attach(file, read_only=False)
                con.execute("select sum(i) from t").fetchall()
                close()
        except duckdb.Error as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert elsewhere(file) == "3"
