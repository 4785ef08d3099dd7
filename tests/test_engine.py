"""The engine against a real socket: nothing is asked twice, nothing received is lost, everybody waits when told to."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Answered, Segment, Sent
from blackbox_kd.errors import TeacherError, TeacherRefused, TeacherUnreachable
from blackbox_kd.prompts import PrivateContext
from blackbox_kd.teachers.base import PriceConfig
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.teachers.work import FAILURES_TO_STOP
from blackbox_kd.types import Attempt, Completion, Prompt, Request, SamplingParams, Usage
from tests.conftest import RUN_ID
from tests.fakes import Answer, FakeAPI, chat_reply, cut_short, error_reply, reset, served, unused_port

OTHER_RUN = RUN_ID[:-1] + "2"
SECRET = "sk-this-must-not-be-written-anywhere-0123456789"


def config(url: str, **options: Any) -> OpenAITeacherConfig:
    return OpenAITeacherConfig(**{"model": "m", "base_url": url, "api_key_env": None, "max_retries": 2} | options)


def question(number: int, **body: Any) -> Request:
    messages = [{"role": "user", "content": f"Say {number}"}]
    prompt = Prompt(messages=messages, split="train", source="test")
    return Request(purpose="sample", body={"model": "m", "messages": messages, **body}, prompt_id=prompt.prompt_id)


def questions(count: int, **body: Any) -> list[Request]:
    return [question(number, **body) for number in range(count)]


def ask(
    teacher: OpenAITeacherConfig, corpus: Corpus, requests: list[Request], *, run_id: str = RUN_ID, round_: int = 0
) -> tuple[list[Completion], Engine]:
    async def collect() -> tuple[list[Completion], Engine]:
        async with Engine(teacher, corpus, run_id) as engine:
            return [answer async for answer in engine.complete(requests, round_=round_)], engine

    return asyncio.run(collect())


def texts(answers: list[Completion]) -> list[str]:
    return sorted(answer.text for answer in answers)


def echoes(*numbers: int) -> list[str]:
    return sorted(f"echo Say {number}" for number in numbers)


def stored(corpus: Corpus) -> list[str]:
    return [text for (text,) in corpus.rows("SELECT text FROM completions ORDER BY text")]


def attempts(corpus: Corpus, columns: str = "status, billed") -> list[tuple[Any, ...]]:
    return corpus.rows(f"SELECT {columns} FROM attempts ORDER BY attempted_at")


def count(corpus: Corpus, table: str) -> int:
    return int(corpus.rows(f"SELECT count(*) FROM {table}")[0][0])


def echo(body: dict[str, Any]) -> dict[str, Any]:
    return chat_reply(f"echo {body['messages'][-1]['content']}")


def first_then_echo(*replies: Callable[[web.Request], Any]) -> FakeAPI:
    """The first arrivals get these replies, one each; all later ones are answered."""
    left = iter(replies)

    def handler(body: dict[str, Any], request: web.Request) -> Any:
        reply = next(left, None)
        return reply(request) if reply else echo(body)

    return FakeAPI(handler)


def by_number(replies: dict[int, Callable[[], Any]]) -> FakeAPI:
    """What the question's number says; the others are echoed."""

    async def handler(body: dict[str, Any], request: web.Request) -> Answer:
        make = replies.get(int(body["messages"][-1]["content"].removeprefix("Say ")))
        reply = make() if make else echo(body)
        return await reply if asyncio.iscoroutine(reply) else reply

    return FakeAPI(handler)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


# What is known is not asked again


def test_an_answer_is_yielded_and_stored_with_its_call(corpus: Corpus) -> None:
    with served(FakeAPI()) as api:
        answers, engine = ask(config(api.url), corpus, [question(1)], round_=2)
    assert api.bodies == [question(1).body]
    assert corpus.answers([question(1).request_key]) == {question(1).request_key: answers}
    (answer,) = answers
    assert (answer.text, answer.round, answer.author) == ("echo Say 1", 2, "teacher")
    assert attempts(corpus, "request_key::VARCHAR, run_id::VARCHAR, status, error, prompt_tokens, billed") == [
        (question(1).request_key, RUN_ID, 200, None, 7, True)
    ]
    assert (engine.asked, engine.cached, count(corpus, "pending")) == (1, 0, 0)


