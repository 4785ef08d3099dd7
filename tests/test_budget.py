"""Caps: the worst case is set aside before a call leaves, and what nobody knows counts at its worst."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from blackbox_kd import sample
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Segment
from blackbox_kd.corpus.store import Billed
from blackbox_kd.errors import BudgetExhausted, ConfigError
from blackbox_kd.teachers.base import PriceConfig
from blackbox_kd.teachers.budget import Amount, Budget, BudgetConfig, prompt_bound, worst_case
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.types import Request, Usage
from tests.conftest import RUN_ID
from tests.fakes import FakeAPI, chat_reply, cut_short, error_reply, served
from tests.records import attempt, sent, usage
from tests.test_engine import config, count, question, questions

PRICE = PriceConfig(input=1.0, output=10.0)
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Grüß dich"}], "max_tokens": 50}


def never() -> bool:
    return False


def reserve(budget: Budget, body: dict[str, Any] = BODY) -> Amount:
    return asyncio.run(budget.reserve(body, never))


def ask(url: str, corpus: Corpus, requests: list[Request], run_id: str = RUN_ID, **caps: Any) -> Engine:
    price = caps.pop("price", None)

    async def collect() -> Engine:
        async with Engine(config(url, price=price), corpus, run_id, caps=BudgetConfig(**caps)) as engine:
            async for _ in engine.complete(requests):
                pass
            return engine

    return asyncio.run(collect())


# The worst case


def test_a_prompt_has_no_more_tokens_than_bytes_and_what_a_template_adds() -> None:
    assert prompt_bound(BODY) == len("Grüß dich".encode()) + 16 + 16
    assert (
        prompt_bound({"prompt": "abc"})
        == prompt_bound({"text": "abc"})
        == prompt_bound({"prompt": [1, 2, 3]})
        == 3 + 16
    )
    assert worst_case({"text": "abc", "sampling_params": {"max_new_tokens": 2}}).completion_tokens == 2
    assert prompt_bound(BODY | {"tools": [{"name": "look_up"}]}) > prompt_bound(BODY) + len("look_up")


@pytest.mark.parametrize(("more", "tokens"), [({}, 50), ({"n": 4}, 200), ({"max_completion_tokens": 7}, 7)])
def test_an_answer_is_as_long_as_it_may_be(more: dict[str, Any], tokens: int) -> None:
    assert worst_case(BODY | more).completion_tokens == tokens


def test_a_cap_without_a_longest_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="longest answer"):
        reserve(Budget(BudgetConfig(max_tokens=1000), None), {"model": "m", "messages": []})
    assert reserve(Budget(BudgetConfig(), None), {"model": "m", "messages": []}) == Amount()


def test_a_cap_in_dollars_without_a_price_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.price"):
        Budget(BudgetConfig(max_usd=1), None)


# Reserve and settle


def test_what_is_settled_makes_room_for_more() -> None:
    budget = Budget(BudgetConfig(max_tokens=200), None)
    first = reserve(budget)
    assert first.tokens == worst_case(BODY).prompt_tokens + 50
    budget.settle(first, attempt(usage=usage(5, 3)))
    assert (budget.spent, budget.reserved) == (Amount(0, 8, 1), Amount())
    reserve(budget)


def test_one_that_does_not_fit_waits_for_those_in_flight() -> None:
    async def two(budget: Budget) -> list[str]:
        order = []
        first = await budget.reserve(BODY, never)

        async def second() -> None:
            await budget.reserve(BODY, never)
            order.append("second")

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0.01)
        order.append("settled")
        budget.settle(first, attempt(usage=usage(5, 3)))
        await waiting
        return order

    assert asyncio.run(two(Budget(BudgetConfig(max_tokens=120), None))) == ["settled", "second"]


def test_one_that_fits_no_more_ends_the_work_with_exit_code_4() -> None:
    budget = Budget(BudgetConfig(max_usd=0.001), PRICE)
    budget.count_history(Billed(cost_usd=0.0006, tokens=100, calls=3, unpriced=Usage(), uncertain=[]))
    with pytest.raises(BudgetExhausted, match=r"max_usd is 0\.001") as raised:
        reserve(budget)
    assert raised.value.exit_code == 4


@pytest.mark.parametrize(
    ("outcome", "spent"),
    [
        ({"status": 500, "billed": False}, Amount()),
        ({"status": 200, "billed": True, "usage": usage(100, 10)}, Amount(200e-6, 110, 1)),
        ({"status": 200, "billed": True, "usage": usage(100, 10, cached=100)}, Amount(200e-6, 110, 1)),
    ],
)
def test_what_is_known_counts_as_it_is(outcome: dict[str, Any], spent: Amount) -> None:
    budget = Budget(BudgetConfig(max_usd=1), PRICE)
    budget.settle(reserve(budget), attempt(**outcome))
    assert budget.spent.usd == pytest.approx(spent.usd)
    assert (budget.spent.tokens, budget.spent.requests) == (spent.tokens, spent.requests)


@pytest.mark.parametrize("outcome", [{"status": None, "billed": None}, {"status": 200, "billed": True}])
def test_what_nobody_knows_counts_at_its_worst(outcome: dict[str, Any]) -> None:
    budget = Budget(BudgetConfig(max_usd=1), PRICE)
    reserved = reserve(budget)
    budget.settle(reserved, attempt(**outcome))
    assert budget.spent == reserved


# Through the engine


def test_the_cap_on_calls_is_met_exactly_and_a_higher_one_goes_on(corpus: Corpus) -> None:
    with served(FakeAPI(delay_s=0.01)) as api:
        with pytest.raises(BudgetExhausted, match="max_requests is 7"):
            ask(api.url, corpus, questions(20, max_tokens=5), max_requests=7)
        assert (len(api.bodies), count(corpus, "completions")) == (7, 7)
        with pytest.raises(BudgetExhausted):
            ask(api.url, corpus, questions(20, max_tokens=5), max_requests=7)
        assert len(api.bodies) == 7
        ask(api.url, corpus, questions(20, max_tokens=5), max_requests=20)
    assert len(api.bodies) == 20


@pytest.mark.parametrize("cap", [{"max_tokens": 1000}, {"max_usd": 0.002}])
def test_the_cap_is_never_passed_however_many_are_in_flight(corpus: Corpus, cap: dict[str, Any]) -> None:
    """The fake bills the most that it may: its whole prompt and all tokens of an answer."""

    def dear(body: dict[str, Any], _: Any) -> dict[str, Any]:
        worst = worst_case(body)
        return chat_reply("x", usage={"prompt_tokens": worst.prompt_tokens, "completion_tokens": body["max_tokens"]})

    with served(FakeAPI(dear, delay_s=0.01)) as api, pytest.raises(BudgetExhausted):
        ask(api.url, corpus, questions(100, max_tokens=30), price=PRICE, **cap)
    spend = corpus.spend(RUN_ID)
    tokens = spend["prompt_tokens"] + spend["completion_tokens"]
    spent, most = (spend["cost_usd"], 0.002) if "max_usd" in cap else (tokens, 1000)
    one = most / spend["calls"]
    assert most - 2 * one < spent <= most


def test_another_run_in_the_same_corpus_has_a_budget_of_its_own(corpus: Corpus) -> None:
    with served(FakeAPI()) as api:
        ask(api.url, corpus, questions(3, max_tokens=5), max_requests=3)
        ask(api.url, corpus, questions(6, max_tokens=5), RUN_ID[:-1] + "2", max_requests=3)
    assert len(api.bodies) == 6


def test_a_429_or_a_500_is_not_billed_and_does_not_count(corpus: Corpus) -> None:
    failures = iter([error_reply(500), error_reply(429, headers={"retry-after-ms": "5"})])
    with served(FakeAPI(lambda body, _: next(failures, None) or chat_reply("x"))) as api:
        ask(api.url, corpus, questions(3, max_tokens=5), max_requests=3)
    assert len(api.bodies) == 5


def test_a_connection_that_died_counts_as_a_call(corpus: Corpus) -> None:
    first = iter([cut_short])

    def handler(body: dict[str, Any], request: Any) -> Any:
        cut = next(first, None)
        return cut(request) if cut else chat_reply("x")

    with served(FakeAPI(handler)) as api, pytest.raises(BudgetExhausted):
        ask(api.url, corpus, questions(3, max_tokens=5), max_requests=3)
    assert len(api.bodies) == 3
    assert count(corpus, "completions") == 2


def test_what_was_in_flight_at_a_kill_counts_at_its_worst(corpus: Corpus) -> None:
    lost = question(0, max_tokens=5)
    corpus.add_requests([lost])
    segment = Segment(corpus.journal)
    segment.append(sent(attempt(lost)))
    segment.close(ingested=False)
    again = Corpus(corpus.path)
    bound = prompt_bound(lost.body) + 5
    with served(FakeAPI()) as api:
        with pytest.raises(BudgetExhausted, match=f"tokens {bound} "):
            ask(api.url, again, [lost], max_tokens=2 * bound - 1)
        assert not api.bodies
        ask(api.url, again, [lost], max_tokens=2 * bound)
    assert len(api.bodies) == 1


def test_the_flags_cap_a_stage(tmp_path: Path, project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(project_file), "--max-requests", "4", "--teacher.concurrency", "1"]
    assert sample.main(flags) == 4
    assert "stopped at the budget" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["budget"]["max_requests"] == 4
    assert sample.main([*flags, "--max-requests", "6"]) == 0
    assert sample.main([*flags, "--max-usd", "1", "--teacher.reply", "Ho {{ text }}"]) == 2
    assert "teacher.price" in capsys.readouterr().err
