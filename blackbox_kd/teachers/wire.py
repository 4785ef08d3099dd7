"""The chat-completions wire: bodies out, replies in. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from blackbox_kd.errors import RateLimited, RequestRejected, TeacherError, TeacherRefused, TransientError
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.types import Author, Completion, Message, Request, SamplingParams, TokenLogprob, TopLogprob, Usage

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


Token = TypeVar("Token")


class _LeanTop(TopLogprob, frozen=True, kw_only=True, omit_defaults=True, gc=False, rename={"bytes": "-"}):
    """Reads all but the bytes: no reply has its key."""

    bytes: list[int] | None = None


class _LeanToken(TokenLogprob, frozen=True, kw_only=True, omit_defaults=True, gc=False, rename={"bytes": "-"}):
    bytes: list[int] | None = None
    top_logprobs: list[_LeanTop] = []  # type: ignore[assignment]


class _BytesTop(msgspec.Struct, gc=False):
    """Reads nothing but the bytes, and those not yet as a list."""

    bytes: msgspec.Raw = msgspec.Raw(b"null")


class _BytesToken(_BytesTop, gc=False):
    top_logprobs: list[_BytesTop] = []


class _Logprobs(msgspec.Struct, Generic[Token]):
    content: list[Token] | None = None


class _Choice(msgspec.Struct, Generic[Token]):
    message: _Message
    index: int = 0
    finish_reason: str | None = None
    logprobs: _Logprobs[Token] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Reply(msgspec.Struct, Generic[Token]):
    choices: list[_Choice[Token]] | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    usage: _Usage | None = None
    error: Any = None


_whole = msgspec.json.Decoder(_Reply[TokenLogprob])
_lean = msgspec.json.Decoder(_Reply[_LeanToken])
_bytes = msgspec.json.Decoder(_Reply[_BytesToken])

CHECKED_REPLIES = 8
"""Replies whose token bytes must be those of the text before they are taken to be so ever after."""
_CUT = (b"\xef\xbf\xbd", b"\\ufffd", b"\\uFFFD", b"\\\\x")
"""What a reply has in it if `is_cut` is true of one of its tokens."""


def is_cut(text: str) -> bool:
    """Whether a token may end inside a character: it shows U+FFFD, or a byte spelt out as `\\xe2`."""
    return "\ufffd" in text or "\\x" in text


class Decoder:
    """Reads the replies of one endpoint, of each only what is stored.

    The bytes of tokens take most of the time, and nearly always they are those of the text. Once they were so in a few
    replies they are left out (`Completion.text_bytes`), except for tokens that may not be a whole text.
    """

    def __init__(self) -> None:
        self._checked = 0
        self._as_text = True

    def decode(self, data: bytes, request: Request, author: Author, round_: int) -> tuple[list[Completion], Usage]:
        """The answers in the body of a 200 reply; usage stands on the first of them.

        Raises:
            TransientError: no JSON, the wrong shape, or no choice in it.
            TeacherError: an error inside a 200.
        """
        lean = self._as_text and self._checked >= CHECKED_REPLIES
        try:
            reply = self._read(data, lean)
        except ValueError as error:  # no JSON, no UTF-8, the wrong shape, bytes that are none
            raise _unreadable(f"a 200 that cannot be read ({error}): {data[:80]!r}", data) from error
        if not reply.choices:
            raise _no_choices(reply, data)
        return _completions(reply, reply.choices, request, author, round_, text_bytes=lean), _usage(reply.usage)

    def _read(self, data: bytes, lean: bool) -> _Reply[Any]:
        reply: _Reply[Any] = (_lean if lean else _whole).decode(data)
        if lean and any(mark in data for mark in _CUT):
            _add_bytes(reply.choices or [], _bytes.decode(data).choices or [])
        elif not lean and self._as_text:
            self._check(reply.choices or [])
        return reply

    def _check(self, choices: list[_Choice[TokenLogprob]]) -> None:
        shown = [top for choice in choices for token in _content(choice) for top in (token, *token.top_logprobs)]
        self._checked += bool(shown)
        self._as_text = all(
            top.bytes is not None and bytes(top.bytes) == top.token.encode() for top in shown if not is_cut(top.token)
        )


def _content(choice: _Choice[Token]) -> list[Token]:
    return (choice.logprobs.content if choice.logprobs else None) or []


def _add_bytes(choices: list[_Choice[Any]], with_bytes: list[_Choice[_BytesToken]]) -> None:
    """Put the bytes of those tokens back that may not be a whole text."""
    for choice, other in zip(choices, with_bytes, strict=True):
        tokens = _content(choice)
        for i, (token, raw) in enumerate(zip(tokens, _content(other), strict=True)):
            for j, (top, raw_top) in enumerate(zip(token.top_logprobs, raw.top_logprobs, strict=True)):
                if is_cut(top.token):
                    token.top_logprobs[j] = TopLogprob(
                        token=top.token, logprob=top.logprob, id=top.id, bytes=_read_bytes(raw_top)
                    )
            if is_cut(token.token):
                tokens[i] = TokenLogprob(
                    token=token.token,
                    logprob=token.logprob,
                    id=token.id,
                    bytes=_read_bytes(raw),
                    top_logprobs=token.top_logprobs,
                )


def _read_bytes(token: _BytesTop) -> list[int] | None:
    return msgspec.json.decode(token.bytes, type=list[int] | None)


def _no_choices(reply: _Reply[Any], data: bytes) -> TeacherError:
    if reply.error is None:
        return _unreadable(f"a 200 without choices: {data[:80]!r}", data)
    code = reply.error.get("code") if isinstance(reply.error, dict) else None
    status = int(str(code)) if str(code).isdecimal() else 0
    return error_of(status if status >= 400 else 500, data, {})


def _completions(
    reply: _Reply[Any],
    choices: list[_Choice[Any]],
    request: Request,
    author: Author,
    round_: int,
    *,
    text_bytes: bool,
) -> list[Completion]:
    indexes = {choice.index for choice in choices}  # some servers call every choice 0
    return [
        Completion(
            request_key=request.request_key,
            prompt_id=request.prompt_id,
            author=author,
            model=request.model,
            round=round_,
            text=_text(choice.message),
            reasoning=choice.message.reasoning_content or choice.message.reasoning,
            finish_reason="refusal" if refused(choice.message) else choice.finish_reason or "unknown",
            choice_idx=choice.index if len(indexes) == len(choices) else position,
            served_model=reply.model,
            system_fingerprint=reply.system_fingerprint,
            usage=_usage(reply.usage) if position == 0 else Usage(),
            logprobs=_content(choice) or None,
            text_bytes=text_bytes,
        )
        for position, choice in enumerate(choices)
    ]


def usage_of(data: bytes) -> Usage:
    """What a 200 says that it cost; nothing where it cannot be read."""
    try:
        return _usage(_lean.decode(data).usage)
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
