"""One HTTP call and its retries: room in the budget, leave from the limiter, and a journal record before and after."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tenacity

from blackbox_kd.corpus.journal import Answered, Sent
from blackbox_kd.corpus.writer import Writer
from blackbox_kd.errors import (
    CorpusError,
    RateLimited,
    RequestRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnreachable,
    TransientError,
)
from blackbox_kd.progress import say
from blackbox_kd.teachers.base import Call, Reply, Taken, TeacherConfig, Transport
from blackbox_kd.teachers.budget import Budget, completion_bound, prompt_bound
from blackbox_kd.teachers.failures import GAVE_UP, kept
from blackbox_kd.teachers.limiter import Limiter, Permit
from blackbox_kd.teachers.work import Work
from blackbox_kd.types import Attempt, Completion, Request, Usage, scorer

Read = Callable[[Reply], Taken]
"""It may raise a TeacherError."""

PATHS = {"chat": "chat/completions", "completions": "completions", "native": "/generate"}
SAY_WAIT_S = 5.0
"""A pause at the gate that a person should know of."""
MOST_UNREADABLE = 2
"""Replies to one question."""
MOST_PASSED_OVER = 4
"""429s to one question, others being answered between them; with more it is the question: it slows down, and ends."""
MAYBE_BILLED = (None, 200, *GAVE_UP)
"""Statuses of calls that nobody knows the price of: no answer, or none that can be read."""


@dataclass(frozen=True, slots=True)
class _Asking:
    """What a call is about."""

    request: Request
    call: Call
    work: Work
    writer: Writer
    read: Read
    bury: bool
    max_retries: int


@dataclass(slots=True)
class _Done:
    """What came of it."""

    reply: Reply = field(default_factory=lambda: Reply(b""))
    taken: Taken = field(default_factory=Taken)
    failure: BaseException | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
    """Fields of its `Attempt`."""


class Caller:
    """Everything between a request and its outcome; one for each engine."""

    def __init__(self, config: TeacherConfig, run_id: str, budget: Budget) -> None:
        self._config, self._run_id, self._budget = config, run_id, budget
        self.limiter = Limiter(config.concurrency, config.give_up_s)
        self.transport: Transport | None = None
        self.answered = 0
        self.last_error = ""
        self._share = 0.5  # of the worst case, in tokens, that calls really took

    def wake(self) -> None:
        """Those who wait for their turn look again whether they still should."""
        self.limiter.wake()
        self._budget.wake()

    async def call(
        self,
        request: Request,
        work: Work,
        writer: Writer,
        read: Read,
        *,
        call: Call | None = None,
        bury: bool = True,
        max_retries: int | None = None,
    ) -> list[Completion]:
        """One request until it is answered, rejected (a dead letter, if `bury`), or has failed too often.

        `call` is what is sent for it, where that is not its own body.
        """
        retries = self._config.max_retries if max_retries is None else max_retries
        asking = _Asking(request, call or Call(request.body, request.endpoint), work, writer, read, bury, retries)
        try:
            return await self._call_once(asking)
        except (TransientError, RateLimited) as error:
            return await self._call_again(asking, error)

    async def _call_again(self, asking: _Asking, first: TeacherError) -> list[Completion]:
        """After a failure: tenacity costs as much as a tenth of a call, and most calls need it not."""
        failures: list[TeacherError] = [first]
        patience = _Patience(self, asking.max_retries, self._config.give_up_s)

        async def attempt() -> list[Completion]:
            if failures:
                raise failures.pop()
            return await self._call_once(asking)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((TransientError, RateLimited)),
            stop=patience.is_over,
            wait=patience.wait_s,
            sleep=asking.work.sleep,
            reraise=True,
        )
        return await retrying(attempt)

    async def _call_once(self, asking: _Asking) -> list[Completion]:
        body, stopped = asking.call.body, asking.work.is_stopped
        reserved = await self._budget.reserve(body, stopped)
        bound = prompt_bound(body) + completion_bound(body) if self.limiter.tokens.rate else 0
        try:
            permit = await self.limiter.admit(bound * self._share, stopped)
        except BaseException:
            self._budget.free(reserved)
            raise
        call: dict[str, Any] = {
            "attempt_id": str(uuid.uuid4()),
            "request_key": asking.request.request_key,
            "run_id": self._run_id,
            "attempted_at": time.time(),
        }
        clock = time.monotonic()
        done = await self._send(call, asking)
        attempt = Attempt(**call, latency_s=time.monotonic() - clock, **done.outcome)
        self._budget.settle(reserved, attempt)
        try:
            self._learn(permit, bound, attempt, done)
        finally:  # whatever is to be raised, this call is kept
            self._keep(asking, attempt, done)
        if done.failure is not None:
            raise self._misdirected(done.failure) if asking.bury and self._is_misdirected(done) else done.failure
        self.answered += 1
        return done.taken.completions

    async def _send(self, call: dict[str, Any], asking: _Asking) -> _Done:
        """The call itself; what goes wrong is part of the result."""
        assert self.transport is not None
        done = _Done()
        try:
            asking.writer.submit(Sent(**call))
            done.reply = await self.transport.send(asking.call.body, PATHS[asking.call.endpoint])
            done.outcome = {"status": 200, "billed": True, "server_request_id": done.reply.server_request_id}
            done.taken = asking.read(done.reply)
            done.outcome |= {"usage": done.taken.usage, "cost_usd": self._cost(done.taken.usage)}
        except BaseException as error:
            done.failure = error
            done.outcome |= _failed(error)
        return done

    def _keep(self, asking: _Asking, attempt: Attempt, done: _Done) -> None:
        dead = asking.bury and isinstance(done.failure, RequestRejected) and not self._is_misdirected(done)
        completions, _, scores = done.taken
        policy = completions[0].policy if completions else None
        by = scorer(asking.request.model, policy or asking.request.context_hash)
        answered = Answered(attempt=attempt, completions=completions, scorer=by, scores=scores, dead_letter=dead)
        asking.writer.submit(answered)

    def _is_misdirected(self, done: _Done) -> bool:
        return isinstance(done.failure, TeacherError) and done.failure.status in (404, 405) and not self.answered

    def _misdirected(self, failure: BaseException) -> TeacherRefused:
        """A wrong address or model; else every request would become a dead letter."""
        return TeacherRefused(f"the first answer is {failure}; check teacher.base_url and teacher.model", status=404)

    def _cost(self, usage: Usage) -> float | None:
        """None where the price is not known, or the reply does not say how much was used."""
        return self._budget.price.cost(usage) if self._budget.price and usage != Usage() else None

    def _learn(self, permit: Permit, bound: int, attempt: Attempt, done: _Done) -> None:
        """What this call says about how fast the endpoint may be asked.

        Raises:
            TeacherUnreachable: nothing has got through for too long.
        """
        used = attempt.usage.prompt_tokens + attempt.usage.completion_tokens
        failure = done.failure
        if failure is None:
            if used and bound:
                self._share += 0.1 * (used / bound - self._share)
            self.limiter.succeeded(permit, used, done.reply.headers)
            return
        self.last_error = str(failure)
        if isinstance(failure, RateLimited):
            before = self.limiter.pause_s
            self.limiter.limited(permit, failure)
            if self.limiter.pause_s > max(SAY_WAIT_S, before + SAY_WAIT_S):
                say(f"rate limit: the teacher wants a pause of {self.limiter.pause_s:.0f} s")
        elif isinstance(failure, RequestRejected):  # it answers, and at once
            self.limiter.succeeded(permit, 0, failure.headers)
        else:
            self.limiter.failed(permit, isinstance(failure, TransientError))
            if isinstance(failure, TransientError) and (failure.retry_after_s or 0) > self._config.give_up_s:
                raise TeacherUnreachable(f"the teacher is away for longer than teacher.give_up_s: {failure}")


class _Patience:
    """How often one question is asked again, and after which wait."""

    def __init__(self, caller: Caller, max_retries: int, give_up_s: float) -> None:
        self._caller, self._max_retries, self._give_up_s = caller, max_retries, give_up_s
        self._longest_s = give_up_s / 10  # from one asking to the next
        self._since = time.monotonic()
        self._answered = caller.answered  # at its last 429
        self._transient = self._unreadable = self._passed_over = 0

    def is_over(self, state: tenacity.RetryCallState) -> bool:
        """Count the failure; whether it was one too many."""
        error = _error_of(state)
        if isinstance(error, RateLimited):
            self._passed_over += self._caller.answered > self._answered
            self._answered = self._caller.answered
            return self._is_alone and time.monotonic() - self._since + self._longest_s > self._give_up_s
        self._transient += 1
        self._unreadable += isinstance(error, TransientError) and error.status == 200  # and may have been paid for
        return self._transient > self._max_retries or self._unreadable > MOST_UNREADABLE

    def wait_s(self, state: tenacity.RetryCallState) -> float:
        """Backoff with full jitter; after a 429 the limiter holds everybody."""
        error = _error_of(state)
        if isinstance(error, RateLimited):
            return random.uniform(0, self._longest_s) if self._is_alone else 0.0
        backoff = tenacity.wait_random_exponential(multiplier=0.25, max=20)(state)
        return max(backoff, getattr(error, "retry_after_s", None) or 0.0)

    @property
    def _is_alone(self) -> bool:
        return self._passed_over > MOST_PASSED_OVER


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _failed(error: BaseException) -> dict[str, Any]:
    """An attempt without an answer."""
    if isinstance(error, CorpusError):  # the journal could not be written, and so it did not leave
        return {"error": str(error), "billed": False}
    if not isinstance(error, TeacherError):
        return {"error": f"interrupted: {type(error).__name__}"}
    found = {"billed": None if error.status in MAYBE_BILLED else False, "status": error.status,
             "error": kept(error), "retry_after_s": error.retry_after_s}  # fmt: skip
    return found | ({"server_request_id": error.server_request_id} if error.server_request_id else {})
