"""The chat-completions wire: bodies out, replies in. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

import email.utils
import math
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
    tool_calls: list[Any] | None = None


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
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] | None = None
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
        raise _unreadable(f"a 200 that cannot be read ({error}): {data[:80]!r}", data) from error
    if not reply.choices:
        if reply.error is not None:
            code = reply.error.get("code") if isinstance(reply.error, dict) else None
            status = int(str(code)) if str(code).isdecimal() else 0
            raise error_of(status if status >= 400 else 500, data, {})
        raise _unreadable(f"a 200 without choices: {data[:80]!r}", data)
    usage = _usage(reply.usage)
    indexes = {choice.index for choice in reply.choices}  # some servers call every choice 0
    completions = [
        Completion(
            request_key=request.request_key,
            prompt_id=request.prompt_id,
            author=author,
            model=request.model,
            round=round_,
            text=_text(choice.message),
            reasoning=choice.message.reasoning_content or choice.message.reasoning,
            finish_reason="refusal" if refused(choice.message) else choice.finish_reason or "unknown",
            choice_idx=choice.index if len(indexes) == len(reply.choices) else position,
            served_model=reply.model,
            system_fingerprint=reply.system_fingerprint,
            usage=usage if position == 0 else Usage(),
            logprobs=(choice.logprobs.content if choice.logprobs else None) or None,
        )
        for position, choice in enumerate(reply.choices)
    ]
    return completions, usage


def usage_of(data: bytes) -> Usage:
    """What a 200 says that it cost; nothing where it cannot be read."""
    try:
        return _usage(_decoder.decode(data).usage)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Usage()


def _unreadable(message: str, data: bytes) -> TransientError:
    """Its body may have been paid for: it is kept with the attempt."""
    error = TransientError(message, status=200)
    error.detail = f"; the reply: {data.decode('utf-8', 'replace')}"
    return error


def _text(message: _Message) -> str:
    """Content, else a refusal; calls of tools stand behind it as JSON."""
    text = message.content or message.refusal or ""
    if not message.tool_calls:
        return text
    calls = msgspec.json.encode({"tool_calls": message.tool_calls}).decode()
    return f"{text}\n{calls}" if text else calls


def refused(message: _Message) -> bool:
    """Whether the model declined, in the field that some APIs have for it; such a text must not be learnt."""
    return bool(message.refusal) and not message.content


def _usage(usage: _Usage | None) -> Usage:
    if usage is None:
        return Usage()
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=(prompt.cached_tokens if prompt else None) or 0,
        reasoning_tokens=(completion.reasoning_tokens if completion else None) or 0,
    )


def error_of(status: int, data: bytes, headers: Mapping[str, str]) -> TeacherError:
    """The exception for a reply that is no answer."""
    error = _classify(status, data, headers)
    error.headers, error.server_request_id = headers, headers.get("x-request-id")
    return error


def _classify(status: int, data: bytes, headers: Mapping[str, str]) -> TeacherError:
    said, codes = _error_text(data)
    message = f"HTTP {status}: {said}"
    if status in (401, 402, 403) or not codes.isdisjoint(QUOTA_CODES):
        return TeacherRefused(f"the teacher refuses for good, {message}", status=status)
    if status == 429:
        return RateLimited(message, status=status, retry_after_s=retry_after(headers))
    if status in (408, 409, 425) or status >= 500:
        return TransientError(message, status=status, retry_after_s=retry_after(headers))
    return RequestRejected(message, status=status)


def _error_text(data: bytes) -> tuple[str, set[str]]:
    """What the body says, in whichever of the shapes that servers use (about 300 characters), and its codes."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = data.decode("utf-8", "replace")
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