def test_logprobs_come_back_from_the_corpus_as_they_were_received(corpus: Corpus) -> None:
    request = question(1, logprobs=True, top_logprobs=1)
    with served(FakeAPI(lambda body, _: chat_reply("Oui", logprobs=True))) as api:
        fresh, _ = ask(config(api.url), corpus, [request])
        again, _ = ask(config(api.url), corpus, [request])
    assert fresh[0].logprobs
    assert again == fresh
    assert len(api.bodies) == 1


def test_what_was_answered_is_not_asked_again_by_the_same_engine(corpus: Corpus) -> None:
    async def twice(url: str) -> tuple[list[Completion], list[Completion], Engine]:
        async with Engine(config(url), corpus, RUN_ID) as engine:
            first = [answer async for answer in engine.complete(questions(3))]
            return first, [answer async for answer in engine.complete(questions(5))], engine

    with served(FakeAPI()) as api:
        first, second, engine = asyncio.run(twice(api.url))
    assert texts(first) == echoes(0, 1, 2)
    assert texts(second) == echoes(0, 1, 2, 3, 4)
    assert sorted(api.asked) == [f"Say {number}" for number in range(5)]
    assert (engine.asked, engine.cached, api.models_asked) == (5, 3, 1)


def test_another_engine_run_address_or_setting_asks_nothing_again_and_opens_nothing(corpus: Corpus) -> None:
    with served(FakeAPI()) as api:
        first, _ = ask(config(api.url), corpus, questions(3))
    options = {
        "concurrency": 1,
        "timeout_s": 5.0,
        "extra_headers": {"x-team": "blue"},
        "price": {"input": 1, "output": 1},
    }
    elsewhere = config(f"http://127.0.0.1:{unused_port()}/v1", **options)
    again, engine = ask(elsewhere, corpus, questions(3), run_id=OTHER_RUN)
    assert sorted(again, key=lambda c: c.text) == sorted(first, key=lambda c: c.text)
    assert (engine.asked, engine.cached) == (0, 3)


def test_a_renamed_template_asks_nothing_again_and_an_edited_one_does(corpus: Corpus, tmp_path: Path) -> None:
    def sample(url: str, template: Path) -> list[Completion]:
        async def collect() -> list[Completion]:
            options = {"prompt": {"template": str(template)}}
            async with Teacher(config(url, **options), corpus, RUN_ID) as teacher:
                prompt = Prompt(messages=[{"role": "user", "content": "Say 1"}], split="train", source="test")
                request = teacher.request(prompt, "sample", SamplingParams())
                return [answer async for answer in teacher.complete([request])]

        return asyncio.run(collect())

    old, new = tmp_path / "old.j2", tmp_path / "sub" / "new.md.j2"
    new.parent.mkdir()
    old.write_text("Be brief. {{ system }}")
    new.write_text("Be brief. {{ system }}\n")
    with served(FakeAPI()) as api:
        assert sample(api.url, old) == sample(api.url, new)
        assert len(api.bodies) == 1
        new.write_text("Be rude. {{ system }}")
        sample(api.url, new)
    assert [body["messages"][0]["content"] for body in api.bodies] == ["Be brief.", "Be rude."]


def test_a_question_that_stands_twice_in_a_call_is_asked_once(corpus: Corpus) -> None:
    with served(FakeAPI(delay_s=0.05)) as api:
        answers, _ = ask(config(api.url), corpus, [*questions(2), *questions(2), *questions(2)])
    assert len(api.bodies) == 2
    assert texts(answers) == echoes(0, 1)


def test_all_choices_of_a_reply_are_kept_and_come_back(corpus: Corpus) -> None:
    def several(body: dict[str, Any], _: web.Request) -> dict[str, Any]:
        choices = [{"index": i, "message": {"content": f"answer {i}"}, "finish_reason": "stop"} for i in (1, 0)]
        return chat_reply("") | {"choices": choices}

    with served(FakeAPI(several)) as api:
        first, _ = ask(config(api.url), corpus, [question(1, n=2)])
        again, _ = ask(config(api.url), corpus, [question(1, n=2)])
    assert len(api.bodies) == 1
    assert [(a.choice_idx, a.text, a.usage.prompt_tokens) for a in again] == [(0, "answer 0", 0), (1, "answer 1", 7)]
    assert sorted(first, key=lambda c: c.choice_idx) == again


