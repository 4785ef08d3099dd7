"""The chat-completions wire: bodies out, replies in. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from blackbox_kd.errors import RateLimited, RequestRejected, TeacherError, TeacherRefused, TransientError
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.types import Author, Completion, Message, Request, SamplingParams, TokenLogprob, Usage

QUOTA_CODES = (
    "insufficient_quota",
    "billing_hard_limit_reached",
    "insufficient_credits",
    "credit_balance_too_low",
)
"""429s (or 402s) that no waiting cures."""


def chat_body(
    config: TeacherConfig, messages: list[Message], sampling: SamplingParams, sample_idx: int
) -> dict[str, Any]:
    """The JSON of one question."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        config.token_limit_param: sampling.max_completion_length,
    }
    if sampling.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    if config.seed is not None:
        body["seed"] = config.seed + sample_idx
    if config.reasoning_effort is not None:
        body["reasoning_effort"] = config.reasoning_effort
    body |= config.extra_body
    return {key: value for key, value in body.items() if key not in config.omit_params}


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class _Logprobs(msgspec.Struct):
    content: list[TokenLogprob] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    index: int = 0
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] = []
    model: str | None = None
    system_fingerprint: str | None = None
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Reply)


def decode_reply(data: bytes, request: Request, author: Author, round_: int) -> tuple[list[Completion], Usage]:
    """The answers in the body of a 200 reply; usage stands on the first of them.

    Raises:
        TransientError: no JSON, the wrong shape, or no choice in it.
        TeacherError: an error inside a 200.
    """
    try:
        reply = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransientError(f"a 200 that cannot be read ({error}): {data[:80]!r}", status=200) from error
    if not reply.choices:
        if reply.error is not None:
            code = reply.error.get("code") if isinstance(reply.error, dict) else None
            raise error_of(code if isinstance(code, int) and code >= 400 else 500, data, {})
        raise TransientError(f"a 200 without choices: {data[:80]!r}", status=200)
    usage = _usage(reply.usage)
    completions = [
        Completion(
            request_key=request.request_key,
            prompt_id=request.prompt_id,
            author=author,
            model=request.model,
            round=round_,
            text=choice.message.content or choice.message.refusal or "",
            reasoning=choice.message.reasoning_content or choice.message.reasoning,
            finish_reason=choice.finish_reason or "unknown",
            choice_idx=choice.index,
            served_model=reply.model,
            system_fingerprint=reply.system_fingerprint,
            usage=usage if position == 0 else Usage(),
            logprobs=(choice.logprobs.content if choice.logprobs else None) or None,
        )
        for position, choice in enumerate(reply.choices)
    ]
    return completions, usage


def _usage(usage: _Usage | None) -> Usage:
    if usage is None:
        return Usage()
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=(prompt.cached_tokens if prompt else None) or 0,
        reasoning_tokens=(completion.reasoning_tokens if completion else None) or 0,
    )


def error_of(status: int, data: bytes, headers: Mapping[str, str]) -> TeacherError:
    """The exception for a reply that is no answer."""
    message = f"HTTP {status}: {_error_text(data)}"
    if status in (401, 403) or any(code in message for code in QUOTA_CODES) or status == 402:
        return TeacherRefused(f"the teacher refuses for good, {message}", status=status)
    if status == 429:
        return RateLimited(message, status=status, retry_after_s=retry_after(headers))
    if status in (408, 409, 425) or status >= 500:
        return TransientError(message, status=status, retry_after_s=retry_after(headers))
    return RequestRejected(message, status=status)


def _error_text(data: bytes) -> str:
    """What the body says, in whichever of the shapes that servers use; at most 300 characters."""
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return " ".join(data.decode("utf-8", "replace").split())[:300]
    if isinstance(value, dict):
        value = value.get("error", value.get("detail", value.get("message", value)))
    if isinstance(value, dict) and "message" in value:
        code = value.get("code") or value.get("type")
        value = f"{value['message']} ({code})" if code else value["message"]
    return " ".join(str(value).split())[:300]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or an HTTP date, RFC 9110 10.2.3)."""
    if milliseconds := headers.get("retry-after-ms"):
        try:
            return max(0.0, float(milliseconds) / 1000)
        except ValueError:
            pass
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
