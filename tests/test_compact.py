"""Compacting: the same rows in fewer bytes, or the old file untouched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.corpus import Corpus, compact
from blackbox_kd.corpus.journal import Segment
from blackbox_kd.errors import CorpusBusy, CorpusError
from tests.records import answered, completion, held_open, prompt, request, token

ANSWERS = 6


@pytest.fixture
def full(corpus: Corpus) -> Corpus:
    """Answers that came one at a time, each with logprobs."""
    questions = [request(prompt(f"Hi {i}")) for i in range(ANSWERS)]
    corpus.add_requests(questions)
    for i, asked in enumerate(questions):
        scored = [token(f"t{j}", -0.1 * j, (f"t{j}", -0.1 * j), (f"u{i}", -2.5)) for j in range(30)]
        corpus.try_ingest([answered(completion(asked, text="word " * 200, logprobs=scored))])
    return corpus


def everything(corpus: Corpus) -> dict[str, Any]:
    tables = corpus.rows("SELECT table_name FROM duckdb_tables() ORDER BY ALL")
    return {table: corpus.rows(f"FROM {table} ORDER BY ALL") for (table,) in tables}


def files(corpus: Corpus) -> set[str]:
    return {path.name for path in corpus.path.parent.iterdir() if path.is_file()}


def test_the_copy_holds_the_same_rows_in_fewer_bytes(full: Corpus) -> None:
    rows, names = everything(full), files(full)
    before, after = compact(full.path)
    assert after < before
    assert after == full.path.stat().st_size
    assert everything(full) == rows
    assert files(full) == names


def test_keys_and_views_are_kept(full: Corpus) -> None:
    compact(full.path)
    full.try_ingest([answered(completion(request(prompt("Hi 0")), text="another answer to the same question"))])
    assert full.rows("SELECT count(*) FROM completions") == [(ANSWERS,)]
    assert full.rows("SELECT count(*) FROM token_logprobs") == [(ANSWERS * 30,)]
    assert full.rows("SELECT count(*) FROM sft") == [(0,)]


def test_a_link_stays_a_link_to_the_smaller_file(full: Corpus, tmp_path: Path) -> None:
    rows, link = everything(full), tmp_path / "elsewhere" / "link.duckdb"
    link.parent.mkdir()
    link.symlink_to(full.path)
    before, after = compact(link)
    assert link.is_symlink()
    assert full.path.stat().st_size == after < before
    assert everything(full) == rows
    assert list(link.parent.iterdir()) == [link]


def test_rows_that_are_still_in_the_write_ahead_log_are_kept(corpus: Corpus) -> None:
    code = "import sys, os, duckdb; c = duckdb.connect(sys.argv[1]); c.execute('SET wal_autocheckpoint = \\'1GB\\''); "
    code += "c.execute(\"INSERT INTO meta VALUES ('note', 'late')\"); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(corpus.path)], check=False).returncode == 9
    assert "corpus.duckdb.wal" in files(corpus)
    compact(corpus.path)
    assert files(corpus) == {"corpus.duckdb"}
    assert ("note", "late") in corpus.rows("FROM meta")


def test_a_failed_copy_leaves_the_old_file(full: Corpus) -> None:
    rows, data = everything(full), full.path.read_bytes()
    blocked = full.path.with_name("corpus.duckdb.compact")
    (blocked / "in the way").mkdir(parents=True)
    with pytest.raises(CorpusError, match="cannot compact"):
        compact(full.path)
    assert full.path.read_bytes() == data
    assert everything(full) == rows


def test_what_a_killed_compaction_left_is_replaced(full: Corpus) -> None:
    rows = everything(full)
    full.path.with_name("corpus.duckdb.compact").write_bytes(b"half of a file")
    full.path.with_name("corpus.duckdb.compact.wal").write_bytes(b"half of a log")
    compact(full.path)
    assert everything(full) == rows
    assert files(full) == {"corpus.duckdb"}


def test_a_corpus_in_use_is_left_alone(full: Corpus, capfd: pytest.CaptureFixture[str]) -> None:
    with held_open(full.path):
        data = full.path.read_bytes()
        with pytest.raises(CorpusBusy):
            compact(full.path, wait_s=0.1)
        assert full.path.read_bytes() == data


def test_one_that_is_written_to_meanwhile_is_left_alone(full: Corpus, tmp_path: Path) -> None:
    from blackbox_kd.corpus.connection import _replace

    read = full.path.stat()
    full.rows("INSERT INTO meta VALUES ('note', 'late')")
    fresh = tmp_path / "fresh"
    fresh.write_bytes(b"a copy without that row")
    with pytest.raises(CorpusBusy, match="written to while it was copied"):
        _replace(full.path, fresh, read)
    assert ("note", "late") in full.rows("FROM meta")


def test_the_command_ingests_the_journal_first(full: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    late = request(prompt("the last one"))
    full.add_requests([late])
    segment = Segment(full.journal)
    segment.append(answered(completion(late)))
    segment.close(ingested=False)
    assert main(["compact", "--corpus", str(full.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes_after"] < said["bytes_before"]
    assert full.rows("SELECT count(*) FROM completions") == [(ANSWERS + 1,)]


def test_a_corpus_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compact", "--corpus", str(tmp_path / "none.duckdb")]) == 2
    assert "no corpus" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