# Concurrency


@pytest.mark.parametrize("concurrency", [1, 4])
def test_never_more_are_in_flight_than_allowed_and_all_slots_are_used(corpus: Corpus, concurrency: int) -> None:
    with served(FakeAPI(delay_s=0.03)) as api:
        answers, _ = ask(config(api.url, concurrency=concurrency), corpus, questions(12))
    assert len(answers) == 12
    assert api.most_in_flight == concurrency


def test_retries_count_against_the_concurrency_too(corpus: Corpus) -> None:
    with served(first_then_echo(*[lambda _: error_reply(500)] * 3)) as api:
        api.delay_s = 0.02
        answers, _ = ask(config(api.url, concurrency=2, max_retries=3), corpus, questions(6))
    assert len(answers) == 6
    assert api.most_in_flight == 2


# Failures that pass


def test_a_passing_failure_is_asked_again_and_each_call_is_a_row(corpus: Corpus) -> None:
    statuses = [409, 425, 500, 502, 503, 529, 408, 504, 524]

    def fails_first(body: dict[str, Any], _: web.Request) -> Answer:
        text = body["messages"][-1]["content"]
        status = statuses[int(text.removeprefix("Say "))]
        return error_reply(status, "try later") if api.asked.count(text) == 1 else echo(body)

    with served(FakeAPI(fails_first)) as api:
        answers, _ = ask(config(api.url), corpus, questions(len(statuses)))
    assert texts(answers) == echoes(*range(len(statuses)))
    for request, status in zip(questions(len(statuses)), statuses, strict=True):
        rows = corpus.rows("""SELECT status, error, billed, completion_tokens FROM attempts
                              WHERE request_key = ?::UUID ORDER BY attempted_at""", [request.request_key])  # fmt: skip
        billed = None if status in (408, 504, 524) else False  # a gateway gave up waiting, the model may have gone on
        assert rows == [(status, f"HTTP {status}: try later", billed, 0), (200, None, True, 3)]


def test_retries_are_bounded_and_the_question_stays_pending_for_the_next_call(corpus: Corpus) -> None:
    with served(first_then_echo(*[lambda _: error_reply(500)] * 3)) as api:
        with pytest.raises(TeacherUnreachable, match="none of 1 requests got through: HTTP 500"):
            ask(config(api.url, max_retries=2), corpus, [question(1)])
        assert len(api.bodies) == 3
        assert corpus.rows("SELECT request_key::VARCHAR FROM pending") == [(question(1).request_key,)]
        assert count(corpus, "dead_letters") == 0
        answers, _ = ask(config(api.url, max_retries=2), corpus, [question(1)])
    assert texts(answers) == echoes(1)
    assert [status for (status,) in attempts(corpus, "status")] == [500, 500, 500, 200]


def test_one_question_that_keeps_failing_does_not_hold_up_the_others(corpus: Corpus) -> None:
    with served(by_number({2: lambda: error_reply(500)})) as api:
        answers, _ = ask(config(api.url, max_retries=1), corpus, questions(6))
    assert texts(answers) == echoes(0, 1, 3, 4, 5)
    assert count(corpus, "pending") == 1


def test_a_failure_that_says_when_to_come_back_is_not_asked_before(corpus: Corpus) -> None:
    with served(first_then_echo(lambda _: error_reply(503, headers={"retry-after": "0.6"}))) as api:
        ask(config(api.url), corpus, [question(1)])
    assert api.arrivals[1] - api.arrivals[0] >= 0.59


@pytest.mark.parametrize("broken", [reset, cut_short], ids=["reset", "cut short"])
def test_a_connection_that_dies_is_asked_again_and_nobody_knows_who_pays(corpus: Corpus, broken: Any) -> None:
    with served(first_then_echo(broken)) as api:
        answers, _ = ask(config(api.url), corpus, [question(1)])
    assert texts(answers) == echoes(1)
    assert len(api.bodies) == 2
    assert attempts(corpus) == [(None, None), (200, True)]
    assert attempts(corpus, "error")[0][0]
    assert corpus.spend(RUN_ID)["unknown_calls"] == 1


