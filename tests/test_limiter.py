"""The limiter on a clock that stands still until it is moved: how fast, how many, and when to give up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest

from blackbox_kd.errors import RateLimited, TeacherUnreachable
from blackbox_kd.teachers.limiter import (
    FIRST_WINDOW,
    GROWTH,
    HEADROOM,
    LONGEST_BACKOFF_S,
    NEAR_PROBE,
    PROBE,
    PROBE_S,
    Delivered,
    Limiter,
    Pace,
    Permit,
)
from blackbox_kd.teachers.work import Stopped

GIVE_UP_S = 300.0
PER_MINUTE = {"x-ratelimit-limit-requests": "600"}


def never() -> bool:
    return False


class Bench:
    """A limiter, its clock, and an event loop to wait in."""

    def __init__(self, runner: asyncio.Runner, most: int = 64) -> None:
        self.now, self._runner = 1000.0, runner
        self.limiter = Limiter(most, GIVE_UP_S, lambda: self.now)

    def admit(self, count: int = 1, tokens: float = 0.0) -> list[Permit]:
        async def all_of_them() -> list[Permit]:
            async with asyncio.timeout(1.0):
                return [await self.limiter.admit(tokens, never) for _ in range(count)]

        return self._runner.run(all_of_them())

    def held(self) -> bool:
        """Whether the next one has to wait."""

        async def try_one() -> Permit | None:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    return await self.limiter.admit(0, never)
            return None

        if permit := self._runner.run(try_one()):
            self.limiter.failed(permit, transient=False)
        return permit is None

    def answer(self, *permits: Permit, tokens: float = 0.0, **headers: str) -> None:
        for permit in permits:
            self.limiter.succeeded(permit, tokens, headers)

    def limit(self, *permits: Permit, retry_after_s: float | None = None) -> None:
        for permit in permits:
            self.limiter.limited(permit, RateLimited("HTTP 429", status=429, retry_after_s=retry_after_s))

    def round(self) -> None:
        """As many as may be in flight, all answered."""
        self.answer(*self.admit(int(self.limiter.window)))

    def deliver(self, rate: float, seconds: float) -> None:
        """So many answers a second for so long."""
        for _ in range(round(rate * seconds)):
            self.answer(*self.admit())
            self.now += 1 / rate

    def slowed_to(self, rate: float) -> None:
        """The first 429 came at this rate."""
        self.deliver(rate, 2.0)
        self.limit(*self.admit())


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture
def bench(runner: asyncio.Runner) -> Bench:
    return Bench(runner)


# The window


def test_the_window_doubles_with_each_clean_round_up_to_the_most(runner: asyncio.Runner) -> None:
    bench, seen = Bench(runner, most=50), []
    for _ in range(6):
        seen.append(bench.limiter.window)
        bench.round()
    assert seen == [FIRST_WINDOW, 16, 32, 50, 50, 50]


def test_a_window_that_nobody_fills_stays_as_it_is(bench: Bench) -> None:
    for _ in range(100):
        bench.answer(*bench.admit(4))
    assert bench.limiter.window == FIRST_WINDOW


def test_a_most_below_the_first_window_is_kept(runner: asyncio.Runner) -> None:
    bench = Bench(runner, most=3)
    first, *rest = bench.admit(3)
    assert bench.held()
    bench.answer(first)
    assert not bench.held()
    bench.answer(*rest)
    assert bench.limiter.window == 3


def test_after_a_429_the_window_grows_by_a_little(bench: Bench) -> None:
    bench.slowed_to(10)
    before = bench.limiter.window
    permits = []
    for _ in range(int(before)):
        permits += bench.admit()
        bench.now += 1.0
    bench.answer(*permits)
    assert bench.limiter.window == max(before + 1, before * GROWTH)


def test_those_who_wait_leave_in_order_of_arrival_as_soon_as_there_is_room() -> None:
    async def three() -> list[str]:
        limiter, left = Limiter(1, GIVE_UP_S), []

        async def one(name: str) -> None:
            permit = await limiter.admit(0, never)
            left.append(name)
            await asyncio.sleep(0)
            limiter.succeeded(permit, 0, {})

        async with asyncio.timeout(1.0):
            await asyncio.gather(*(one(name) for name in "abc"))
        return left

    assert asyncio.run(three()) == ["a", "b", "c"]


def test_who_is_woken_by_the_end_of_the_work_does_not_leave() -> None:
    async def woken() -> Limiter:
        limiter, stopped = Limiter(1, GIVE_UP_S), asyncio.Event()
        await limiter.admit(0, never)
        waiting = asyncio.create_task(limiter.admit(0, stopped.is_set))
        await asyncio.sleep(0.01)
        stopped.set()
        limiter.wake()
        with pytest.raises(Stopped):
            await asyncio.wait_for(waiting, 1.0)
        return limiter

    assert asyncio.run(woken()).in_flight == 1


# The pace


def test_a_pace_spaces_units_evenly_and_makes_up_for_late_sleeps() -> None:
    pace = Pace()
    pace.take(1, 0.0)
    assert pace.wait_s(0.0) == 0.0
    pace.rate = 10.0
    pace.take(1, 100.0)
    assert pace.wait_s(100.0) == pytest.approx(0.05)  # it began 0.05 s back
    pace.take(2, 100.05)
    assert pace.wait_s(100.05) == pytest.approx(0.2)
    pace.take(-1, 100.05)
    assert pace.wait_s(100.05) == pytest.approx(0.1)


def test_a_long_silence_saves_nothing_up() -> None:
    pace = Pace()
    pace.rate = 10.0
    for _ in range(3):
        pace.take(1, 500.0)
    assert pace.wait_s(500.0) == pytest.approx(0.25)


def test_what_was_delivered_is_the_best_second_of_the_last_three() -> None:
    delivered = Delivered()
    assert delivered.rate(0.0) == 0.0
    for i in range(40):
        delivered.add(10.0 + i / 20)
    assert delivered.rate(12.0) == 20
    assert delivered.rate(13.5) == pytest.approx(20, abs=1)
    assert delivered.rate(16.0) == 0.0


@pytest.mark.parametrize("name", ["x-ratelimit-limit-requests", "anthropic-ratelimit-requests-limit"])
def test_a_limit_in_the_headers_is_the_pace_with_some_headroom(bench: Bench, name: str) -> None:
    bench.answer(*bench.admit(), **{name: "600"})
    assert bench.limiter.requests.rate == pytest.approx(HEADROOM * 10)
    bench.admit(1)
    bench.now += 1.0  # too late for what was missed
    bench.admit(1)
    assert bench.held()
    bench.now += 1 / 9.9
    assert not bench.held()


@pytest.mark.parametrize("value", ["", "many", "0", "-5", "nan"])
def test_a_header_that_is_no_limit_is_none(bench: Bench, value: str) -> None:
    names = ("x-ratelimit-limit-requests", "x-ratelimit-limit-tokens")
    bench.answer(*bench.admit(), **dict.fromkeys(names, value))
    assert (bench.limiter.requests.rate, bench.limiter.tokens.rate) == (None, None)


def test_a_limit_that_the_first_429_tells_is_the_pace_and_not_cut_as_well(bench: Bench) -> None:
    (permit,) = bench.admit()
    error = RateLimited("HTTP 429", status=429)
    error.headers = PER_MINUTE
    bench.limiter.limited(permit, error)
    assert bench.limiter.requests.rate == pytest.approx(9.9)


def test_a_limit_on_tokens_is_a_pace_of_its_own_settled_with_what_was_really_used(bench: Bench) -> None:
    bench.answer(*bench.admit(), **{"x-ratelimit-limit-tokens": "6000"})
    assert bench.limiter.tokens.rate == pytest.approx(99)
    (permit,) = bench.admit(tokens=99)
    bench.now += 0.9
    assert bench.held()
    bench.answer(permit, tokens=9.9)
    assert not bench.held()


def test_a_429_gives_its_tokens_back_and_a_failure_keeps_them(bench: Bench) -> None:
    bench.answer(*bench.admit(), **{"x-ratelimit-limit-tokens": "6000"})
    bench.deliver(2, 1.0)  # so that a 429 does not close the gate
    limiter = bench.limiter
    (failed,) = bench.admit(tokens=99)
    limiter.failed(failed, transient=True)
    assert limiter.tokens.wait_s(bench.now) == pytest.approx(0.95)
    bench.now += 2.0
    (limited,) = bench.admit(tokens=99)
    bench.limit(limited)
    assert limiter.tokens.wait_s(bench.now) <= 0


def test_the_first_429_sets_the_pace_to_what_was_delivered(bench: Bench) -> None:
    bench.slowed_to(10)
    assert bench.limiter.requests.rate == 10
    assert bench.limiter.rate() == 10


def test_a_burst_of_429s_that_left_under_one_limit_cuts_once(bench: Bench) -> None:
    bench.deliver(10, 2.0)
    bench.limit(*bench.admit(8))
    assert bench.limiter.requests.rate == 10
    bench.now += 0.2
    bench.limit(*bench.admit())  # this one left under the new limit, but nothing was answered since: no news
    assert bench.limiter.requests.rate == 10
    assert (bench.limiter.limited_calls, bench.limiter.calls) == (9, 29)
    assert bench.limiter.limited_share == pytest.approx(9 / 29)


def test_however_little_was_delivered_a_429_takes_no_more_than_half_of_the_pace(bench: Bench) -> None:
    bench.answer(*bench.admit(), **PER_MINUTE)
    bench.now += 10.0
    bench.limit(*bench.admit())
    assert bench.limiter.requests.rate == pytest.approx(9.9 / 2)


def test_without_a_429_the_pace_feels_its_way_up_and_more_carefully_near_the_one_that_was_too_fast(
    bench: Bench,
) -> None:
    bench.slowed_to(10)
    bench.now += 0.9 * PROBE_S
    bench.answer(*bench.admit())
    assert bench.limiter.requests.rate == 10
    bench.now += 0.2 * PROBE_S
    bench.answer(*bench.admit())
    assert bench.limiter.requests.rate == pytest.approx(10 * NEAR_PROBE)
    bench.now += 10.0  # nothing was delivered of late
    bench.limit(*bench.admit())
    halved = bench.limiter.requests.rate
    assert halved is not None
    bench.now += PROBE_S
    bench.answer(*bench.admit())
    assert bench.limiter.requests.rate == pytest.approx(halved * PROBE)


def test_the_pace_never_rises_above_what_the_headers_allow(bench: Bench) -> None:
    bench.answer(*bench.admit(), **PER_MINUTE)
    bench.now += 1.0
    bench.limit(*bench.admit())
    for _ in range(100):
        bench.now += PROBE_S
        bench.answer(*bench.admit(), **PER_MINUTE)
    assert bench.limiter.requests.rate == pytest.approx(9.9)


def test_another_limit_in_the_headers_is_the_new_pace(bench: Bench) -> None:
    bench.answer(*bench.admit(), **PER_MINUTE)
    bench.now += 1.0
    bench.answer(*bench.admit(), **{"x-ratelimit-limit-requests": "6000"})
    assert bench.limiter.requests.rate == pytest.approx(99)


# The gate


def test_a_pause_that_the_endpoint_asks_for_holds_everybody(bench: Bench) -> None:
    limited, other = bench.admit(2)
    bench.limit(limited, retry_after_s=10.0)
    bench.answer(other)
    bench.now += 9.99
    assert bench.held()
    bench.now += 0.51
    assert not bench.held()


def test_the_pause_is_never_shorter_than_asked_nor_much_longer(runner: asyncio.Runner) -> None:
    pauses = []
    for _ in range(50):
        bench = Bench(runner)
        bench.limit(*bench.admit(), retry_after_s=10.0)
        pauses.append(bench.limiter.pause_s)
    assert min(pauses) >= 10.0
    assert max(pauses) <= 10.5
    assert len(set(pauses)) > 1


def test_a_shorter_pause_does_not_open_a_gate_that_is_closed_for_longer(bench: Bench) -> None:
    first, second = bench.admit(2)
    bench.limit(first, retry_after_s=10.0)
    bench.limit(second, retry_after_s=1.0)
    assert bench.limiter.pause_s >= 10.0


def test_while_answers_come_a_429_without_retry_after_closes_no_gate(bench: Bench) -> None:
    bench.deliver(10, 2.0)
    bench.limit(*bench.admit(8))
    assert bench.limiter.pause_s == 0


def test_where_none_come_the_pause_grows_until_one_does(bench: Bench) -> None:
    pauses = []
    for _ in range(8):
        bench.limit(*bench.admit(2))  # a burst counts once
        pauses.append(bench.limiter.pause_s)
        bench.now += bench.limiter.pause_s
    assert pauses == [0.5, 1, 2, 4, 8, 16, LONGEST_BACKOFF_S, LONGEST_BACKOFF_S]
    bench.answer(*bench.admit())
    bench.now += 10.0
    bench.limit(*bench.admit())
    assert bench.limiter.pause_s == 0.5


# Giving up


@pytest.mark.parametrize("after_answer", [False, True])
def test_nothing_but_failures_for_too_long_ends_it(bench: Bench, after_answer: bool) -> None:
    if after_answer:
        bench.answer(*bench.admit())
    first, second = bench.admit(2)
    bench.now += GIVE_UP_S - 1
    bench.limiter.failed(first, transient=True)
    bench.now += 2
    with pytest.raises(TeacherUnreachable, match=r"nothing but failures for 301 s \(teacher\.give_up_s is 300\)"):
        bench.limiter.failed(second, transient=True)
    assert bench.limiter.in_flight == 0


def test_nothing_but_429s_for_too_long_ends_it(bench: Bench) -> None:
    with pytest.raises(TeacherUnreachable, match="nothing but rate limits for 3"):  # noqa: PT012
        for _ in range(40):
            bench.limit(*bench.admit())
            bench.now += bench.limiter.pause_s
    assert bench.limiter.in_flight == 0


def test_an_answer_ends_the_silence(bench: Bench) -> None:
    first, second, third = bench.admit(3)
    bench.now += GIVE_UP_S - 1
    bench.answer(first)
    bench.now += GIVE_UP_S - 1
    bench.limiter.failed(second, transient=True)
    bench.limit(third)


def test_a_pause_longer_than_anybody_wants_to_wait_ends_it_at_once(bench: Bench) -> None:
    bench.answer(*bench.admit())
    (permit,) = bench.admit()
    with pytest.raises(TeacherUnreachable, match=r"wants a pause of 3600 s, more than teacher\.give_up_s \(300\)"):
        bench.limit(permit, retry_after_s=3600)
    assert (bench.limiter.in_flight, bench.limiter.pause_s) == (0, 0)


def test_the_time_between_two_works_is_no_silence(bench: Bench) -> None:
    bench.answer(*bench.admit())
    bench.now += 10 * GIVE_UP_S
    bench.limiter.begin()
    bench.limiter.failed(*bench.admit(), transient=True)


def test_work_that_begins_beside_another_does_not_forget_the_silence(bench: Bench) -> None:
    first, second = bench.admit(2)
    bench.now += 2 * GIVE_UP_S
    bench.limiter.begin()
    with pytest.raises(TeacherUnreachable):
        bench.limiter.failed(first, transient=True)
    assert second.epoch == first.epoch


def test_a_failure_that_will_not_pass_is_no_silence(bench: Bench) -> None:
    (permit,) = bench.admit()
    bench.now += 2 * GIVE_UP_S
    bench.limiter.failed(permit, transient=False)
    assert bench.limiter.in_flight == 0
