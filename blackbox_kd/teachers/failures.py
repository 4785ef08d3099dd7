"""What a reply that is no answer means: ask again, wait, bury the request, or stop."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from blackbox_kd.errors import RateLimited, RequestRejected, TeacherError, TeacherRefused, TransientError

QUOTA_CODES = (
    "insufficient_quota",
    "billing_hard_limit_reached",
    "insufficient_credits",
    "credit_balance_too_low",
)
"""429s (or 402s) that no waiting cures."""
GAVE_UP = (408, 504, 524)
"""A gateway waited no longer, and the model may have gone on: nobody knows whether it is billed."""
UNREADABLE = (ValueError, RecursionError)
"""What decoders raise: no JSON, no UTF-8, the wrong shape, or too deep."""
DETAIL_CHARS = 4000
"""Of a reply that cannot be read."""
REPLY = "; the reply: "
"""Stands before it."""
_NUMBERS = re.compile(r"Limit:? (?P<limit>\d+)\b.{,40}?\bRequested:? (?P<requested>\d+)\b")
"""Of tokens. https://platform.openai.com/docs/guides/rate-limits"""


def error_of(status: int, data: bytes, headers: Mapping[str, str]) -> TeacherError:
    """The exception for a reply that is no answer."""
    error = _classify(status, data, headers)
    error.headers, error.server_request_id = headers, headers.get("x-request-id")
    return error


def unreadable(message: str, data: bytes) -> TransientError:
    """The exception for a 200 with nothing in it. Its body may have been paid for: it is kept with the attempt."""
    error = TransientError(message, status=200)
    error.detail = f"{REPLY}{data.decode('utf-8', 'replace')}"
    return error


def kept(error: TeacherError) -> str:
    """What an attempt keeps of it."""
    return f"{error}{error.detail[:DETAIL_CHARS]}"


def _classify(status: int, data: bytes, headers: Mapping[str, str]) -> TeacherError:
    said, codes = _error_text(data)
    message = f"HTTP {status}: {said}"
    if status in (401, 402, 403) or not codes.isdisjoint(QUOTA_CODES):
        return TeacherRefused(f"the teacher refuses for good, {message}", status=status)
    if status == 429 and not _too_large(said):
        return RateLimited(message, status=status, retry_after_s=retry_after(headers))
    if status in (408, 409, 425) or status >= 500:
        return TransientError(message, status=status, retry_after_s=retry_after(headers))
    return RequestRejected(message, status=status)


def _too_large(said: str) -> bool:
    """Whether a 429 asks for more than the whole limit: no waiting makes room for it."""
    if numbers := _NUMBERS.search(said):
        return int(numbers["requested"]) > int(numbers["limit"])
    return said.lower().startswith("request too large")


def _error_text(data: bytes) -> tuple[str, set[str]]:
    """What the body says, in whichever of the shapes that servers use (about 300 characters), and its codes."""
    try:
        return _said(msgspec.json.decode(data))
    except UNREADABLE:
        return _said(data.decode("utf-8", "replace"))


def _said(value: Any) -> tuple[str, set[str]]:
    codes: list[str] = []
    if isinstance(value, dict):
        value = value.get("error") or value.get("detail") or value.get("message") or value
    if isinstance(value, dict) and "message" in value:
        codes = [str(value[key]) for key in ("code", "type") if value.get(key)]
        value = value["message"]
    text = " ".join(str(value).split())[:300]
    return (f"{text} ({codes[0]})" if codes else text), {text, *codes}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or an HTTP date, RFC 9110 10.2.3)."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