def test_a_200_that_cannot_be_read_is_asked_again_and_nobody_knows_who_pays(corpus: Corpus) -> None:
    with served(first_then_echo(lambda _: web.Response(text="<html>"), lambda _: web.json_response({}))) as api:
        answers, _ = ask(config(api.url), corpus, [question(1)])
    assert texts(answers) == echoes(1)
    assert attempts(corpus) == [(200, None), (200, None), (200, True)]


def test_an_answer_that_takes_too_long_is_asked_again(corpus: Corpus) -> None:
    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1.0)
        return web.json_response(chat_reply("too late"))

    with served(first_then_echo(slow)) as api:
        answers, _ = ask(config(api.url, timeout_s=0.4), corpus, [question(1)])
    assert texts(answers) == echoes(1)
    assert attempts(corpus) == [(None, None), (200, True)]
    assert "Timeout" in attempts(corpus, "error")[0][0]


def test_an_endpoint_that_dies_on_everything_stops_the_run(corpus: Corpus) -> None:
    dying = FakeAPI(lambda body, request: reset(request))
    with served(dying) as api, pytest.raises(TeacherUnreachable, match="in a row"):
        ask(config(api.url, max_retries=0, concurrency=4), corpus, questions(60))
    assert FAILURES_TO_STOP <= len(api.bodies) <= FAILURES_TO_STOP + 4
    assert count(corpus, "pending") == 60


# Failures that do not


def test_a_rejected_question_is_a_dead_letter_and_the_rest_goes_on(corpus: Corpus) -> None:
    rejections = {1: 400, 2: 404, 4: 413, 5: 422}
    replies = {number: lambda s=status: error_reply(s, "too long") for number, status in rejections.items()}
    with served(by_number(replies)) as api:
        answers, _ = ask(config(api.url, concurrency=1), corpus, questions(7))
        assert texts(answers) == echoes(0, 3, 6)
        assert len(api.bodies) == 7
        again, _ = ask(config(api.url), corpus, questions(7))
        assert texts(again) == echoes(0, 3, 6)
        assert len(api.bodies) == 7
    dead = corpus.rows("SELECT request_key::VARCHAR, status, error FROM dead_letters ORDER BY status")
    assert dead == [(question(n).request_key, s, f"HTTP {s}: too long") for n, s in rejections.items()]
    failed = corpus.rows("SELECT status, billed FROM attempts WHERE status != 200 ORDER BY status")
    assert failed == [(status, False) for status in rejections.values()]
    assert count(corpus, "pending") == 0


def test_a_404_before_any_answer_stops_instead_of_killing_every_question(corpus: Corpus) -> None:
    with served(FakeAPI(lambda body, request: error_reply(404, "no such model"))) as api:
        with pytest.raises(TeacherRefused, match=r"check teacher\.base_url and teacher\.model"):
            ask(config(api.url, concurrency=2), corpus, questions(6))
        assert len(api.bodies) <= 4
    assert count(corpus, "dead_letters") == 0
    assert count(corpus, "pending") == 6


def test_a_call_keeps_the_id_that_support_asks_for(corpus: Corpus) -> None:
    def reply(body: dict[str, Any], request: web.Request) -> web.StreamResponse:
        status, answer = (400, {"error": {"message": "no"}}) if "1" in body["messages"][-1]["content"] else (200, None)
        return web.json_response(answer or chat_reply("yes"), status=status, headers={"x-request-id": f"id-{status}"})

    with served(FakeAPI(reply)) as api:
        ask(config(api.url, concurrency=1), corpus, questions(2))
    assert corpus.rows("SELECT server_request_id FROM attempts ORDER BY ALL") == [("id-200",), ("id-400",)]


