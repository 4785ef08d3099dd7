"""A cap that is never passed: the worst case of a call is reserved before it leaves and settled when it is back.

What nobody knows counts at its worst case, in this process and after a restart: a call that was in flight when the
process or its connection died, and a reply without usage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from blackbox_kd.corpus.store import Billed
from blackbox_kd.errors import BudgetExhausted, ConfigError
from blackbox_kd.sections import Section
from blackbox_kd.teachers.base import PriceConfig
from blackbox_kd.teachers.work import Stopped
from blackbox_kd.types import Attempt, Usage

LIMIT_PARAMS = ("max_completion_tokens", "max_tokens")
MESSAGE_TOKENS = 16
"""More than any chat template adds around a message."""


class BudgetConfig(Section):
    """Caps on what a run is ever billed, over all its starts. Needs a longest answer, and `max_usd` a price."""

    max_usd: float | None = Field(None, gt=0)
    """US dollars; also --max-usd."""
    max_tokens: int | None = Field(None, ge=1)
    """Prompt and completion tokens; also --max-tokens."""
    max_requests: int | None = Field(None, ge=1)
    """Calls that were or may have been billed; also --max-requests."""

    @property
    def any(self) -> bool:
        """Whether anything is capped."""
        return any(value is not None for value in (self.max_usd, self.max_tokens, self.max_requests))


@dataclass(frozen=True, slots=True)
class Amount:
    """Of what is capped."""

    usd: float = 0.0
    tokens: int = 0
    requests: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.usd + other.usd, self.tokens + other.tokens, self.requests + other.requests)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.usd - other.usd, self.tokens - other.tokens, self.requests - other.requests)


def prompt_bound(body: dict[str, Any]) -> int:
    """No fewer tokens than the prompt has: a token is at least one byte of UTF-8."""
    if "messages" not in body:
        raw = body.get("prompt") or body.get("text") or ""
        return (len(raw) if isinstance(raw, list) else len(str(raw).encode())) + MESSAGE_TOKENS
    extra = sum(len(str(body[key]).encode()) for key in ("tools", "response_format") if key in body)
    return extra + MESSAGE_TOKENS + sum(len(_text(m).encode()) + MESSAGE_TOKENS for m in body["messages"])


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    known = content if isinstance(content, str) else str(content)
    return known + "".join(str(v) for k, v in message.items() if k not in ("role", "content"))


def completion_bound(body: dict[str, Any]) -> int:
    """No fewer tokens than the answers can have; 0 where the body does not say."""
    limits = {**body, "max_tokens": body.get("max_tokens") or (body.get("sampling_params") or {}).get("max_new_tokens")}
    limit = next((int(limits[name]) for name in LIMIT_PARAMS if limits.get(name)), 0)
    return limit * int(body.get("n") or 1)


def worst_case(body: dict[str, Any]) -> Usage:
    """The most tokens that a call can be billed for.

    Raises:
        ConfigError: the body does not limit the length of an answer.
    """
    bound = completion_bound(body)
    if not bound:
        raise ConfigError(
            "budget: a cap needs a longest answer, but no request says max_tokens or max_completion_tokens; "
            "check teacher.omit_params and teacher.token_limit_param"
        )
    return Usage(prompt_tokens=prompt_bound(body), completion_tokens=bound)


@dataclass(slots=True)
class _Purse:
    """What the endpoints of a run spend together."""

    spent: Amount = Amount()
    reserved: Amount = Amount()
    under_way: Amount = Amount()
    is_counted: bool = False
    """Whether the history is in it."""
    prices: list[PriceConfig | None] = field(default_factory=list)
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Budget:
    """What one run may still spend, over all its starts, as one of its endpoints sees it."""

    def __init__(self, caps: BudgetConfig, price: PriceConfig | None, *, purse: _Purse | None = None) -> None:
        """Raises:
        ConfigError: a cap in dollars, and nobody knows the price.
        """
        if caps.max_usd is not None and price is None:
            raise ConfigError(
                "budget.max_usd: the price of this model is not known; set teacher.price: {input: .., output: ..} "
                "in dollars per million tokens, or cap tokens or requests"
            )
        self.caps, self.price, self._purse = caps, price, purse or _Purse()
        self._purse.prices.append(price)

    def beside(self, price: PriceConfig | None) -> Budget:
        """That of another endpoint of the run, under the same caps: what either spends is spent for both.

        Raises:
            ConfigError: as the constructor.
        """
        return Budget(self.caps, price, purse=self._purse)

    @property
    def spent(self) -> Amount:
        """Of all endpoints."""
        return self._purse.spent

    @property
    def reserved(self) -> Amount:
        """The worst case of what is in flight."""
        return self._purse.reserved

    @property
    def under_way(self) -> Amount:
        """The worst case of what is in batches."""
        return self._purse.under_way

    @property
    def is_counted(self) -> bool:
        """Whether what earlier starts were billed is known."""
        return self._purse.is_counted

    def amount(self, usage: Usage) -> Amount:
        """Of one call."""
        usd = self.price.cost(usage) if self.price else 0.0
        return Amount(usd, usage.prompt_tokens + usage.completion_tokens, 1)

    def count_history(self, billed: Billed) -> None:
        """What this run was billed in earlier starts.

        Raises:
            ConfigError: see `worst_case`.
        """
        self._purse.under_way, self._purse.is_counted = Amount(), True
        unpriced = self._at_most(billed.unpriced)
        self._purse.spent = Amount(billed.cost_usd + unpriced.usd, billed.tokens, billed.calls)
        for body in billed.uncertain:
            self._purse.spent += self._at_most(worst_case(body))

    def _at_most(self, usage: Usage) -> Amount:
        """Of a call to whichever endpoint of the run: at the highest price."""
        usd = max(price.cost(usage) if price else 0.0 for price in self._purse.prices)
        return Amount(usd, usage.prompt_tokens + usage.completion_tokens, 1)

    async def reserve(self, body: dict[str, Any], stopped: Callable[[], bool]) -> Amount:
        """Set the worst case of a call aside, as soon as what is in flight leaves room for it.

        Raises:
            BudgetExhausted: nothing is in flight, and it still does not fit.
            ConfigError: see `worst_case`.
            Stopped: `stopped()` is true.
        """
        if not self.caps.any:
            return Amount()
        worst = self.amount(worst_case(body))
        while not stopped() and (over := self._over(self.spent + self.under_way + self.reserved + worst)):
            if not self.reserved.requests:
                raise self._exhausted(over)
            self._purse.settled.clear()
            await self._purse.settled.wait()
        if stopped():
            raise Stopped
        self._purse.reserved += worst
        return worst

    def commit(self, body: dict[str, Any]) -> None:
        """A question is in a batch already: its worst case counts until the history is counted again."""
        self._purse.under_way += self._in_batch(body)

    def _in_batch(self, body: dict[str, Any]) -> Amount:
        worst = self.amount(worst_case(body))
        return Amount(worst.usd * (self.price.batch_factor if self.price else 1.0), worst.tokens, worst.requests)

    def take(self, body: dict[str, Any]) -> None:
        """As `commit`, for a question that is to be put into one.

        Raises:
            BudgetExhausted: it does not fit.
            ConfigError: see `worst_case`.
        """
        if not self.caps.any:
            return
        worst = self._in_batch(body)
        if over := self._over(self.spent + self.under_way + self.reserved + worst):
            raise self._exhausted(over)
        self._purse.under_way += worst

    def _exhausted(self, over: str) -> BudgetExhausted:
        return BudgetExhausted(f"stopped at the budget: {over} ({self.line()}); a higher cap goes on from here")

    def free(self, reserved: Amount) -> None:
        """The call did not leave."""
        self._purse.reserved -= reserved
        self.wake()

    def settle(self, reserved: Amount, attempt: Attempt) -> None:
        """The call is back: what it cost is spent, the rest is free again."""
        self._purse.spent += self._billed(attempt, reserved)
        self.free(reserved)

    def wake(self) -> None:
        """Let those who wait for room look again."""
        self._purse.settled.set()

    def _billed(self, attempt: Attempt, worst: Amount) -> Amount:
        if attempt.billed is False:
            return Amount()
        return worst if attempt.billed is None or attempt.usage == Usage() else self.amount(attempt.usage)

    def _over(self, total: Amount) -> str:
        """Which cap this much would pass."""
        for name, value in (("usd", total.usd), ("tokens", total.tokens), ("requests", total.requests)):
            cap = getattr(self.caps, f"max_{name}")
            if cap is not None and value > cap + 1e-9:
                return f"the next call could take {name} to {value:.6g}, max_{name} is {cap:.6g}"
        return ""

    def line(self) -> str:
        """Spent + reserved of each cap, for a person; nothing where nothing is capped."""
        parts = []
        for name, form in (("usd", ".4f"), ("tokens", "d"), ("requests", "d")):
            if (cap := getattr(self.caps, f"max_{name}")) is not None:
                spent, reserved = getattr(self.spent, name), getattr(self.reserved + self.under_way, name)
                parts.append(f"{name} {spent:{form}} + {reserved:{form}} of {cap:g}")
        return ", ".join(parts)
