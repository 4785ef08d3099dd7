"""How fast an endpoint may be asked: found out while asking, and shared by everybody who asks.

Three things hold a request back. The window (requests in flight) starts small and doubles with every round that came
back clean. The pace (requests and tokens a second) comes from rate headers where there are any, else from what was
delivered when the first 429 came, and from then on feels its way up. The gate closes for everybody while the endpoint
asks for a pause.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from blackbox_kd.errors import RateLimited, TeacherUnreachable
from blackbox_kd.teachers.work import Stopped

FIRST_WINDOW = 8
GROWTH = 1.05
"""Of the window for each clean round after the first 429; before it, 2."""
SATURATED = 0.8
"""A round says something about a wider window only if so much of this one was used."""
HEADROOM = 0.99
"""Of what the rate headers allow."""
PROBE_S, PROBE, NEAR, NEAR_PROBE = 0.5, 1.04, 0.95, 1.01
"""Every PROBE_S without a 429 the pace is raised, more carefully near the one that was too fast."""
PAST, FREE_PROBE = 1.1, 1.25
"""A pace so far past the one that was too fast meets another limit than that one: it grows quickly."""
MOST_PROBES = 20
"""At once, after a pause."""
SLOT_S = 0.1
SLOTS = 30
"""Answers are counted in slots, for the last 3 seconds."""
CATCH_UP_S = 0.05
"""Sleeps end late; so much of the lost time is made up for."""
LONGEST_BACKOFF_S = 30.0

REQUEST_LIMITS = ("x-ratelimit-limit-requests", "anthropic-ratelimit-requests-limit")
TOKEN_LIMITS = ("x-ratelimit-limit-tokens", "anthropic-ratelimit-tokens-limit")
"""Per minute. https://platform.openai.com/docs/guides/rate-limits, https://docs.anthropic.com/en/api/rate-limits"""