@pytest.mark.parametrize(
    "refusal",
    [
        lambda: error_reply(401, "Incorrect API key", "invalid_api_key"),
        lambda: error_reply(429, "no money", "insufficient_quota", {"retry-after": "0"}),
    ],
    ids=["401", "quota"],
)
def test_a_refusal_stops_the_run_and_keeps_what_was_received(corpus: Corpus, refusal: Callable[[], Any]) -> None:
    with served(by_number({2: refusal})) as api, pytest.raises(TeacherRefused) as raised:
        ask(config(api.url, concurrency=1), corpus, questions(9))
    assert raised.value.exit_code == 3
    assert api.asked == ["Say 0", "Say 1", "Say 2"]
    assert stored(corpus) == echoes(0, 1)
    assert count(corpus, "pending") == 7
    assert count(corpus, "dead_letters") == 0


def test_answers_in_flight_at_a_refusal_are_kept(corpus: Corpus) -> None:
    async def slow() -> dict[str, Any]:
        await asyncio.sleep(0.3)
        return chat_reply("echo Say 0")

    with served(by_number({0: slow, 1: lambda: error_reply(401)})) as api, pytest.raises(TeacherRefused):
        ask(config(api.url, concurrency=2), corpus, questions(9))
    assert len(api.bodies) == 2
    assert stored(corpus) == echoes(0)


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_does_not_wait_for_those_who_wait(corpus: Corpus, status: int) -> None:
    async def refused() -> web.Response:
        await asyncio.sleep(0.2)
        return error_reply(401)

    waiting = {0: lambda: error_reply(status, headers={"retry-after": "25"}), 1: refused}
    started = time.monotonic()
    with served(by_number(waiting)) as api, pytest.raises(TeacherRefused):
        ask(config(api.url, concurrency=2), corpus, questions(9))
    assert time.monotonic() - started < 5
    assert sorted(api.asked) == ["Say 0", "Say 1"]


def test_nobody_listening_is_said_at_once_and_before_anything_is_paid(corpus: Corpus) -> None:
    url, started = f"http://127.0.0.1:{unused_port()}/v1", time.monotonic()
    with pytest.raises(TeacherUnreachable, match=url) as raised:
        ask(config(url), corpus, questions(3))
    assert time.monotonic() - started < 5
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value)
    assert (count(corpus, "attempts"), count(corpus, "pending")) == (0, 3)


def test_a_wrong_key_is_said_before_any_question_is_sent(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    with served(FakeAPI(key="another")) as api, pytest.raises(TeacherRefused, match="401"):
        ask(config(api.url, api_key_env="TEACHER_KEY"), corpus, questions(3))
    assert (api.models_asked, api.arrivals, count(corpus, "attempts")) == (1, [], 0)


@pytest.mark.parametrize("status", [403, 503])
def test_an_endpoint_that_lists_no_models_is_asked_all_the_same(corpus: Corpus, status: int) -> None:
    with served(FakeAPI(models_reply=lambda: error_reply(status))) as api:
        answers, _ = ask(config(api.url), corpus, questions(2))
    assert texts(answers) == echoes(0, 1)


# The gate


def test_nobody_sends_before_the_gate_opens(corpus: Corpus) -> None:
    numbers = itertools.count()
    limited_at: list[float] = []

    async def handler(body: dict[str, Any], _: web.Request) -> Answer:
        if next(numbers) == 2:
            limited_at.append(time.monotonic())
            return error_reply(429, "slow down", headers={"retry-after": "0.8"})
        await asyncio.sleep(0.15)
        return echo(body)

    with served(FakeAPI(handler)) as api:
        answers, _ = ask(config(api.url, concurrency=4, max_retries=0), corpus, questions(10))
    assert texts(answers) == echoes(*range(10))
    before, after = api.arrivals[:4], api.arrivals[4:]
    assert max(before) < limited_at[0] + 0.15
    assert len(after) == 7
    assert min(after) >= limited_at[0] + 0.8
    assert corpus.rows("SELECT retry_after_s, billed FROM attempts WHERE status = 429") == [(0.8, False)]


def test_being_limited_for_long_is_no_failure(corpus: Corpus) -> None:
    limited = [lambda _: error_reply(429, headers={"retry-after-ms": "10"})] * 12
    with served(first_then_echo(*limited)) as api:
        answers, _ = ask(config(api.url, max_retries=0, concurrency=2), corpus, questions(3))
    assert texts(answers) == echoes(0, 1, 2)
    assert len(api.bodies) == 15


def test_without_retry_after_the_pause_grows_with_each_further_429(corpus: Corpus) -> None:
    with served(first_then_echo(*[lambda _: error_reply(429)] * 2)) as api:
        answers, _ = ask(config(api.url, max_retries=0), corpus, [question(1)])
    assert texts(answers) == echoes(1)
    first, second, third = api.arrivals
    assert 0.4 < second - first < 0.95
    assert 0.95 < third - second < 2.5


def test_a_burst_of_429s_is_one_pause_not_one_for_each(corpus: Corpus) -> None:
    started = time.monotonic()
    with served(first_then_echo(*[lambda _: error_reply(429)] * 8)) as api:
        api.delay_s = 0.05
        answers, _ = ask(config(api.url, max_retries=0, concurrency=8), corpus, questions(8))
    assert len(answers) == 8
    assert api.arrivals[8] - api.arrivals[7] >= 0.4
    assert time.monotonic() - started < 3


# What it costs


def test_the_price_of_an_answer_with_cached_tokens_is_the_one_worked_by_hand(corpus: Corpus) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 400}}
    price = PriceConfig(input=2.0, cached_input=0.5, output=8.0)
    with served(FakeAPI(lambda body, _: chat_reply("x", usage=usage))) as api:
        ask(config(api.url, price=price), corpus, questions(3))
    # 600 fresh at 2.0, 400 cached at 0.5, 50 out at 8.0, by the million: 0.0012 + 0.0002 + 0.0004
    assert [cost for (cost,) in attempts(corpus, "cost_usd")] == pytest.approx([0.0018] * 3)
    spend = corpus.spend(RUN_ID)
    assert spend.pop("cost_usd") == pytest.approx(0.0054)
    assert spend == {"calls": 3, "prompt_tokens": 3000, "completion_tokens": 150, "unknown_calls": 0}
    assert corpus.rows("SELECT calls, billed, prompt_tokens, round(cost_usd, 6) FROM spend") == [(3, 3, 3000, 0.0054)]


