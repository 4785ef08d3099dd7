"""What the benchmarks believe: the fake endpoint's ledger and limits, and a verdict on kills that can be bad."""

from __future__ import annotations

import asyncio
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from kill import HANDOVER_S, UNREAD_S, verdict
from replies import Maker
from servers import Event, EventName, Options, Server, TokenBucket, read_ledger, server
from witness import Receipts, read_receipts, witnessed


def ask(api: Server, content: str, *, timeout: float = 5.0) -> httpx.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": content}]}
    return httpx.post(
        f"{api.url}/chat/completions",
        json=body,
        headers={"X-Generation": "third"},
        timeout=timeout,
        trust_env=False,
    )


def text(reply: httpx.Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


def test_replies_have_the_size_and_the_shape_of_the_measured_ones() -> None:
    for tokens, top, size in ((50, 5, 21_700), (300, 20, 456_000)):
        before, after = Maker().reply(tokens, top)
        assert len(before + after) == pytest.approx(size, rel=0.06)
        shown = json.loads(before + b'"x"' + after)["choices"][0]["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in shown] == [top] * tokens
        assert len({token["token"] for token in shown}) > tokens / 2
        cut = any("\ufffd" in t["token"] for token in shown for t in token["top_logprobs"])
        assert cut or tokens < 100  # they are rare
        for token in shown:
            logprobs = [t["logprob"] for t in token["top_logprobs"]]
            assert logprobs == sorted(logprobs, reverse=True)


def test_each_answer_names_its_call_and_the_ledger_counts_it(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with server(Options(ledger=str(ledger))) as api:
        started = time.monotonic()
        assert [text(ask(api, content)) for content in ("a", 'b "\n', "a")] == [
            "answer 1 to a", 'answer 2 to b "\n', "answer 3 to a",
        ]  # fmt: skip
        stats = api.stats()
    assert (stats["received"], stats["answered"], stats["dropped"], stats["rejected"]) == (3, 3, 0, 0)
    assert stats["contents"] == {"a": {"received": 2, "answered": 2}, 'b "\n': {"received": 1, "answered": 1}}
    assert (stats["most_in_flight"], stats["first_received"] >= started) == (1, True)
    events = read_ledger(ledger)
    assert [(e.event, e.serial, e.content, e.generation) for e in events[:3]] == [
        ("received", 1, "a", "third"), ("answered", 1, "a", "third"), ("received", 2, 'b "\n', "third"),
    ]  # fmt: skip
    assert started < events[0].at <= events[-1].at <= time.monotonic()


def test_an_answer_that_nobody_waits_for_is_billed_all_the_same(tmp_path: Path) -> None:
    with server(Options(latency_s=0.2, ledger=str(tmp_path / "ledger"))) as api:
        with pytest.raises(httpx.ReadTimeout):
            ask(api, "a", timeout=0.05)
        time.sleep(0.3)
        assert api.stats()["contents"] == {"a": {"received": 1, "dropped": 1}}
    assert [event.event for event in read_ledger(tmp_path / "ledger")] == ["received", "dropped"]


def test_latency_is_not_a_queue() -> None:
    with server(Options(latency_s=0.2)) as api, ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        list(pool.map(lambda number: ask(api, str(number)), range(8)))
        assert 0.2 <= time.monotonic() - started < 1.0
        assert api.stats()["most_in_flight"] > 1


def test_a_token_bucket_holds_one_second() -> None:
    bucket = TokenBucket(4)
    assert [bucket.take(100.0) for _ in range(5)] == [0.0] * 4 + [0.25]
    assert bucket.take(100.125) == pytest.approx(0.125)
    assert bucket.take(100.25) == 0.0
    assert [bucket.take(200.0) for _ in range(5)] == [0.0] * 4 + [0.25]


@pytest.mark.parametrize("retry_after", [True, False])
def test_beyond_the_limit_calls_are_rejected_and_cost_nothing(retry_after: bool) -> None:
    with server(Options(rate=2, retry_after=retry_after)) as api:
        replies = [ask(api, "a") for _ in range(3)]
        stats = api.stats()
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert stats["contents"] == {"a": {"received": 3, "answered": 2, "rejected": 1}}
    headers = replies[2].headers
    assert headers.get("retry-after") == ("1" if retry_after else None)
    if retry_after:
        assert 0 < int(headers["retry-after-ms"]) <= 500


def test_rate_headers_are_sent_where_they_are_wanted() -> None:
    for wanted in (True, False):
        with server(Options(rate=10, rate_headers=wanted)) as api:
            headers = ask(api, "a").headers
        names = sorted(name for name in headers if name.startswith("x-ratelimit"))
        assert names == [f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset") if wanted]
    with server(Options(rate=10, rate_headers=True)) as api:
        headers = ask(api, "a").headers
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("600", "9")
    assert re.fullmatch(r"\d+ms", headers["x-ratelimit-reset-requests"])


def test_the_witness_notes_which_call_an_answer_is_from(tmp_path: Path) -> None:
    async def send(number: int, *, path: str) -> SimpleNamespace:
        return SimpleNamespace(data=b'{"content":"answer 17 to all"}')

    before = time.monotonic()
    reply = asyncio.run(witnessed(send, Receipts(tmp_path))(1, path="x"))  # type: ignore[arg-type]  # a stand-in
    assert reply.data == b'{"content":"answer 17 to all"}'
    found = read_receipts(tmp_path)
    assert list(found) == [17]
    assert before <= found[17] <= time.monotonic()


KILLED = 100.0


def call(serial: int, content: str, at: float, generation: str = "1", event: EventName = "answered") -> Event:
    return Event(event=event, serial=serial, content=content, generation=generation, at=at)


def judge(events: list[Event], receipts: dict[int, float], stored: set[int], **unknown: int) -> dict[str, int]:
    """Nothing but what is not 0, for a client whose first process was killed."""
    found = verdict(events, receipts, {"1": KILLED}, stored, unknown)
    return {name: count for name, count in found.items() if count}


def test_all_that_was_received_is_kept() -> None:
    events = [call(1, "a", 90.0), call(2, "b", 110.0, "2"), call(2, "b", 109.0, "2", "received")]
    assert judge(events, {1: 90.1, 2: 110.1}, {1, 2}) == {"received": 2}


def test_what_was_in_flight_at_the_kill_may_be_billed_twice() -> None:
    events = [call(1, "a", KILLED + 0.1, event="dropped"), call(2, "a", 110.0, "2")]
    assert judge(events, {2: 110.1}, {2}, a=1) == {"received": 1, "in_flight_at_kill": 1}
    assert judge(events, {2: 110.1}, {2}) == {"received": 1, "in_flight_at_kill": 1, "uncounted": 1}


def test_an_answer_on_its_way_into_the_journal_is_in_flight() -> None:
    events = [call(1, "a", 99.9), call(2, "a", 110.0, "2")]
    found = judge(events, {1: KILLED - HANDOVER_S / 2, 2: 110.1}, {2}, a=1)
    assert found == {"received": 2, "in_flight_at_kill": 1, "handed_over_at_kill": 1}


def test_a_lost_row_and_the_second_call_for_it_are_found() -> None:
    events = [call(1, "a", 90.0), call(2, "a", 110.0, "2")]
    assert judge(events, {1: 90.1, 2: 110.1}, {2}, a=1) == {"received": 2, "lost": 1, "billed_twice": 1}


@pytest.mark.parametrize("generation", ["1", "2"])
def test_a_double_call_without_a_kill_is_found(generation: str) -> None:
    asked_again = [call(1, "a", 90.0, generation), call(2, "a", 91.0, generation)]
    assert judge(asked_again, {1: 90.1, 2: 91.1}, {1}) == {"received": 2, "lost": 1, "billed_twice": 1}
    assert judge(asked_again, {2: 91.1}, {2}) == {"received": 1, "billed_twice": 1}


def test_an_answer_that_lay_unread_for_long_was_not_in_flight() -> None:
    events = [call(1, "a", KILLED - UNREAD_S - 1), call(2, "a", 110.0, "2")]
    assert judge(events, {2: 110.1}, {2}, a=1) == {"received": 1, "billed_twice": 1}
