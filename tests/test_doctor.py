"""`doctor`: each thing that can be wrong is found, and a healthy corpus is called so."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Answered, Segment
from tests.conftest import RUN_ID
from tests.records import CONTEXT, answered, attempt, completion, prompt, request, token

Ask = {"model": "m", "logprobs": True}


@pytest.fixture
def healthy(corpus: Corpus) -> Corpus:
    asked = [request(prompt(f"Hi {i}"), body=Ask) for i in range(3)]
    corpus.add_prompts([prompt(f"Hi {i}") for i in range(3)])
    corpus.add_requests(asked)
    scored = [token("a", -0.1, ("a", -0.1)), token("b", -0.2, ("b", -0.2))]
    corpus.try_ingest([answered(completion(q, logprobs=scored, served_model="m-1")) for q in asked])
    corpus.add_run(RUN_ID, corpus.path.parent, {}, "m", CONTEXT)
    return corpus


def examine(corpus: Corpus, capsys: pytest.CaptureFixture[str], code: int) -> dict[str, tuple[str, str]]:
    """What is not ok: check -> (level, found)."""
    assert main(["doctor", "--corpus", str(corpus.path), "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"] is (code == 0)
    assert all(f["advice"] for f in said["findings"] if f["level"] != "ok")
    return {f["check"]: (f["level"], f["found"]) for f in said["findings"] if f["level"] != "ok"}


def test_a_healthy_corpus_is_called_so(healthy: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    before = healthy.path.read_bytes()
    assert examine(healthy, capsys, 0).keys() <= {"dead space"}
    assert main(["doctor", "--corpus", str(healthy.path)]) == 0
    assert "ok    changed answers: none of 3" in capsys.readouterr().out
    assert healthy.path.read_bytes() == before


BROKEN: list[tuple[str, str, str]] = [
    ("DELETE FROM requests WHERE sample_idx = 0", "answers without a question", "3 completions"),
    ("DELETE FROM prompts", "answers without a prompt", "3 completions"),
    ("UPDATE logprobs SET top_ids = [1]", "logprobs that do not fit", "3 rows"),
    ("UPDATE logprobs SET missing_mass = []", "logprobs that do not fit", "3 rows"),
    ("UPDATE logprobs SET completion_id = uuid()", "logprobs without an answer", "3 rows"),
    ("UPDATE completions SET text = 'better'", "changed answers", "3 of 3, such as"),
    ("UPDATE meta SET value = '0'", "schema version", "0, this blackbox_kd speaks"),
    ("UPDATE meta SET value = '99'", "schema version", "99, this blackbox_kd speaks"),
]


@pytest.mark.parametrize(("sql", "check", "found"), BROKEN, ids=[b[1] + b[0][:8] for b in BROKEN])
def test_what_must_be_mended(
    healthy: Corpus, capsys: pytest.CaptureFixture[str], sql: str, check: str, found: str
) -> None:
    healthy.rows(sql)
    level, text = examine(healthy, capsys, 2)[check]
    assert level == "fix"
    assert text.startswith(found)


def test_a_copy_without_constraints_may_hold_an_answer_twice(
    healthy: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    for sql in (
        "CREATE TABLE twice AS FROM completions UNION ALL FROM completions",
        "DROP TABLE completions CASCADE",
        "ALTER TABLE twice RENAME TO completions",
    ):
        healthy.rows(sql)
    assert examine(healthy, capsys, 2)["duplicate answers"] == ("fix", "3 questions with two answers for one choice")


def test_what_is_worth_knowing(healthy: Corpus, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other, dead = request(prompt("Hi 0"), context_hash=None, body=Ask | {"temperature": 0.5}), request(prompt("no"))
    healthy.add_requests([other, dead])
    lost = attempt(dead, attempted_at=1.0, status=None, billed=None)
    refused = Answered(attempt=attempt(dead, status=400, billed=False, error="HTTP 400: no"), dead_letter=True)
    cut = completion(other, finish_reason="length", served_model="m-2")
    healthy.try_ingest([answered(cut), refused, Answered(attempt=lost)])
    healthy.add_run("00000000-0000-4000-8000-000000000002", tmp_path / "gone", {}, "m", CONTEXT)
    found = examine(healthy, capsys, 0)
    assert {level for level, _ in found.values()} == {"note"}
    texts = {check: text for check, (_, text) in found.items() if check != "dead space"}
    assert texts.pop("several teachers").startswith("2 models or private prompts: m under ")
    assert texts == {
        "in flight at a kill": "1 calls of which nobody knows whether they were billed",
        "logprobs asked for and not given": "m: 1 of 4 answers came without",
        "an alias that moved": "m was served by 2 models: m-1, m-2",
        "answers cut off": "sample by m: 25% end at the maximum length",
        "dead letters": "1 times: HTTP 400: no",
        "run directory gone": f"{tmp_path / 'gone'} (run 00000000)",
    }


def test_the_journals_segments_are_told_apart(healthy: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    live = Segment(healthy.journal)
    assert examine(healthy, capsys, 0)["journal"] == ("note", f"{live.path.name} is being written by a run")
    live.append(answered(completion(request(prompt("late")))))
    live.close(ingested=False)
    assert examine(healthy, capsys, 2)["journal"] == ("fix", f"1 records wait in {live.path.name}")
    data = live.path.read_bytes()
    live.path.write_bytes(data + data[:-3])
    assert ", 1 more cannot be read" in examine(healthy, capsys, 2)["journal"][1]
    live.path.write_bytes(data)
    other = live.path.with_name("0-0.journal")
    other.write_bytes(struct.pack("<II", 4, zlib.crc32(b"what")) + b"what")
    assert main(["doctor", "--corpus", str(healthy.path)]) == 2
    assert "was written by another version of blackbox_kd" in capsys.readouterr().out


def test_what_was_refused_is_reported(healthy: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    healthy.try_ingest([answered(run_id="no uuid")])
    found = f"1 records that DuckDB refused are kept in {healthy.journal / 'refused.records'}"
    assert examine(healthy, capsys, 2)["refused records"] == ("fix", found)


@pytest.mark.parametrize("kind", ["missing", "other"])
def test_a_file_that_is_no_corpus_is_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import duckdb

    path: Any = tmp_path / "x.duckdb"
    if kind == "other":
        duckdb.connect(str(path)).close()
    assert main(["doctor", "--corpus", str(path)]) == 2
    assert "no corpus" in capsys.readouterr().err