def test_without_a_price_of_its_own_a_cached_token_costs_what_a_fresh_one_does() -> None:
    usage = Usage(prompt_tokens=1000, cached_tokens=400, completion_tokens=50)
    assert PriceConfig(input=2.0, output=8.0).cost(usage) == pytest.approx(0.0024)
    assert PriceConfig(input=2.0, cached_input=0.0, output=8.0).cost(usage) == pytest.approx(0.0016)


def test_failed_calls_cost_nothing(corpus: Corpus) -> None:
    with served(first_then_echo(lambda _: error_reply(500))) as api:
        ask(config(api.url, price=PriceConfig(input=1e6, output=0)), corpus, [question(1)])
    assert attempts(corpus, "status, cost_usd") == [(500, None), (200, 7.0)]
    assert corpus.spend(RUN_ID)["cost_usd"] == 7.0


def test_without_usage_in_the_reply_the_cost_is_unknown_not_zero(corpus: Corpus) -> None:
    with served(FakeAPI(lambda body, _: {"choices": [{"message": {"content": "x"}}]})) as api:
        ask(config(api.url, price=PriceConfig(input=1, output=1)), corpus, [question(1)])
    assert attempts(corpus, "status, billed, cost_usd") == [(200, True, None)]
    assert corpus.spend(RUN_ID)["cost_usd"] is None


def test_what_one_run_paid_for_is_not_in_the_spend_of_another(corpus: Corpus) -> None:
    with served(FakeAPI()) as api:
        ask(config(api.url), corpus, questions(2))
        ask(config(api.url), corpus, questions(3), run_id=OTHER_RUN)
    assert (corpus.spend(RUN_ID)["calls"], corpus.spend(OTHER_RUN)["calls"]) == (2, 1)


# Logprobs that were asked for


def test_logprobs_that_were_asked_for_and_not_given_are_counted(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeAPI()) as api:
        answers, engine = ask(config(api.url), corpus, questions(3, logprobs=True, top_logprobs=5))
    assert texts(answers) == echoes(0, 1, 2)
    assert engine.missing.count == 3
    assert capsys.readouterr().err.count("asked for logprobs and gave none") == 1


