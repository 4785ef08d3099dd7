"""Requests, answers and journal records by hand, and another process that holds a corpus file open."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blackbox_kd.corpus.journal import Answered, Sent
from blackbox_kd.hashing import content_id
from blackbox_kd.types import Attempt, Completion, Prompt, Request, TokenLogprob, TopLogprob, Usage
from tests.conftest import RUN_ID

CONTEXT = content_id("the private prompt")


def prompt(text: str = "Hi", **changes: Any) -> Prompt:
    return Prompt(**{"messages": [{"role": "user", "content": text}], "split": "train", "source": "test", **changes})


def request(to: Prompt | None = None, **changes: Any) -> Request:
    to = to or prompt()
    body = {"model": "m", "messages": to.messages, "temperature": 1.0} | changes.pop("body", {})
    given = {"purpose": "sample", "prompt_id": to.prompt_id, "body": body, "context_hash": CONTEXT}
    return Request(**{**given, **changes})


def completion(to: Request | None = None, **changes: Any) -> Completion:
    to = to or request()
    given = {"request_key": to.request_key, "prompt_id": to.prompt_id, "author": "teacher", "model": to.model,
             "text": "Servus", "finish_reason": "stop"}  # fmt: skip
    return Completion(**{**given, **changes})


def attempt(to: Request | None = None, **changes: Any) -> Attempt:
    to = to or request()
    given = {"attempt_id": str(uuid.uuid4()), "request_key": to.request_key, "run_id": RUN_ID,
             "attempted_at": 1.7e9, "status": 200, "billed": True}  # fmt: skip
    return Attempt(**{**given, **changes})


def answered(*completions: Completion, scorer: str = f"m@{CONTEXT}", **changes: Any) -> Answered:
    """One call that brought these answers."""
    given = completions or (completion(),)
    made = attempt(request_key=given[0].request_key, **changes)
    return Answered(attempt=made, completions=list(given), scorer=scorer)


def sent(to: Attempt) -> Sent:
    return Sent(attempt_id=to.attempt_id, request_key=to.request_key, run_id=to.run_id, attempted_at=to.attempted_at)


def token(text: str, logprob: float, *top: tuple[str, float], **changes: Any) -> TokenLogprob:
    """A sampled token with the alternatives beside it, all of them with their bytes."""
    shown = [TopLogprob(token=t, logprob=value, bytes=list(t.encode())) for t, value in top]
    given = {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": shown}
    return TokenLogprob(**{**given, **changes})


def usage(prompt_tokens: int, completion_tokens: int, cached: int = 0, reasoning: int = 0) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cached_tokens=cached,
        reasoning_tokens=reasoning,
    )


_HOLD = "import sys, duckdb; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.readline()"


@contextmanager
def held_open(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the DuckDB file open; it lets go at the end of the block, or after `let_go`."""
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            let_go(other)


def let_go(other: subprocess.Popen[str]) -> None:
    if other.poll() is None and other.stdin and not other.stdin.closed:
        other.stdin.close()
        other.wait(timeout=30)


def eventually(true: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
