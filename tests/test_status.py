"""`status`: progress without the lock, and the corpus where nobody works on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd import status
from blackbox_kd.__main__ import main
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.heartbeat import FRESH_S, Heartbeat, read_heartbeats, write_heartbeat
from tests.conftest import RUN_ID
from tests.records import answered, completion, held_open, prompt, request


def beat(**changes: Any) -> Heartbeat:
    now = time.time()
    given = {"run_id": RUN_ID, "run_dir": "runs/x", "pid": os.getpid(), "description": "sample", "total": 100,
             "done": 40, "cached": 7, "in_flight": 8, "rate_per_s": 12.34, "limited_share": 0.02, "spent_usd": 0.5,
             "started_at": now - 60, "updated_at": now}  # fmt: skip
    return Heartbeat(**{**given, **changes})


def gone() -> int:
    """The pid of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def said(corpus: Corpus, capsys: pytest.CaptureFixture[str], *flags: str) -> Any:
    assert main(["status", "--corpus", str(corpus.path), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_heartbeat_is_read_back(tmp_path: Path) -> None:
    one = beat(cap={"max_usd": 5.0, "max_tokens": None}, last_error="HTTP 503")
    write_heartbeat(tmp_path / "new", one)
    assert read_heartbeats(tmp_path / "new") == [one]
    write_heartbeat(tmp_path / "new", beat(done=50))
    assert [b.done for b in read_heartbeats(tmp_path / "new")] == [50]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{RUN_ID}.status.json"]


def test_the_latest_comes_first_and_others_peoples_files_are_left_out(tmp_path: Path) -> None:
    for run_id, at in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        write_heartbeat(tmp_path, beat(run_id=run_id, updated_at=at))
    (tmp_path / "d.status.json").write_text('{"run_id": 7}')
    (tmp_path / "e.status.json").write_text("half a f")
    assert [b.run_id for b in read_heartbeats(tmp_path)] == ["b", "c", "a"]
    assert read_heartbeats(tmp_path / "none") == []


def test_a_heartbeat_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_heartbeat(tmp_path / "file", beat())


def test_only_a_fresh_one_of_a_living_process_is_alive() -> None:
    assert beat().alive
    assert beat(state="draining").alive
    assert not beat(state="ended").alive
    assert not beat(updated_at=time.time() - FRESH_S - 1).alive
    assert not beat(pid=gone()).alive


def test_a_live_run_is_shown_without_opening_the_corpus(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    write_heartbeat(corpus.journal, beat(last_error="HTTP 503: busy", cap={"max_usd": 2.0}))
    corpus.path.write_bytes(b"not even a database")
    found = said(corpus, capsys)
    assert "answers" not in found
    assert found["live"][0]["alive"]
    assert found["live"][0]["done"] == 40
    assert main(["status", "--corpus", str(corpus.path)]) == 0
    text = capsys.readouterr().out
    for part in (
        "40 of 100 done, 7 known before",
        "12.3/s",
        "2% were 429",
        "spent $0.5000",
        "max_usd 2",
        "HTTP 503: busy",
    ):
        assert part in text


def test_full_opens_it_all_the_same(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    write_heartbeat(corpus.journal, beat())
    corpus.try_ingest([answered(completion())])
    corpus.add_requests([request()])
    found = said(corpus, capsys, "--full")
    assert [row["answers"] for row in found["answers"]] == [1]
    assert found["live"]


def test_after_a_run_the_corpus_is_shown(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    write_heartbeat(corpus.journal, beat(run_id="earlier", updated_at=1.0))
    write_heartbeat(corpus.journal, beat(pid=gone()))
    corpus.add_requests([request(prompt("Hi"))])
    found = said(corpus, capsys)
    assert [live["run_id"] for live in found["live"]] == [RUN_ID]
    assert {"state": "pending", "requests": 1} in found["unanswered"]
    assert main(["status", "--corpus", str(corpus.path)]) == 0
    text = capsys.readouterr().out
    assert "gone without saying so" in text
    assert "unanswered" in text


def test_a_corpus_that_somebody_holds_is_one_line_and_no_mistake(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_open(corpus.path):
        assert main(["status", "--corpus", str(corpus.path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "is held open by another program" in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "time unknown"), (7.4, "7 s"), (75, "1 m 15 s"), (3700, "1 h 1 m"), (200_000, "2 d 7 h"), (-1, "0 s")],
)
def test_durations_have_two_units(seconds: float | None, text: str) -> None:
    assert status.duration(seconds) == text


def test_small_sums_are_not_rounded_away() -> None:
    assert [status.money(v) for v in (None, 0.0012, 12.345, -1e-19)] == ["$ unknown", "$0.0012", "$12.35", "$0.0000"]
