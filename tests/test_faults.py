"""What goes wrong at an endpoint, on a disk and beside us, over real sockets and files: nothing received is lost,
nothing is billed twice beyond what was in flight, and the user reads one clear line."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from servers import TokenBucket

from blackbox_kd import sample
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.checks import findings
from blackbox_kd.corpus.journal import leftovers
from blackbox_kd.errors import CorpusBusy, TeacherUnreachable
from blackbox_kd.teachers.engine import CHUNK, Engine
from tests.conftest import RUN_ID
from tests.fakes import Answer, FakeAPI, Handler, chat_reply, cut_short, error_reply, reset, served
from tests.records import eventually, held_open, let_go
from tests.test_engine import (
    ask,
    attempts,
    cancelled_in_the_middle,
    config,
    count,
    echo,
    echoes,
    question,
    questions,
    stored,
    texts,
)
from tests.test_sample import answers, corpus_of, last_line, start, train, wait_for, write_config, write_prompts

Faulty = Callable[[web.Request], Any]


async def stalled(_: web.Request) -> Any:
    await asyncio.sleep(1.5)
    return web.json_response(chat_reply("too late"))


def error_in_200(_: web.Request) -> Any:
    return {"error": {"message": "upstream is down", "code": 502}}


def always(fault: Faulty) -> FakeAPI:
    return FakeAPI(lambda body, request: fault(request))


# An endpoint that answers nobody: one line, nothing lost, and the same command goes on later


@pytest.mark.parametrize(
    ("fault", "said", "billed"),
    [
        (lambda _: error_reply(500, "oops"), "HTTP 500: oops", False),
        (lambda _: error_reply(502, "bad gateway"), "HTTP 502: bad gateway", False),
        (lambda _: error_reply(503, "overloaded"), "HTTP 503: overloaded", False),
        (lambda _: error_reply(529, "overloaded"), "HTTP 529: overloaded", False),
        (reset, "Server ?[Dd]isconnected.*|ClientOSError: .*", None),
        (cut_short, "ClientPayloadError: .*", None),
        (lambda _: web.Response(text="<html>hello"), "a 200 .*<html>hello.*", None),
        (lambda _: web.json_response([1, 2]), r"a 200 .*\[1, ?2\].*", None),
        (lambda _: web.json_response({"choices": []}), "a 200 without choices: .*", None),
        (error_in_200, "HTTP 502: upstream is down.*", False),
        (stalled, ".*Timeout.*", None),
    ],
    ids=[
        "500",
        "502",
        "503",
        "529",
        "reset",
        "cut short",
        "no JSON",
        "wrong shape",
        "no choices",
        "error in 200",
        "stall",
    ],
)
def test_a_fault_that_stays_is_one_line_and_the_same_command_goes_on_when_it_has_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Faulty, said: str, billed: bool | None
) -> None:
    with served(always(fault)) as api:
        path = write_config(tmp_path, api.url, teacher={"max_retries": 0, "timeout_s": 0.5})
        assert sample.main(["--config", path]) == 3
        assert re.fullmatch(f"error: none of 4 requests got through: ({said})", last_line(capsys))
        assert sorted(api.asked) == [f"train {i}" for i in range(4)]
        assert attempts(corpus_of(tmp_path), "billed") == [(billed,)] * 4
        api.handler = lambda body, _: echo(body)
        assert sample.main(["--config", path]) == 0
    assert answers(tmp_path) == train(4)
    assert len(api.bodies) == 8


def test_what_one_fault_left_open_is_said_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def handler(body: dict[str, Any], _: web.Request) -> Answer:
        return error_reply(529, "overloaded") if body["messages"][-1]["content"] == "train 2" else echo(body)

    with served(FakeAPI(handler)) as api:
        assert sample.main(["--config", write_config(tmp_path, api.url, teacher={"max_retries": 0})]) == 0
    said = capsys.readouterr().err.splitlines()
    assert "1 of 4 requests failed (HTTP 529: overloaded); they stay pending, run again" in said
    assert len(answers(tmp_path)) == 3


# Rate limits


@pytest.mark.parametrize("retry_after", [True, False], ids=["with Retry-After", "without"])
def test_a_storm_of_429s_wastes_few_calls_and_everybody_is_answered(corpus: Corpus, retry_after: bool) -> None:
    many, per_s, most = 150, 60, 32
    bucket = TokenBucket(per_s)
    bucket.take(0.0)

    def limited(body: dict[str, Any], _: web.Request) -> Answer:
        wait_s = bucket.take(time.monotonic())
        headers = {"retry-after-ms": str(round(1000 * wait_s) + 1)} if retry_after else None
        return error_reply(429, "slow down", headers=headers) if wait_s else echo(body)

    with served(FakeAPI(limited, delay_s=0.02)) as api:
        found, engine = ask(config(api.url, concurrency=most, max_retries=0), corpus, questions(many))
    assert texts(found) == echoes(*range(many))
    wasted = len(api.bodies) - many
    assert 0 < wasted <= most + 0.1 * many  # one window found the limit, hardly a call after it
    assert engine.caller.limiter.limited_calls == wasted
    rows = corpus.rows("SELECT status, billed, count(*) FROM attempts GROUP BY ALL ORDER BY ALL")
    assert rows == [(200, True, many), (429, False, wasted)]


def test_a_long_pause_is_announced(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeAPI(lambda *_: error_reply(429, headers={"retry-after": "20"}))) as api:
        engine = Engine(config(api.url), corpus, RUN_ID)
        asyncio.run(cancelled_in_the_middle(engine, [question(1)], lambda: engine.caller.limiter.pause_s > 0))
    assert re.search(r"^rate limit: the teacher wants a pause of 2[01] s$", capsys.readouterr().err, re.MULTILINE)


def test_a_pause_that_is_too_long_stops_the_stage_and_keeps_what_was_received(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def two_then_tomorrow(body: dict[str, Any], _: web.Request) -> Answer:
        return (
            echo(body) if len(api.bodies) <= 2 else error_reply(429, "quota of today", headers={"retry-after": "9999"})
        )

    with served(FakeAPI(two_then_tomorrow)) as api:
        assert sample.main(["--config", write_config(tmp_path, api.url, teacher={"concurrency": 1})]) == 3
    assert last_line(capsys) == (
        "error: the teacher wants a pause of 9999 s, more than teacher.give_up_s (300): "
        "run again then, or raise it (HTTP 429: quota of today)"
    )
    assert (len(api.bodies), len(answers(tmp_path))) == (3, 2)


@pytest.mark.parametrize("status", [429, 500])
def test_an_endpoint_that_only_fails_is_given_up_after_a_while(corpus: Corpus, status: int) -> None:
    with served(FakeAPI(lambda *_: error_reply(status))) as api, pytest.raises(TeacherUnreachable) as raised:
        ask(config(api.url, give_up_s=0.4, max_retries=50), corpus, questions(2))
    what = {429: "rate limits", 500: "failures"}[status]
    assert re.fullmatch(rf"nothing but {what} for \d s \(teacher\.give_up_s is 0\); run again later", str(raised.value))
    assert {s for (s,) in attempts(corpus, "status")} == {status}
    assert count(corpus, "pending") == 2


def only(number: int, *refusal: Any) -> Handler:
    """One question is always limited, all others are answered."""

    def handler(body: dict[str, Any], _: web.Request) -> Answer:
        if body["messages"][-1]["content"] == f"Say {number}":
            return error_reply(429, *refusal, headers={"retry-after-ms": "10"})
        return echo(body)

    return handler


def test_a_question_too_large_for_the_limit_is_a_dead_letter_at_once(corpus: Corpus) -> None:
    said = "Request too large for m on tokens per min (TPM): Limit 100, Requested 200."
    with served(FakeAPI(only(1, said, "rate_limit_exceeded"))) as api:
        found, _ = ask(config(api.url), corpus, questions(4))
    assert (texts(found), len(api.bodies)) == (echoes(0, 2, 3), 4)
    assert corpus.rows("SELECT status, error FROM dead_letters") == [(429, f"HTTP 429: {said} (rate_limit_exceeded)")]


def test_a_question_that_gets_nothing_but_429s_while_others_are_answered_stays_pending(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeAPI(only(30), delay_s=0.02)) as api:
        found, _ = ask(config(api.url, concurrency=4, give_up_s=1), corpus, questions(120))
    assert texts(found) == sorted(set(echoes(*range(120))) - {"echo Say 30"})
    assert (count(corpus, "pending"), count(corpus, "dead_letters")) == (1, 0)
    assert "1 of 120 requests failed (HTTP 429: no); they stay pending, run again" in capsys.readouterr().err
    assert 5 < api.asked.count("Say 30") < 40


# The input


def test_a_row_that_stands_twice_in_the_input_is_asked_once(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts", train=3)
    file = tmp_path / "prompts" / "train.jsonl"
    file.write_text(file.read_text() * 3)
    with served(FakeAPI(delay_s=0.02)) as api:
        path = write_config(tmp_path, api.url)
        assert sample.main(["--config", path]) == 0
        assert sample.main(["--config", path, "--sample.n", "2"]) == 0
    assert answers(tmp_path) == train(3, draws=2)
    assert len(api.bodies) == 6


# The disk


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits the files of another process")
def test_a_disk_that_fills_up_stops_the_run_and_what_was_received_is_not_asked_again(tmp_path: Path) -> None:
    total, concurrency = 60, 4
    write_prompts(tmp_path / "prompts", train=total)
    with served(FakeAPI(delay_s=0.05)) as api:
        path = write_config(tmp_path, api.url, teacher={"concurrency": concurrency})
        with start("sample", "--config", path) as process:
            wait_for(lambda: len(api.bodies) >= 12, process)
            (journal,) = (tmp_path / "corpus.duckdb.journal").glob("*.journal")
            limit = (journal.stat().st_size + 100, resource.RLIM_INFINITY)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 2, said
        assert "Traceback" not in said
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert re.fullmatch(r"error: cannot write the journal .*: (File too large|the disk is full)", line)
        before = len(api.bodies)
        assert before < total
        assert sample.main(["--config", path]) == 0
    assert answers(tmp_path) == train(total)
    assert len(api.bodies) - total <= concurrency
    assert {finding.level for finding in findings(tmp_path / "corpus.duckdb")} <= {"ok", "note"}


JOURNAL_ONLY = """
import pathlib, resource, sys
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Sent
from blackbox_kd.corpus.writer import Writer
from blackbox_kd.errors import CorpusError
from tests.records import answered
corpus = Corpus(pathlib.Path(sys.argv[1]))
try:
    with Writer(corpus) as writer:
        writer.submit(Sent(attempt_id="x" * (1 << 24), request_key="", run_id="", attempted_at=0))
        [segment] = corpus.journal.glob("*.journal")
        resource.setrlimit(resource.RLIMIT_FSIZE, (segment.stat().st_size + 50, resource.RLIM_INFINITY))
        writer.submit(answered())
