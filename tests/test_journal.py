"""The journal: what was received is on disk, and a tear costs the torn record only."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import REFUSED, Record, Segment, leftovers, read_segment
from blackbox_kd.errors import CorpusError
from tests.records import answered, attempt, completion, eventually, prompt, request, sent, token, usage


def write(folder: Path, *records: Record) -> Path:
    segment = Segment(folder)
    for record in records:
        segment.append(record)
    segment.close(ingested=False)
    return segment.path


def three() -> list[Record]:
    call = attempt(request(prompt("ä")), usage=usage(7, 3), cost_usd=0.25, latency_s=0.5)
    full = completion(text="Grüße\x00\U0001f600", logprobs=[token("a", -0.5, ("a", -0.5), ("b", -1.0))])
    return [sent(call), answered(full), answered(completion(text="second"))]


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    records = three()
    assert read_segment(write(tmp_path / "j", *records)) == records


def test_an_empty_segment_holds_nothing(tmp_path: Path) -> None:
    assert read_segment(write(tmp_path / "j")) == []


def test_a_record_is_a_length_a_crc_and_msgpack(tmp_path: Path) -> None:
    data = write(tmp_path / "j", three()[0]).read_bytes()
    assert int.from_bytes(data[:4], "little") == len(data) - 8
    assert b"\xa4type\xa4sent" in data  # msgpack for the pair "type": "sent"


def test_a_segment_cut_anywhere_in_its_last_record_keeps_all_before_it(tmp_path: Path) -> None:
    records = three()
    path = write(tmp_path / "j", *records)
    whole = write(tmp_path / "k", *records[:2]).stat().st_size
    for length in reversed(range(whole, path.stat().st_size)):
        os.truncate(path, length)
        assert read_segment(path) == records[:2], length


def test_a_segment_cut_anywhere_is_readable(tmp_path: Path) -> None:
    path = write(tmp_path / "j", *three())
    found = [len(read_segment(path))]
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        found.append(len(read_segment(path)))
    assert found == sorted(found, reverse=True)
    assert set(found) == {0, 1, 2, 3}


def test_a_changed_byte_costs_one_record_and_never_makes_up_another(tmp_path: Path) -> None:
    records = three()
    path = write(tmp_path / "j", *records)
    first = write(tmp_path / "k", records[0]).stat().st_size
    second = write(tmp_path / "l", *records[:2]).stat().st_size
    for position in range(first + 4, second):  # CRC and payload of the second record
        with changed(path, position):
            assert read_segment(path) == [records[0], records[2]], position
    for position in range(first, first + 4):  # its length: nobody can tell where the third begins
        with changed(path, position):
            found = read_segment(path)
            assert found[:1] == records[:1]
            assert all(record in records for record in found)


@contextmanager
def changed(path: Path, position: int) -> Iterator[None]:
    """One bit of the file is another for a while."""
    for moment in range(2):
        with path.open("r+b") as file:
            file.seek(position)
            [byte] = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 0x10]))
        if moment == 0:
            yield


def test_the_zeros_that_a_power_failure_leaves_are_no_records(tmp_path: Path) -> None:
    records = three()
    path = write(tmp_path / "j", *records)
    for zeros in (1, 8, 4096):
        with path.open("ab") as file:
            file.write(bytes(zeros))
        assert read_segment(path) == records


def test_a_record_of_another_version_is_an_error_and_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "c.duckdb.journal")
    payload = b"\x81\xa4type\xa5later"  # {"type": "later"}
    path.write_bytes(struct.pack("<II", len(payload), zlib.crc32(payload)) + payload)
    with pytest.raises(CorpusError, match="written by another version"):
        Corpus(tmp_path / "c.duckdb")
    assert path.exists()


def test_leftovers_are_found_newest_first(tmp_path: Path) -> None:
    a, b, c = three()
    first, second = write(tmp_path / "j", a, b), write(tmp_path / "j", c)
    assert list(leftovers(tmp_path / "j")) == [(second, [c]), (first, [a, b])]


def test_a_call_that_was_in_flight_when_a_new_segment_began_is_not_lost(corpus: Corpus) -> None:
    record = answered()
    write(corpus.journal, sent(record.attempt))
    write(corpus.journal, sent(record.attempt), record)
    assert corpus.replay() == 1
    assert corpus.rows("SELECT status, billed FROM attempts") == [(200, True)]


REPLAY = """
import pathlib, sys
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import leftovers
corpus = Corpus(pathlib.Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for path, records in leftovers(corpus.journal):
    print("replaying", flush=True)
    sys.stdin.readline()
    assert corpus.try_ingest(records)
    path.unlink()
"""


def test_a_start_waits_while_another_one_replays_and_says_so(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", REPLAY, corpus.path], stdin=pipe, stdout=pipe, text=True, bufsize=1
    ) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        write(corpus.journal, answered())
        other.stdin.write("\n")
        assert other.stdout.readline() == "replaying\n"
        start = threading.Thread(target=lambda: seen.extend(Corpus(corpus.path).rows("SELECT text FROM completions")))
        seen: list[tuple[str]] = []
        start.start()
        assert eventually(lambda: "waiting for it" in capsys.readouterr().err)
        assert start.is_alive()
        other.stdin.write("\n")
        start.join(30)
    assert seen == [("Servus",)]
    assert list(corpus.journal.iterdir()) == []


def test_what_duckdb_refuses_is_put_aside_and_everything_else_goes_in(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [answered(completion(request(sample_idx=i), text=f"answer {i}")) for i in range(9)]
    bad = answered(completion(text="bad"), run_id="no uuid")
    lost, lost_too = attempt(request(sample_idx=10)), attempt(request(sample_idx=11), run_id="no uuid")
    records = [sent(bad.attempt), *good[:4], bad, sent(good[4].attempt), *good[4:], sent(lost), sent(lost_too)]
    for _ in range(2):  # the second time as after a kill before the segment was deleted
        path = write(corpus.journal, *records)
        assert corpus.replay() == 10
        assert not path.exists()
    assert corpus.rows("SELECT text FROM completions ORDER BY text") == [(f"answer {i}",) for i in range(9)]
    assert corpus.rows("SELECT count(*), count(*) FILTER (billed IS NULL) FROM attempts") == [(10, 1)]
    assert read_segment(corpus.journal / REFUSED) == [bad, sent(lost_too)]
    said = " ".join(capsys.readouterr().err.split())
    assert "DuckDB refuses 2 of 14 records (Conversion Error: Could not convert string 'no uuid'" in said
    assert f"they are kept in {corpus.journal / REFUSED}, the others are stored" in said


def test_what_was_refused_is_ingested_like_any_segment_once_it_is_renamed(corpus: Corpus) -> None:
    write(corpus.journal, answered(completion(text="bad"), run_id="no uuid"))
    corpus.replay()
    (corpus.journal / REFUSED).rename(corpus.journal / "0.journal")
    corpus.rows("ALTER TABLE attempts ALTER run_id TYPE VARCHAR")
    corpus.rows("ALTER TABLE completions ALTER run_id TYPE VARCHAR")
    assert corpus.replay() == 1
    assert corpus.rows("SELECT text FROM completions") == [("bad",)]


def test_a_journal_that_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert list(leftovers(tmp_path / "none")) == []


def test_a_segment_that_this_process_writes_is_left_alone(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "j")
    segment.append(three()[1])
    assert list(leftovers(tmp_path / "j")) == []
    segment.close(ingested=False)
    assert len(list(leftovers(tmp_path / "j"))) == 1


def test_an_ingested_segment_is_deleted(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "j")
    segment.close(ingested=True)
    assert list((tmp_path / "j").iterdir()) == []


def test_a_segment_taken_by_another_process_while_it_is_looked_at_is_passed_over(tmp_path: Path) -> None:
    for record in three():
        write(tmp_path / "j", record)
    found = leftovers(tmp_path / "j")
    path, _ = next(found)
    for other in (tmp_path / "j").iterdir():
        other.unlink()
    assert list(found) == []
    assert not path.exists()


WRITE_FOR_EVER = """
import sys, pathlib
from blackbox_kd.corpus.journal import Segment
from tests.records import answered, completion
segment = Segment(pathlib.Path(sys.argv[1]))
for i in range(10**9):
    segment.append(answered(completion(text=f"{i} " + "x" * 5000)))
    print(i, flush=True)
"""


def test_a_living_process_keeps_its_segment_and_a_kill_loses_nothing_that_was_written(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "c.duckdb")
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, corpus.journal], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout
        for line in writer.stdout:
            if int(line) == 5:
                break
        assert corpus.replay() == 0
        assert list(leftovers(corpus.journal)) == []
        os.kill(writer.pid, signal.SIGKILL)
        written = [int(line) for line in writer.stdout]
    last = written[-1] if written else 5
    [(_, records)] = leftovers(corpus.journal)
    texts = [record.completions[0].text for record in records]  # type: ignore[union-attr]
    assert [int(text.split()[0]) for text in texts[: last + 1]] == list(range(last + 1))
    assert len(texts) - (last + 1) in (0, 1)  # written, and killed before it was printed
    assert corpus.replay() == len(texts)
    assert corpus.rows("SELECT count(DISTINCT attempt_id) FROM attempts") == [(len(texts),)]
    assert list(corpus.journal.iterdir()) == []


FULL_DISK = """
import pathlib, resource, signal, sys
from blackbox_kd.corpus.journal import Segment, read_segment
from blackbox_kd.errors import CorpusError
from tests.records import answered, completion
segment = Segment(pathlib.Path(sys.argv[1]))
segment.append(answered(completion(text="first")))
soft = segment.path.stat().st_size + 50
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
try:
    segment.append(answered(completion(text="does not fit")))
except CorpusError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
segment.append(answered(completion(text="fits again")))
print([record.completions[0].text for record in read_segment(segment.path)])
"""


def test_a_full_disk_is_an_error_and_spoils_neither_what_came_before_nor_after(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "j"], capture_output=True, text=True, check=True)
    said, texts = done.stdout.splitlines()
    assert said.startswith("cannot write the journal")
    assert "disk is full" in said
    assert texts == "['first', 'fits again']"