def test_logprobs_that_came_or_were_not_asked_for_or_of_no_text_are_not_missing(corpus: Corpus) -> None:
    def given_unless_empty(body: dict[str, Any], _: web.Request) -> Answer:
        if body["messages"][-1]["content"] == "Say 3":
            return chat_reply("")
        return chat_reply("x", logprobs=bool(body.get("logprobs")))

    with served(FakeAPI(given_unless_empty)) as api:
        _, engine = ask(config(api.url), corpus, [*questions(2), *questions(4, logprobs=True, top_logprobs=1)])
    assert engine.asked == 6
    assert engine.missing.count == 0


# Secrets


def all_text(corpus: Corpus) -> str:
    tables = [name for (name,) in corpus.rows("SELECT table_name FROM duckdb_tables()")]
    return "\n".join(str(corpus.rows(f"SELECT COLUMNS(*)::VARCHAR FROM {table}")) for table in tables)


def test_the_key_is_sent_and_written_nowhere(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    journals: list[bytes] = []

    def tells_on_the_caller(body: dict[str, Any], request: web.Request) -> Answer:
        journals.extend(path.read_bytes() for path in corpus.journal.glob("*"))
        number = len(api.bodies)
        said = f"caller {request.headers['authorization']} is odd"
        return echo(body) if number == 1 else error_reply({2: 500, 3: 400, 4: 429}.get(number, 401), said, SECRET)

    with served(FakeAPI(tells_on_the_caller, key=SECRET)) as api, pytest.raises(TeacherRefused) as raised:
        ask(config(api.url, api_key_env="TEACHER_KEY", concurrency=1), corpus, questions(9))
    assert any(b"is odd" in journal for journal in journals)
    assert not any(SECRET.encode() in journal for journal in journals)
    assert [status for (status,) in attempts(corpus, "status")] == [200, 500, 400, 429, 401]
    out, err = capfd.readouterr()
    assert "is odd" in err
    assert "is odd" in all_text(corpus)
    for text in (all_text(corpus), str(raised.value), out, err):
        assert SECRET not in text
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes()


# Interruptions


async def cancelled_in_the_middle(engine: Engine, requests: list[Request], when: Callable[[], bool]) -> float:
    """Seconds that ending took."""

    async def consume() -> None:
        async for _ in engine.complete(requests):
            pass

    async with engine:
        task = asyncio.create_task(consume())
        await until(when)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    return time.monotonic() - started


def test_cancelling_admits_nothing_more_and_keeps_what_is_in_flight(corpus: Corpus) -> None:
    with served(FakeAPI(delay_s=0.3)) as api:
        engine = Engine(config(api.url, concurrency=4), corpus, RUN_ID)
        asyncio.run(cancelled_in_the_middle(engine, questions(20), lambda: len(api.bodies) == 4))
        assert len(api.bodies) == 4
        assert len(stored(corpus)) == 4
        assert attempts(corpus) == [(200, True)] * 4
        api.delay_s = 0
        answers, _ = ask(config(api.url, concurrency=4), corpus, questions(20))
    assert texts(answers) == echoes(*range(20))
    assert len(api.bodies) == 20


@pytest.mark.parametrize("status", [429, 503])
def test_cancelling_does_not_wait_for_those_who_wait(corpus: Corpus, status: int) -> None:
    with served(FakeAPI(lambda *_: error_reply(status, headers={"retry-after": "25"}))) as api:
        engine = Engine(config(api.url, concurrency=2), corpus, RUN_ID)
        took = asyncio.run(
            cancelled_in_the_middle(engine, questions(5), lambda: len(api.bodies) == 2 and not api.in_flight)
        )
    assert took < 5
    assert len(api.bodies) == 2
    assert count(corpus, "pending") == 5


def test_cancelling_twice_ends_at_once_and_notes_what_was_in_flight(corpus: Corpus) -> None:
    async def twice(url: str) -> None:
        async def consume() -> None:
            async for _ in engine.complete(questions(5)):
                pass

        async with Engine(config(url, concurrency=2), corpus, RUN_ID) as engine:
            task = asyncio.create_task(consume())
            await until(lambda: len(api.bodies) == 2)
            task.cancel()
            await asyncio.sleep(0.1)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with served(FakeAPI(delay_s=2.0)) as api:
        started = time.monotonic()
        asyncio.run(twice(api.url))
        assert time.monotonic() - started < 1.9
    assert attempts(corpus, "status, billed, error") == [(None, None, "interrupted: CancelledError")] * 2
    assert count(corpus, "pending") == 5


@pytest.mark.parametrize("way", ["break", "raise"])
def test_a_caller_who_walks_away_still_keeps_what_is_in_flight(corpus: Corpus, way: str) -> None:
    async def leave(url: str) -> None:
        async with Engine(config(url, concurrency=3), corpus, RUN_ID) as engine:
            async for _ in engine.complete(questions(20)):
                if way == "raise":
                    raise LookupError
                break

    with served(FakeAPI(delay_s=0.2)) as api:
        if way == "raise":
            with pytest.raises(LookupError):
                asyncio.run(leave(api.url))
        else:
            asyncio.run(leave(api.url))
        asked = len(api.bodies)
    assert 3 <= asked <= 6
    assert len(stored(corpus)) == asked
    assert attempts(corpus) == [(200, True)] * asked


def test_a_generator_that_is_never_closed_does_not_hold_up_the_end(corpus: Corpus) -> None:
    async def abandon(url: str) -> AsyncIterator[Completion]:
        async with Engine(config(url, concurrency=2), corpus, RUN_ID) as engine:
            answers = engine.complete(questions(20))
            await anext(answers)
        return answers

    with served(FakeAPI(delay_s=0.05)) as api:
        started = time.monotonic()
        asyncio.run(abandon(api.url))
        assert time.monotonic() - started < 5
        asked = len(api.bodies)
    assert asked < 10
    assert len(stored(Corpus(corpus.path))) == asked


def test_records_that_a_killed_process_left_are_answers_at_the_next_start(corpus: Corpus) -> None:
    answered, lost = question(0), question(1)
    corpus.add_requests([answered, lost])
    segment = Segment(corpus.journal)
    for request in (answered, lost):
        key = request.request_key
        segment.append(Sent(attempt_id=key, request_key=key, run_id=RUN_ID, attempted_at=1.0))
    key = answered.request_key
    attempt = Attempt(attempt_id=key, request_key=key, run_id=RUN_ID, attempted_at=1.0, status=200, billed=True)
    completion = Completion(
        request_key=key,
        prompt_id=answered.prompt_id,
        author="teacher",
        model="m",
        text="from the journal",
        finish_reason="stop",
    )
    segment.append(Answered(attempt=attempt, completions=[completion], scorer="m@bare"))
    segment.close(ingested=False)
    with served(FakeAPI()) as api:
        answers, _ = ask(config(api.url), Corpus(corpus.path), [answered, lost])
    assert texts(answers) == ["echo Say 1", "from the journal"]
    assert api.asked == ["Say 1"]
    assert sorted(attempts(corpus), key=str) == [(200, True), (200, True), (None, None)]


def test_the_teachers_private_prompt_names_the_scorer(corpus: Corpus) -> None:
    context = PrivateContext(None, None)
    request = msgspec.structs.replace(question(1, logprobs=True), context_hash=context.context_hash)
    with served(FakeAPI(lambda *_: chat_reply("x", logprobs=True))) as api:
        ask(config(api.url), corpus, [request])
    assert corpus.rows("SELECT scorer, k FROM logprobs") == [(f"m@{context.context_hash}", 1)]


def test_every_error_of_a_teacher_exits_with_3() -> None:
    def tree(kind: type[TeacherError]) -> list[type[TeacherError]]:
        return [kind, *(leaf for child in kind.__subclasses__() for leaf in tree(child))]

    assert {kind.exit_code for kind in tree(TeacherError)} == {3}
    assert len(tree(TeacherError)) == 6


def test_garbage_is_collected_as_before_once_the_engine_is_closed(corpus: Corpus) -> None:
    async def thresholds() -> tuple[int, int]:
        async with Engine(config("http://127.0.0.1:9/v1"), corpus, RUN_ID):
            return gc.get_threshold()[0], before[0]

    before = gc.get_threshold()
    inside, outside = asyncio.run(thresholds())
    assert inside > outside
    assert gc.get_threshold() == before