except CorpusError as error:
    print(error)
print(corpus.rows("SELECT text FROM completions"))
"""


def test_an_answer_for_which_the_journal_has_no_room_still_goes_to_duckdb(tmp_path: Path) -> None:
    command = [sys.executable, "-c", JOURNAL_ONLY, tmp_path / "c.duckdb"]
    said, kept = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said.startswith("cannot write the journal")
    assert said.endswith("the disk is full")
    assert kept == "[('Servus',)]"


def test_a_journal_that_cannot_be_made_is_said_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus_of(tmp_path)
    (tmp_path / "corpus.duckdb.journal").write_text("in the way")
    with served(FakeAPI()) as api:
        assert sample.main(["--config", write_config(tmp_path, api.url)]) == 2
    assert api.bodies == []
    assert re.match(r"error: cannot make the journal .*: (File exists|Not a directory)", last_line(capsys))


# Somebody else at the file


def while_held(corpus: Corpus, requests: int) -> tuple[str, int]:
    """Ask while another process holds the file from the first question on: the error, and that process's id."""
    with ExitStack() as stack:
        holders: list[subprocess.Popen[str]] = []

        def hold_and_answer(body: dict[str, Any], _: web.Request) -> Answer:
            if not holders:
                holders.append(stack.enter_context(held_open(corpus.path)))
            return echo(body)

        with served(FakeAPI(hold_and_answer)) as api, pytest.raises(CorpusBusy) as raised:
            ask(config(api.url), Corpus(corpus.path, lock_wait_s=0.3), questions(requests))
        assert len(api.bodies) == requests
    return str(raised.value), holders[0].pid