class Pace:
    """Evenly spaced units (requests, or tokens) at `rate` a second; None: as they come."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._next = 0.0

    def wait_s(self, now: float) -> float:
        """Until the next may leave."""
        return 0.0 if self.rate is None else self._next - now

    def take(self, units: float, now: float) -> None:
        """So many leave; below 0, so many fewer than thought did."""
        if self.rate is not None:
            self._next = max(self._next, now - CATCH_UP_S) + units / self.rate


class Delivered:
    """How many answers came in the last 3 seconds."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, int]] = deque(maxlen=SLOTS)

    def add(self, now: float) -> None:
        """One more."""
        slot = int(now / SLOT_S)
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1] = (slot, self._slots[-1][1] + 1)
        else:
            self._slots.append((slot, 1))

    def rate(self, now: float) -> float:
        """Answers a second, in the best second of the last three."""
        newest, wide = int(now / SLOT_S), round(1 / SLOT_S)
        counts = dict(self._slots)
        starts = range(newest - SLOTS + 1, newest - wide + 2)
        return max(float(sum(counts.get(s + i, 0) for i in range(wide))) for s in starts)


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to send one request."""

    epoch: int
    """The limit under which it left: a 429 says nothing about a later one."""
    tokens: float
    """What it was thought to take."""


class Limiter:
    """Use `admit`, then exactly one of `succeeded`, `limited` and `failed`."""

    def __init__(self, most: int, give_up_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`most` requests in flight; nothing but failures for `give_up_s` seconds ends it."""
        self.most, self.give_up_s, self._clock = most, give_up_s, clock
        self.in_flight = 0
        self.window = float(min(FIRST_WINDOW, most))
        self.requests, self.tokens = Pace(), Pace()
        self.limited_calls = self.calls = 0
        self._cap: float | None = None  # requests a second, as the headers say
        self._too_fast: float | None = None  # the pace at the last 429
        self._epoch = self._clean = self._peak = 0
        self._backoffs = 0  # 429s without a word on how long, and no answer between them
        self._gate = 0.0
        self._changed_at = self._clock()
        self._heard: float | None = None  # the last success; before it, the first admission
        self._delivered = Delivered()
        self._turn = asyncio.Lock()
        self._change = asyncio.Event()

    def begin(self) -> None:
        """Work starts after a pause: silence counts from here."""
        if not self.in_flight:
            self._heard = None

    async def admit(self, tokens: float, stopped: Callable[[], bool]) -> Permit:
        """Wait for window, gate and pace, in order of arrival.

        Raises:
            Stopped: `stopped()` is true; whoever makes it true calls `wake`.
        """
        async with self._turn:
            while not stopped() and (wait_s := self._wait_s()):
                await self._sleep(wait_s)
            if stopped():
                raise Stopped
            now = self._clock()
            self._heard = now if self._heard is None else self._heard
            self._raise_pace(now)
            self.requests.take(1, now)
            self.tokens.take(tokens, now)
            self.calls += 1
            self.in_flight += 1
            self._peak = max(self._peak, self.in_flight)
            return Permit(self._epoch, tokens)

    def _wait_s(self) -> float | None:
        """None: go; infinity: until something changes."""
        now = self._clock()
        if self.in_flight >= int(self.window):
            return float("inf")
        wait_s = max(self._gate - now, self.requests.wait_s(now), self.tokens.wait_s(now))
        return wait_s if wait_s > 0 else None

    async def _sleep(self, seconds: float) -> None:
        self._change.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if seconds == float("inf") else seconds):
                await self._change.wait()

    def wake(self) -> None:
        """Something has changed for those who wait."""
        self._change.set()

    def succeeded(self, permit: Permit, tokens: float, headers: Mapping[str, str]) -> None:
        """An answer, with what it really took and the headers that came with it."""
        now = self._clock()
        self._heard, self._backoffs = now, 0
        self._delivered.add(now)
        self._settle(permit, tokens)
        self._read(headers)
        if permit.epoch == self._epoch:
            self._clean += 1
            if self._clean >= self.window:
                self._widen()

    def failed(self, permit: Permit, transient: bool) -> None:
        """No answer, and no 429 either: what it took is not known.

        Raises:
            TeacherUnreachable: nothing has come for `give_up_s`.
        """
        self._settle(permit, permit.tokens)
        if transient:
            self._give_up_if_silent("failures")

    @property
    def limited_share(self) -> float:
        """429s in all calls."""
        return self.limited_calls / max(1, self.calls)

    def rate(self) -> float:
        """Answers a second, of late."""
        return self._delivered.rate(self._clock())

    def limited(self, permit: Permit, error: RateLimited) -> None:
        """A 429: slow down once for all that left under the same limit, and wait as long as it says.

        Raises:
            TeacherUnreachable: nothing has come for `give_up_s`, or it wants a longer pause.
        """
        now, asked = self._clock(), error.retry_after_s
        self.limited_calls += 1
        self._settle(permit, 0)
        if asked is not None and asked > self.give_up_s:
            raise TeacherUnreachable(
                f"the teacher wants a pause of {asked:.0f} s, more than teacher.give_up_s ({self.give_up_s:.0f}): "
                f"run again then, or raise it ({error})"
            )
        self._give_up_if_silent("rate limits")
        current = permit.epoch == self._epoch
        if current:
            self._slow_down(now)
        self._read(error.headers)  # a limit that is first told now was not known when the call left: nothing to cut
        if asked:
            self._gate = max(self._gate, now + asked * random.uniform(1.0, 1.05))
        elif current and (self._backoffs or not self._delivered.rate(now)):  # no answer since the last 429
            self._gate = max(self._gate, now + min(LONGEST_BACKOFF_S, 0.5 * 2**self._backoffs))
        self._backoffs += current

    @property
    def pause_s(self) -> float:
        """How long the gate stays closed."""
        return max(0.0, self._gate - self._clock())

    def _settle(self, permit: Permit, tokens: float) -> None:
        self.in_flight -= 1
        self.tokens.take(tokens - permit.tokens, self._clock())
        self.wake()

    def _widen(self) -> None:
        if self._peak >= SATURATED * self.window:
            grown = self.window * (2 if self._too_fast is None else GROWTH)
            self.window = min(float(self.most), max(grown, self.window + 1))
        self._clean, self._peak = 0, self.in_flight
        self.wake()

    def _slow_down(self, now: float) -> None:
        delivered, rate = self._delivered.rate(now), self.requests.rate
        if rate is not None and not self._backoffs:  # with no answer since the last cut, there is nothing to learn
            self._too_fast = rate
            self.requests.rate = max(rate / 2, min(rate * NEAR, delivered))
        elif rate is None and delivered:
            self._too_fast = self.requests.rate = delivered
        self._epoch += 1
        self._clean, self._peak, self._changed_at = 0, self.in_flight, now

    def _raise_pace(self, now: float) -> None:
        """Once for every PROBE_S that has passed, so that a slow pace recovers as fast as a fast one."""
        rate = self.requests.rate
        if rate is None or self._too_fast is None:
            return
        for _ in range(min(MOST_PROBES, int((now - self._changed_at) / PROBE_S))):
            rate *= _step(rate / self._too_fast)
            self._changed_at = now
        self.requests.rate = min(rate, self._cap or float("inf"))

    def _read(self, headers: Mapping[str, str]) -> None:
        cap = _per_second(headers, REQUEST_LIMITS)
        if cap and cap != self._cap:
            self._cap = cap
            self.requests.rate = cap if self._too_fast is None else min(cap, self.requests.rate or cap)
        self.tokens.rate = _per_second(headers, TOKEN_LIMITS) or self.tokens.rate

    def _give_up_if_silent(self, what: str) -> None:
        silent_s = self._clock() - (self._heard or self._clock())
        if silent_s > self.give_up_s:
            raise TeacherUnreachable(
                f"nothing but {what} for {silent_s:.0f} s (teacher.give_up_s is {self.give_up_s:.0f}); run again later"
            )


def _step(share: float) -> float:
    """Of the pace, which is that share of the one that was too fast."""
    if share < NEAR:
        return PROBE
    return NEAR_PROBE if share < PAST else FREE_PROBE


def _per_second(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    for name in names:
        with suppress(ValueError):
            if (limit := float(headers.get(name, 0))) > 0:
                return HEADROOM * limit / 60
    return None
