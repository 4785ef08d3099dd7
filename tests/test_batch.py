"""`sample.batch` against a Batch API on a real socket: nothing is asked twice, whatever was paid for is kept."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from blackbox_kd import sample
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.heartbeat import Heartbeat, read_heartbeats
from blackbox_kd.errors import BudgetExhausted, ConfigError, TeacherError, TeacherRefused, TeacherUnreachable
from blackbox_kd.sections import SampleConfig
from blackbox_kd.teachers.batch import lines
from blackbox_kd.teachers.batch.batches import Batches
from blackbox_kd.teachers.batch.ledger import Ledger
from blackbox_kd.teachers.batch.lines import question_line, read_lines
from blackbox_kd.teachers.batch.submit import Packer
from blackbox_kd.teachers.budget import BudgetConfig
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.types import Request
from tests.conftest import RUN_ID
from tests.fake_batch import Ending, FakeBatchAPI, Line, answer, completed, expiry, rejection
from tests.fakes import FakeAPI, chat_reply, error_reply, served
from tests.records import prompt, request
from tests.test_sample import answers, corpus_of, start, train, wait_for, write_config

OTHER_RUN = RUN_ID[:-1] + "2"
PRICE = {"input": 10.0, "output": 20.0}
COST = (7 * 10 + 3 * 20) / 1e6  # of one fake answer, asked alone


def questions(count: int, start: int = 0, **body: Any) -> list[Request]:
    return [request(prompt(f"Say {i}"), body=body) for i in range(start, start + count)]


def batches(
    url: str, corpus: Corpus, run_id: str = RUN_ID, *, most: int = 50_000, caps: Any = None, **teacher: Any
) -> Batches:
    given = {"model": "m", "base_url": url, "api_key_env": None, "max_retries": 1, "price": PRICE}
    config = OpenAITeacherConfig(**given | teacher)
    sample = SampleConfig(batch=True, batch_poll_s=0.02, batch_max_requests=most)
    return Batches(config, sample, corpus, run_id, Engine(config, corpus, run_id, caps=caps))


async def collect(asking: Batches, asked: list[Request]) -> list[str]:
    return sorted([completion.text async for completion in asking.complete(asked)])


def ask(url: str, corpus: Corpus, asked: list[Request], **options: Any) -> list[str]:
    """The texts of the new answers."""
    return asyncio.run(collect(batches(url, corpus, **options), asked))


def echoes(*numbers: int) -> list[str]:
    return [f"echo Say {number}" for number in numbers]


def stored(corpus: Corpus) -> list[str]:
    return [text for (text,) in corpus.rows("SELECT text FROM completions ORDER BY text")]


def under_way(corpus: Corpus) -> list[str]:
    return [str(batch.batch_id) for batch in Ledger(corpus.path).batches()]


def left_behind(corpus: Corpus) -> list[str]:
    return [path.name for path in Ledger(corpus.path).folder.iterdir() if path.name != "lock"]


# What comes back


def test_answers_have_the_rows_of_single_calls_at_half_the_price(tmp_path: Path) -> None:
    asked = questions(3, logprobs=True, top_logprobs=1)
    corpus = Corpus(tmp_path / "c.duckdb")
    with served(FakeBatchAPI(looks=3)) as api:
        assert ask(api.url, corpus, asked) == echoes(0, 1, 2)
    assert api.bodies == []
    (lines,) = api.questions
    assert [line["body"] for line in lines] == [r.body for r in asked]
    assert {line["custom_id"] for line in lines} == {r.request_key for r in asked}
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    assert corpus.rows("SELECT DISTINCT run_id::VARCHAR, status, billed, error, prompt_tokens FROM attempts") == [
        (RUN_ID, 200, True, None, 7)
    ]
    assert corpus.spend(RUN_ID)["cost_usd"] == pytest.approx(3 * COST / 2)
    assert corpus.rows("SELECT count(*), count(DISTINCT server_request_id) > 0 FROM attempts") == [(3, True)]
    assert corpus.rows("SELECT count(*) FROM logprobs WHERE k = 1") == [(3,)]
    assert corpus.rows("SELECT count(*) FROM pending") == [(0,)]
    assert left_behind(corpus) == []


def test_only_what_has_no_answer_is_asked_and_nothing_opens_for_nothing(corpus: Corpus) -> None:
    with served(FakeBatchAPI()) as api:
        ask(api.url, corpus, questions(2))
        assert ask(api.url, corpus, questions(4) + questions(4)) == echoes(2, 3)
    assert [len(lines) for lines in api.questions] == [2, 2]
    assert ask("http://127.0.0.1:1/v1", corpus, questions(4)) == []


def test_a_batch_is_as_large_as_the_provider_allows(corpus: Corpus) -> None:
    with served(FakeBatchAPI()) as api:
        assert ask(api.url, corpus, questions(5), most=2) == echoes(0, 1, 2, 3, 4)
    assert [len(lines) for lines in api.questions] == [2, 2, 1]


def test_a_file_is_no_larger_than_the_provider_allows() -> None:
    asked = questions(5)
    packer = Packer(RUN_ID, 50_000, max_bytes=2 * len(question_line(asked[0])))
    held = [packer.add(question) for question in asked]
    assert held[0] is held[1] is not held[2] is held[3] is not held[4]
    assert [len(batch.keys) for batch in packer.batches] == [2, 2, 1]


def test_half_of_the_price_is_the_default_and_can_be_changed(corpus: Corpus) -> None:
    with served(FakeBatchAPI()) as api:
        ask(api.url, corpus, questions(1), price={**PRICE, "batch_factor": 0.25})
        ask(api.url, corpus, questions(2), price=None)
    costs = corpus.rows("SELECT cost_usd FROM attempts ORDER BY cost_usd NULLS LAST")
    assert costs == [(pytest.approx(COST / 4),), (None,)]


# How a batch may end


def mixed(lines: list[Line]) -> Ending:
    bad = [
        rejection(lines[1], 400, "too long"),
        rejection(lines[2], 429, "slow down"),
        rejection(lines[4], 504, "no answer in time"),
        rejection(lines[3], 500, "oops"),
    ]
    return "completed", [answer(lines[0])], bad


def test_rejections_are_dead_letters_and_passing_failures_stay_pending(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeBatchAPI(mixed)) as api:
        assert ask(api.url, corpus, questions(5)) == echoes(0)
        assert "1 answers, 1 dead letters, 3 stay pending (HTTP 500: oops)" in " ".join(capsys.readouterr().err.split())
        keys = [r.request_key for r in questions(5)]
        assert corpus.settled(keys) == ({keys[0]}, {keys[1]})
        assert corpus.rows("SELECT status, billed FROM attempts ORDER BY status") == [
            (200, True), (400, False), (429, False), (500, False), (504, None),
        ]  # fmt: skip
        api.ending = completed
        assert ask(api.url, corpus, questions(5)) == echoes(2, 3, 4)
        assert ask(api.url, corpus, questions(5), retry_dead_letters=True) == echoes(1)
    spend = corpus.spend(RUN_ID)
    assert (spend["calls"], spend["unknown_calls"]) == (5, 1)


@pytest.mark.parametrize("status", ["expired", "cancelled"])
@pytest.mark.parametrize("error_file", [True, False])
def test_what_was_paid_before_the_end_is_kept(corpus: Corpus, status: str, error_file: bool) -> None:
    def partly(lines: list[Line]) -> Ending:
        return status, [answer(lines[0])], [expiry(line) for line in lines[1:]] if error_file else None

    with served(FakeBatchAPI(partly)) as api:
        assert ask(api.url, corpus, questions(3)) == echoes(0)
        api.ending = completed
        assert ask(api.url, corpus, questions(3)) == echoes(1, 2)
    assert [len(lines) for lines in api.questions] == [3, 2]
    unpaid = corpus.rows("SELECT billed, cost_usd, error FROM attempts WHERE billed IS NOT TRUE")
    assert len(unpaid) == (2 if error_file else 0)
    assert all(row[0] is False and row[2].startswith("batch_expired: ") for row in unpaid)


@pytest.mark.parametrize(
    ("ending", "kind", "said"),
    [
        (lambda lines: ("cancelled", None, None), TeacherUnreachable, "none of 2 questions was answered"),
        (lambda lines: ("completed", None, [rejection(x, 400, "no") for x in lines]), TeacherRefused, "all 2 requests"),
        (lambda lines: ("failed", None, None), TeacherRefused, "batch_0 failed: line 1: unknown model"),
    ],
)
def test_a_batch_without_any_answer_is_one_line(
    corpus: Corpus, ending: Callable[[list[Line]], Ending], kind: type[TeacherError], said: str
) -> None:
    with served(FakeBatchAPI(ending)) as api:
        api.errors = [{"code": "model_not_found", "message": "line 1: unknown model", "line": 1}]
        with pytest.raises(kind, match=said) as raised:
            ask(api.url, corpus, questions(2))
    assert "\n" not in str(raised.value)
    assert left_behind(corpus) == []


def test_what_a_failed_batch_brought_is_kept(corpus: Corpus) -> None:
    with served(FakeBatchAPI(lambda lines: ("failed", [answer(lines[0])], None))) as api, pytest.raises(TeacherRefused):
        ask(api.url, corpus, questions(2))
    assert stored(corpus) == echoes(0)


def test_second_answers_strangers_and_torn_lines_are_said_and_left_out(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(lines: list[Line]) -> Ending:
        stranger = answer(lines[0]) | {"custom_id": "somebody-else"}
        twice = answer(lines[0], body=chat_reply("another"))
        return "completed", [answer(lines[0]), twice, stranger, '{"custom_id": "to\n'], [expiry(lines[0])]  # type: ignore[list-item]

    with served(FakeBatchAPI(odd)) as api:
        assert ask(api.url, corpus, questions(1)) == echoes(0)
    said = " ".join(capsys.readouterr().err.split())
    for what in ("a second answer to", "'somebody-else', which was not asked", "cannot be read", "4 lines in all"):
        assert what in said
    assert corpus.rows("SELECT count(*), sum(prompt_tokens)::BIGINT FROM attempts") == [(1, 7)]


def test_an_answer_that_cannot_be_read_stays_pending(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(lines: list[Line]) -> Ending:
        return "completed", [answer(lines[0]), answer(lines[1], body={"choices": "none"})], None

    with served(FakeBatchAPI(wrong)) as api:
        assert ask(api.url, corpus, questions(2)) == echoes(0)
    ((status, billed, error),) = corpus.rows("SELECT status, billed, error FROM attempts WHERE error IS NOT NULL")
    assert (status, billed) == (200, None)
    assert error.endswith('; the reply: {"choices": "none"}')  # it is paid for
    assert corpus.rows("SELECT count(*) FROM pending") == [(1,)]
    assert "; the reply" not in capsys.readouterr().err


def test_logprobs_that_were_asked_for_and_did_not_come_are_said(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    def bare(lines: list[Line]) -> Ending:
        return "completed", [answer(line, body=chat_reply("Oui")) for line in lines], None

    with served(FakeBatchAPI(bare)) as api:
        ask(api.url, corpus, questions(2, logprobs=True))
    assert capsys.readouterr().err.count("was asked for logprobs and gave none") == 1


def without_logprobs(*which: int) -> Callable[[list[Line]], Ending]:
    def bare(lines: list[Line]) -> Ending:
        given = [answer(line, body=chat_reply("Oui", logprobs=i not in which)) for i, line in enumerate(lines)]
        return "completed", given, None

    return bare


@pytest.mark.parametrize(("which", "times"), [((0, 1), 2), ((0, 1, 2, 3), 4)])
def test_required_logprobs_that_did_not_come_end_the_command_when_all_is_kept(
    corpus: Corpus, which: tuple[int, ...], times: int
) -> None:
    asked = questions(len(which), logprobs=True)
    with served(FakeBatchAPI(without_logprobs(*which))) as api:
        asking = batches(api.url, corpus, require_logprobs=True)
        with pytest.raises(TeacherRefused, match=f"m gave no logprobs {times} times in a row, and teacher.require"):
            asyncio.run(collect(asking, asked))
        assert len(stored(corpus)) == len(which)
        assert asking._engine.missing.count == times
        assert ask(api.url, corpus, asked, require_logprobs=True) == []
    assert left_behind(corpus) == []


def test_a_few_that_lack_required_logprobs_are_counted(corpus: Corpus) -> None:
    with served(FakeBatchAPI(without_logprobs(1, 3))) as api:
        asking = batches(api.url, corpus, require_logprobs=True)
        assert len(asyncio.run(collect(asking, questions(5, logprobs=True)))) == 5
    assert asking._engine.missing.count == 2


def test_status_shows_a_run_that_waits_for_a_batch(tmp_path: Path) -> None:
    corpus, seen = tmp_path / "corpus.duckdb", list[Heartbeat]()

    def beats() -> bool:
        seen.extend(beat for beat in read_heartbeats(corpus.with_name(corpus.name + ".journal")) if beat.alive)
        return bool(seen)

    with served(FakeBatchAPI(looks=10_000)) as api:
        config = write_config(tmp_path, api.url, sample={"batch": True, "batch_poll_s": 600}, teacher={"price": PRICE})
        with start("sample", "--config", config) as process:
            wait_for(beats, process)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert (seen[-1].total, seen[-1].done, seen[-1].in_flight, seen[-1].state) == (4, 0, 4, "running")
        assert seen[-1].description.startswith("sample")
        api.looks = 0
        assert sample.main(["--config", config, "--sample.batch_poll_s", "0.02"]) == 0
    (last,) = read_heartbeats(corpus.with_name(corpus.name + ".journal"))
    assert (last.done, last.failed, last.spent_requests, last.state) == (4, 0, 4, "ended")
    assert last.spent_usd == pytest.approx(4 * COST / 2)


# Passing failures


def test_looks_that_fail_are_repeated(corpus: Corpus) -> None:
    with served(FakeBatchAPI()) as api:
        api.fail = [error_reply(503), error_reply(429)]
        assert ask(api.url, corpus, questions(1)) == echoes(0)
    assert api.looked == 3


def test_a_creation_without_an_answer_is_looked_up_before_it_is_repeated(corpus: Corpus) -> None:
    with served(FakeBatchAPI()) as api:
        api.lose = {"created"}
        assert ask(api.url, corpus, questions(2), timeout_s=0.5) == echoes(0, 1)
    assert (len(api.batches), api.uploads) == (1, 1)


def test_an_endpoint_without_a_batch_api_is_one_line_and_leaves_nothing(corpus: Corpus) -> None:
    with served(FakeAPI()) as api, pytest.raises(TeacherRefused, match="no batch was made, HTTP 404"):
        ask(api.url, corpus, questions(1))
    assert left_behind(corpus) == []


def test_a_batch_that_the_provider_lost_names_its_file(corpus: Corpus) -> None:
    with served(FakeBatchAPI(looks=99)) as api:
        stop_while_polling(api, corpus, questions(1))
        api.batches.clear()
        (file,) = left_behind(corpus)
        with pytest.raises(TeacherRefused, match=f"delete .*{file}"):
            ask(api.url, corpus, questions(1))


def test_a_provider_without_batches_is_a_mistake(corpus: Corpus) -> None:
    scripted = ScriptedTeacherConfig()
    asking = Batches(scripted, SampleConfig(batch=True), corpus, RUN_ID, Engine(scripted, corpus, RUN_ID))
    with pytest.raises(ConfigError, match=r"sample\.batch"):
        asyncio.run(collect(asking, questions(1)))
    assert left_behind(corpus) == []


# Stopped and started again


def stop_when(condition: Callable[[], bool], asking: Batches, asked: list[Request]) -> None:
    """Ask, and stop at once when the condition holds; what is on disk then is what a kill leaves."""

    async def run() -> None:
        task = asyncio.create_task(collect(asking, asked))
        while not condition():
            assert not task.done(), task.result()
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def stop_while_polling(api: FakeBatchAPI, corpus: Corpus, asked: list[Request], run_id: str = RUN_ID) -> None:
    stop_when(lambda: api.looked > 0, batches(api.url, corpus, run_id), asked)


def test_between_upload_and_creation_the_file_is_used_again(corpus: Corpus) -> None:
    with served(FakeBatchAPI()) as api:
        api.lose = {"create"}
        stop_when(lambda: not api.lose, batches(api.url, corpus), questions(2))
        assert (api.uploads, len(api.batches), under_way(corpus)) == (1, 0, ["None"])
        assert ask(api.url, corpus, questions(2)) == echoes(0, 1)
    assert (api.uploads, len(api.batches)) == (1, 1)


def test_a_batch_that_was_made_but_not_noted_is_found_by_its_marker(corpus: Corpus) -> None:
    with served(FakeBatchAPI()) as api:
        ask(api.url, corpus, questions(1, 7))  # another batch in the provider's list
        api.lose = {"created"}
        stop_when(lambda: not api.lose, batches(api.url, corpus), questions(2))
        assert (len(api.batches), under_way(corpus)) == (2, ["None"])
        assert ask(api.url, corpus, questions(2)) == echoes(0, 1)
    assert (len(api.batches), api.uploads) == (2, 2)


@pytest.mark.parametrize("status", [403, 404])
def test_a_batch_is_not_made_again_where_nobody_can_tell_whether_it_was(corpus: Corpus, status: int) -> None:
    class Reluctant(FakeBatchAPI):
        is_listed = False

        async def list(self, request: web.Request) -> web.Response:
            return await super().list(request) if self.is_listed else error_reply(status, "no scope for that")

    with served(Reluctant()) as api:
        api.lose = {"created"}
        stop_when(lambda: not api.lose, batches(api.url, corpus), questions(2))
        with pytest.raises(TeacherUnreachable, match=r"cannot tell whether batch .* was made: .*no scope.*run again"):
            ask(api.url, corpus, questions(2))
        assert under_way(corpus) == ["None"]
        api.is_listed = True
        assert ask(api.url, corpus, questions(2)) == echoes(0, 1)
    assert len(api.batches) == 1


def test_a_line_that_is_nested_too_deeply_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "output.jsonl"
    path.write_bytes(b'{"custom_id":"a","x":' + b"[" * 5000 + b"\n" + b'{"custom_id":"b"}\n')
    odd, good = read_lines(path, bytes)
    assert isinstance(odd, str)
    assert isinstance(good, lines.Line)


def test_polling_goes_on_where_it_stopped(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeBatchAPI(looks=99)) as api:
        stop_while_polling(api, corpus, questions(2))
        assert "batch_0 goes on at the provider; the same command picks it up" in capsys.readouterr().err
        assert under_way(corpus) == ["batch_0"]
        api.looks = 0
        assert ask(api.url, corpus, questions(3)) == echoes(0, 1, 2)
    assert [len(lines) for lines in api.questions] == [2, 1]


def test_a_batch_that_is_read_twice_is_stored_once(corpus: Corpus) -> None:
    with served(FakeBatchAPI(mixed, looks=99)) as api:
        stop_while_polling(api, corpus, questions(5))
        (record,) = Ledger(corpus.path).batches()
        api.looks = 0
        ask(api.url, corpus, questions(5))
        before = everything(corpus)
        Ledger(corpus.path).save(record)  # as after a kill between the last row and the forgetting
        ask(api.url, corpus, questions(5)[2:3])
    assert everything(corpus) == before
    assert left_behind(corpus) == []


def everything(corpus: Corpus) -> list[list[tuple[Any, ...]]]:
    tables = ("attempts", "completions", "logprobs", "dead_letters")
    return [corpus.rows(f"FROM {table} ORDER BY ALL") for table in tables]


# Two runs, one corpus


def test_a_second_run_waits_for_the_batch_of_the_first(corpus: Corpus) -> None:
    with served(FakeBatchAPI(looks=99)) as api:
        stop_while_polling(api, corpus, questions(2))
        api.looks = 0
        assert ask(api.url, corpus, questions(3), run_id=OTHER_RUN) == echoes(0, 1, 2)
        assert ask(api.url, corpus, questions(2)) == []
    assert [len(lines) for lines in api.questions] == [2, 1]
    assert (corpus.spend(RUN_ID)["calls"], corpus.spend(OTHER_RUN)["calls"]) == (2, 1)


def test_two_runs_at_the_same_time_ask_nothing_twice(corpus: Corpus) -> None:
    async def both(url: str) -> list[str]:
        runs = [batches(url, corpus, run_id) for run_id in (RUN_ID, OTHER_RUN)]
        found = await asyncio.gather(collect(runs[0], questions(3)), collect(runs[1], questions(3, 1)))
        return sorted(found[0] + found[1])

    with served(FakeBatchAPI(looks=4)) as api:
        assert asyncio.run(both(api.url)) == echoes(0, 1, 2, 3)
    assert sum(len(lines) for lines in api.questions) == 4
    assert stored(corpus) == echoes(0, 1, 2, 3)
    assert left_behind(corpus) == []


def test_batches_of_other_questions_and_endpoints_are_left_alone(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeBatchAPI(looks=99)) as elsewhere, served(FakeBatchAPI()) as api:
        stop_while_polling(elsewhere, corpus, questions(2))
        assert ask(api.url, corpus, questions(1, 5)) == echoes(5)
        assert "1 batches of other questions are under way" in capsys.readouterr().err
        assert ask(api.url, corpus, questions(3)) == echoes(2)
        assert "2 questions are under way at http" in capsys.readouterr().err
    assert under_way(corpus) == ["batch_0"]


# The stage


def stage(tmp_path: Path, url: str, **teacher: Any) -> str:
    return write_config(tmp_path, url, sample={"batch": True, "batch_poll_s": 0.02}, teacher=teacher)


def test_the_stage_takes_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeBatchAPI()) as api:
        config = write_config(tmp_path, api.url)
        flags = ["--sample.batch", "true", "--sample.batch_poll_s", "0.02"]
        assert sample.main(["--config", config, *flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["answers"] == 4
        assert sample.main(["--config", config]) == 0  # the same questions, asked one by one
    assert answers(tmp_path) == train(4)
    assert (api.bodies, len(api.batches)) == ([], 1)


def test_a_failed_validation_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeBatchAPI(lambda lines: ("failed", None, None))) as api:
        api.errors = [{"code": "invalid", "message": "line 3 is no JSON"}]
        assert sample.main(["--config", stage(tmp_path, api.url)]) == 3
    assert "error: batch batch_0 failed: line 3 is no JSON" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_key_is_in_no_record_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-this-must-not-be-written-anywhere"
    monkeypatch.setenv("MY_TEACHER_KEY", secret)

    def echo(lines: list[Line]) -> Ending:
        return "completed", [answer(line, body=chat_reply(f"your key {secret}")) for line in lines], None

    with served(FakeBatchAPI(echo)) as api:
        assert sample.main(["--config", stage(tmp_path, api.url, api_key_env="MY_TEACHER_KEY")]) == 0
    assert {text for text, _ in answers(tmp_path)} == {"your key ***"}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_run_killed_while_polling_resumes_and_ctrl_c_says_how(tmp_path: Path) -> None:
    with served(FakeBatchAPI(looks=10_000)) as api:
        config = stage(tmp_path, api.url)
        with start("sample", "--config", config) as process:
            wait_for(lambda: api.looked > 0, process)
            process.kill()
        looked = api.looked
        with start("sample", "--config", config) as process:
            wait_for(lambda: api.looked > looked + 1, process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "batch_0 goes on at the provider; the same command picks it up" in err
        assert "Traceback" not in err
        api.looks = 0
        assert sample.main(["--config", config]) == 0
    assert answers(tmp_path) == train(4)
    assert (api.uploads, len(api.batches)) == (1, 1)
    assert corpus_of(tmp_path).rows("SELECT count(*) FROM attempts WHERE billed IS NOT true") == [(0,)]


def test_questions_beyond_the_cap_are_in_no_batch_and_those_under_way_count(corpus: Corpus) -> None:
    asked = questions(6, max_tokens=5)
    with served(FakeBatchAPI()) as api:
        with pytest.raises(BudgetExhausted, match="max_requests is 4"):
            ask(api.url, corpus, asked, caps=BudgetConfig(max_requests=4))
        assert stored(corpus) == echoes(0, 1, 2, 3)
        with pytest.raises(BudgetExhausted):
            ask(api.url, corpus, asked, caps=BudgetConfig(max_requests=4))
        assert stored(corpus) == echoes(0, 1, 2, 3)
        ask(api.url, corpus, asked, caps=BudgetConfig(max_requests=6))
    assert stored(corpus) == echoes(*range(6))