def test_a_corpus_held_for_the_whole_run_loses_nothing_and_its_holder_is_named(corpus: Corpus) -> None:
    said, pid = while_held(corpus, 6)
    assert re.fullmatch(
        rf"{corpus.path} is held open by another program \(.* \(PID {pid}\)\); close it there; "
        rf"6 records wait in {corpus.journal}, the next stage ingests them",
        said,
    )
    with served(FakeAPI()) as api:
        found, engine = ask(config(api.url), Corpus(corpus.path), questions(6))
    assert texts(found) == echoes(*range(6))
    assert (api.bodies, engine.cached) == ([], 6)
    assert attempts(corpus) == [(200, True)] * 6


@pytest.mark.slow  # a person is told after 5 seconds
def test_a_corpus_held_before_the_start_is_waited_for_and_its_holder_is_named(tmp_path: Path) -> None:
    path = corpus_of(tmp_path).path
    with served(FakeAPI()) as api, held_open(path) as other:
        with start("sample", "--config", write_config(tmp_path, api.url)) as process:
            assert process.stderr
            said = process.stderr.readline()
            assert re.fullmatch(
                rf"{path} is held open by .* \(PID {other.pid}\)\); waiting until it lets go\. "
                r"Ctrl-C is safe: what was received is kept\n",
                said,
            )
            let_go(other)
            _, rest = process.communicate(timeout=60)
        assert process.returncode == 0, rest
    assert answers(tmp_path) == train(4)


