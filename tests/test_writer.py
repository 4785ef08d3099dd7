"""The writer: the journal first, DuckDB when it is free, and nothing lost in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blackbox_kd.corpus import Corpus, query
from blackbox_kd.corpus.journal import REFUSED, Answered, leftovers, read_segment
from blackbox_kd.corpus.writer import REFUSED_TO_STOP, Writer
from blackbox_kd.errors import CorpusBusy, CorpusError
from tests.records import answered, attempt, completion, eventually, held_open, let_go, prompt, request, sent

COUNT = "SELECT count(*) FROM completions"


def answer(number: int) -> Answered:
    return answered(completion(request(sample_idx=number), text=f"answer {number}"))


def test_all_that_was_submitted_is_stored_when_the_block_ends_and_the_journal_is_empty(corpus: Corpus) -> None:
    many = 300
    with Writer(corpus) as writer:
        for i in range(many):
            record = answer(i)
            writer.submit(sent(record.attempt))
            writer.submit(record)
    assert corpus.rows("SELECT count(*), count(DISTINCT text) FROM completions") == [(many, many)]
    assert corpus.rows("SELECT count(*) FROM attempts") == [(many,)]
    assert list(corpus.journal.iterdir()) == []


def test_a_writer_that_is_given_nothing_leaves_nothing(corpus: Corpus) -> None:
    with Writer(corpus):
        assert len(list(corpus.journal.iterdir())) == 1
    assert list(corpus.journal.iterdir()) == []


def test_a_record_is_in_the_journal_as_soon_as_submit_returns(corpus: Corpus) -> None:
    with held_open(corpus.path) as other, Writer(corpus) as writer:
        for i in range(3):
            writer.submit(answer(i))
        [segment] = corpus.journal.iterdir()
        data = segment.read_bytes()
        assert all(f"answer {i}".encode() in data for i in range(3))
        let_go(other)


def test_another_process_can_query_between_flushes_while_the_writer_is_open(corpus: Corpus) -> None:
    ask = "import sys, duckdb; print(duckdb.connect(sys.argv[1], read_only=True).sql(sys.argv[2]).fetchall()[0][0])"
    with Writer(corpus) as writer:
        for i in range(5):
            writer.submit(answer(i))
        assert eventually(lambda: query(corpus.path, COUNT)[1] == [(5,)])
        done = subprocess.run([sys.executable, "-c", ask, corpus.path, COUNT], capture_output=True, text=True)
        assert done.stdout == "5\n", done.stderr
        writer.submit(answer(5))
    assert corpus.rows(COUNT) == [(6,)]


def test_while_somebody_holds_the_file_the_journal_waits_and_then_all_is_stored(corpus: Corpus) -> None:
    with held_open(corpus.path) as other, Writer(corpus) as writer:
        for i in range(3):
            writer.submit(answer(i))
        time.sleep(0.5)
        let_go(other)
        assert eventually(lambda: query(corpus.path, COUNT)[1] == [(3,)])


def test_a_file_that_is_held_for_the_writers_whole_life_stops_the_stage_and_loses_nothing(corpus: Corpus) -> None:
    patient = Corpus(corpus.path, lock_wait_s=0.3)
    with held_open(corpus.path):
        with pytest.raises(CorpusBusy, match="4 records wait in"), Writer(patient) as writer:  # noqa: PT012
            for i in range(4):
                writer.submit(answer(i))
        [(path, records)] = leftovers(corpus.journal)
        assert len(records) == 4
    again = Corpus(corpus.path)
    assert again.rows("SELECT text FROM completions ORDER BY text") == [(f"answer {i}",) for i in range(4)]
    assert not path.exists()


def test_more_records_than_a_batch_do_not_spin_or_hang_on_a_held_file(corpus: Corpus) -> None:
    patient = Corpus(corpus.path, lock_wait_s=0.3)
    with held_open(corpus.path):
        start, cpu = time.monotonic(), time.process_time()
        with pytest.raises(CorpusBusy), Writer(patient) as writer:  # noqa: PT012
            for i in range(300 + 10):
                writer.submit(answer(i))
            time.sleep(1.0)
        assert time.monotonic() - start < 10
        assert time.process_time() - cpu < 0.9  # of more than 1.3 s; a spinning thread takes all of it
    assert Corpus(corpus.path).rows(COUNT) == [(300 + 10,)]


def bad(text: str) -> Answered:
    return answered(completion(request(prompt(text)), text=text), run_id="no uuid")


def test_what_duckdb_refuses_is_put_aside_and_the_collection_goes_on(corpus: Corpus) -> None:
    with Writer(corpus) as writer:
        writer.submit(answer(0))
        writer.submit(bad("bad"))
        writer.submit(answer(1))
        assert eventually(lambda: writer.unstored() == set())
        writer.submit(answer(2))
    assert corpus.rows("SELECT text FROM completions ORDER BY text") == [(f"answer {i}",) for i in range(3)]
    assert [path.name for path in corpus.journal.iterdir()] == [REFUSED]
    [refused] = read_segment(corpus.journal / REFUSED)
    assert isinstance(refused, Answered)
    assert refused.completions[0].text == "bad"


def test_a_collection_whose_answers_are_refused_stops(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="has refused 8 records"), Writer(corpus) as writer:  # noqa: PT012
        for i in range(REFUSED_TO_STOP):
            writer.submit(bad(f"bad {i}"))
        assert eventually(lambda: not any(t.name == "corpus-writer" for t in threading.enumerate()))
        writer.submit(answer(1))


def test_what_cannot_be_stored_stops_the_collection_and_keeps_the_journal(corpus: Corpus) -> None:
    corpus.path.write_bytes(b"no database")
    with pytest.raises(CorpusError, match="cannot open"), Writer(corpus) as writer:  # noqa: PT012
        writer.submit(answer(0))
        assert eventually(lambda: not any(t.name == "corpus-writer" for t in threading.enumerate()))
        with pytest.raises(CorpusError, match="cannot open"):
            writer.submit(answer(1))
    [(_, records)] = leftovers(corpus.journal)
    assert [r.completions[0].text for r in records if isinstance(r, Answered)] == ["answer 0", "answer 1"]


def test_an_error_that_shows_only_at_the_end_is_raised_at_the_end(corpus: Corpus) -> None:
    corpus.path.write_bytes(b"no database")
    with pytest.raises(CorpusError, match="cannot open"), Writer(corpus) as writer:
        writer.submit(answer(0))
    assert len(list(leftovers(corpus.journal))) == 1


def segments(corpus: Corpus) -> list[Path]:
    return sorted(corpus.journal.glob("*.journal"))


def test_new_segments_begin_while_records_wait_and_each_goes_once_its_records_are_stored(corpus: Corpus) -> None:
    flying = sent(attempt(request(sample_idx=-1)))
    with held_open(corpus.path) as other, Writer(corpus, segment_bytes=300) as writer:
        writer.submit(flying)
        for i in range(3):
            writer.submit(answer(i))
            assert eventually(lambda many=i + 2: len(segments(corpus)) == many)
        assert [len(read_segment(path)) for path in segments(corpus)] == [2, 2, 2, 1]
        let_go(other)
        assert eventually(lambda: len(segments(corpus)) == 1)
        assert read_segment(segments(corpus)[0]) == [flying]
    assert corpus.rows(COUNT) == [(3,)]
    assert segments(corpus) == []


def test_all_segments_wait_for_the_next_start_where_the_file_is_held_to_the_end(corpus: Corpus) -> None:
    patient = Corpus(corpus.path, lock_wait_s=0.1)
    with held_open(corpus.path):
        with pytest.raises(CorpusBusy, match="2 records wait"), Writer(patient, segment_bytes=300) as writer:  # noqa: PT012
            for i in range(2):
                writer.submit(answer(i))
                assert eventually(lambda many=i + 2: len(segments(corpus)) == many)
        assert len(list(leftovers(corpus.journal))) == 3
    assert Corpus(corpus.path).rows(COUNT) == [(2,)]


def test_an_error_in_the_block_is_the_one_that_is_seen_and_what_came_before_it_is_kept(corpus: Corpus) -> None:
    with pytest.raises(ZeroDivisionError), Writer(corpus) as writer:  # noqa: PT012
        writer.submit(answer(1))
        raise ZeroDivisionError
    assert corpus.rows(COUNT) == [(1,)]


COLLECT = """
import pathlib, sys, time
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.writer import Writer
from tests.records import answered, completion, request, sent
with Writer(Corpus(pathlib.Path(sys.argv[1]))) as writer:
    for i in range(10**6):
        record = answered(completion(request(sample_idx=i), text=f"answer {i}"))
        writer.submit(sent(record.attempt))
        writer.submit(record)
        print(i, flush=True)
        time.sleep(0.001)
"""


def test_a_kill_in_the_middle_loses_no_answer_and_counts_what_was_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    with subprocess.Popen([sys.executable, "-c", COLLECT, path], stdout=subprocess.PIPE, text=True) as collecting:
        assert collecting.stdout
        for line in collecting.stdout:
            if int(line) >= 300:
                break
        os.kill(collecting.pid, signal.SIGKILL)
        last = max([300, *(int(line) for line in collecting.stdout if line.endswith("\n"))])
    corpus = Corpus(path)
    found = corpus.rows("SELECT count(*), count(DISTINCT text) FROM completions")[0]
    assert found in [(last + 1, last + 1), (last + 2, last + 2)]  # the newest may be stored but not yet printed
    texts = {text for (text,) in corpus.rows("SELECT text FROM completions")}
    assert {f"answer {i}" for i in range(last + 1)} <= texts
    lost = corpus.rows("SELECT count(*) FROM attempts WHERE billed IS NULL")[0][0]
    assert corpus.rows("SELECT count(*) FROM attempts") == [(found[0] + lost,)]
    assert lost in (0, 1)