@pytest.mark.slow  # a person is told after 5 seconds
def test_questions_that_cannot_be_looked_up_wait_until_the_corpus_is_free(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    total, seen = CHUNK + 20, list[str]()

    def said() -> str:
        seen.append(capsys.readouterr().err)
        return "".join(seen)

    def let_go_once_it_is_said(other: subprocess.Popen[str]) -> None:
        eventually(lambda: "waiting until it lets go" in said())
        let_go(other)

    with ExitStack() as stack:
        holders: list[subprocess.Popen[str]] = []

        def hold_and_answer(body: dict[str, Any], _: web.Request) -> Answer:
            if not holders:
                holders.append(stack.enter_context(held_open(corpus.path)))
                threading.Thread(target=let_go_once_it_is_said, args=holders).start()
            return echo(body)

        with served(FakeAPI(hold_and_answer)) as api:
            found, _ = ask(config(api.url), Corpus(corpus.path, lock_wait_s=0.2), questions(total))
    assert len(found) == len(api.bodies) == total
    assert re.search(rf"\(PID {holders[0].pid}\)\); waiting until it lets go. Ctrl-C is safe", said())


@pytest.mark.slow  # a person is told after 5 seconds
def test_ctrl_c_while_questions_wait_for_the_corpus_ends_the_run_and_keeps_what_was_received(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts", train=CHUNK + 20)
    path = corpus_of(tmp_path).path
    with ExitStack() as stack:
        holders: list[subprocess.Popen[str]] = []

        def hold_and_answer(body: dict[str, Any], _: web.Request) -> Answer:
            if not holders:
                holders.append(stack.enter_context(held_open(path)))
            return echo(body)

        with served(FakeAPI(hold_and_answer)) as api:
            file = write_config(tmp_path, api.url)
            with start("sample", "--config", file) as process:
                assert process.stderr
                wait_for(lambda: len(api.bodies) == CHUNK, process)
                for line in process.stderr:
                    if "waiting until it lets go. Ctrl-C is safe" in line:
                        break
                process.send_signal(signal.SIGINT)
                let_go(holders[0])
                _, rest = process.communicate(timeout=60)
            assert process.returncode == 130, rest
            assert len(answers(tmp_path)) == len(api.bodies) == CHUNK


# A journal that was damaged


def test_a_torn_tail_costs_one_answer_and_is_said(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    while_held(corpus, 6)
    ((path, _),) = leftovers(corpus.journal)
    path.write_bytes(path.read_bytes()[:-5])
    asked_again(corpus, 1)
    said = capsys.readouterr().err
    assert f"{path}: 1 of its records cannot be read" in said
    assert "11 are whole and kept, what is missing is asked again" in said


def test_a_flipped_byte_in_the_middle_costs_one_answer_and_is_said(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    while_held(corpus, 6)
    ((path, _),) = leftovers(corpus.journal)
    data = bytearray(path.read_bytes())
    data[data.index(b"echo Say 3")] ^= 0x10
    path.write_bytes(data)
    asked_again(corpus, 1)
    assert f"{path}: 1 of its records cannot be read" in capsys.readouterr().err


def asked_again(corpus: Corpus, number: int) -> None:
    """At the next start so many questions are asked once more, and all answers are there."""
    with served(FakeAPI()) as api:
        found, engine = ask(config(api.url), Corpus(corpus.path), questions(6))
    assert texts(found) == echoes(*range(6))
    assert stored(corpus) == echoes(*range(6))
    assert (len(api.bodies), engine.cached) == (number, 6 - number)
    assert corpus.spend(RUN_ID)["unknown_calls"] == number


# Two runs at once


@pytest.mark.slow  # more questions than are looked up at once
def test_two_runs_that_ask_the_same_at_the_same_time_both_finish_and_pay_once(tmp_path: Path) -> None:
    total = CHUNK + 40
    write_prompts(tmp_path / "prompts", train=total)
    with served(FakeAPI(delay_s=0.01)) as api:
        paths = [write_config(tmp_path, api.url, name) for name in ("one", "two")]
        both = [start("sample", "--config", path, "--json") for path in paths]
        ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert sorted(api.asked) == sorted(f"train {i}" for i in range(total))
    assert answers(tmp_path) == train(total)
    corpus = corpus_of(tmp_path)
    assert {finding.level for finding in findings(corpus.path)} <= {"ok", "note"}
    assert corpus.rows("SELECT count(*), count(*) FILTER (billed) FROM attempts") == [(total, total)]
    assert corpus.rows("SELECT count(*) FROM requests") == [(total,)]
    assert list(corpus.journal.glob("*.journal")) == []
    results = [json.loads(out) for out, _ in ends]
    assert [result["answers"] for result in results] == [total, total]
    assert sum(result["cached"] for result in results) == total


def gated(*numbers: int) -> tuple[FakeAPI, list[threading.Event]]:
    """Each of these arrivals is answered once its gate is open."""
    gates = {number: threading.Event() for number in numbers}

    async def handler(body: dict[str, Any], _: web.Request) -> Answer:
        if gate := gates.get(len(api.bodies)):
            await asyncio.to_thread(gate.wait, 60)
        return echo(body)

    api = FakeAPI(handler)
    return api, list(gates.values())


def two_configs(tmp_path: Path, total: int, url: str) -> list[str]:
    write_prompts(tmp_path / "prompts", train=total)
    return [write_config(tmp_path, url, name, teacher={"concurrency": 1}) for name in ("one", "two")]


def test_a_run_that_only_waits_for_another_ones_answers_says_so_and_asks_what_a_kill_leaves(tmp_path: Path) -> None:
    total, stored_before = 12, 5
    api, (gate,) = gated(stored_before + 1)
    with served(api):
        one, two = two_configs(tmp_path, total, api.url)
        with start("sample", "--config", one) as first:
            wait_for(lambda: len(api.bodies) > stored_before, first)
            eventually(lambda: len(answers(tmp_path)) == stored_before)
            with start("sample", "--config", two, "--json") as second:
                wait_for_line(second, f"sample: {total - stored_before} questions are asked by another run")
                assert len(api.bodies) == stored_before + 1
                first.kill()
                out, said = second.communicate(timeout=60)
        gate.set()
        assert second.returncode == 0, said
    result = json.loads(out)
    assert (result["answers"], result["cached"]) == (total, stored_before)
    assert answers(tmp_path) == train(total)
    assert len(api.bodies) == total + 1  # the one in flight at the kill is asked again
    rows = corpus_of(tmp_path).rows("SELECT count(*) FILTER (billed), count(*) FILTER (billed IS NULL) FROM attempts")
    assert rows == [(total, 1)]


def test_what_a_killed_run_has_only_in_its_journal_is_not_asked_again_by_one_that_waits(tmp_path: Path) -> None:
    total = 6
    api, (begin, end) = gated(1, total)
    with served(api):
        one, two = two_configs(tmp_path, total, api.url)
        with start("sample", "--config", one) as first:
            wait_for(lambda: len(api.bodies) == 1, first)
            with start("sample", "--config", two) as second:
                wait_for_line(second, f"sample: {total} questions are asked by another run")
                with held_open(tmp_path / "corpus.duckdb"):
                    begin.set()
                    wait_for(lambda: len(api.bodies) == total, first)
                    first.kill()
                    first.wait()
                _, said = second.communicate(timeout=60)
        end.set()
        assert second.returncode == 0, said
    assert answers(tmp_path) == train(total)
    assert len(api.bodies) == total + 1


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(said)
