"""The chat-completions wire: bodies out, replies in. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

from blackbox_kd.errors import TeacherError
from blackbox_kd.hashing import draw_seed
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.teachers.failures import UNREADABLE, error_of, unreadable
from blackbox_kd.teachers.scores import array_tokens
from blackbox_kd.types import Author, Completion, Message, Request, SamplingParams, TokenLogprob, TopLogprob, Usage


def chat_body(
    config: TeacherConfig,
    messages: list[Message],
    sampling: SamplingParams,
    sample_idx: int,
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON of one question; `parameters` are those that only some questions have."""
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
        body["seed"] = draw_seed(config.seed, messages, sample_idx)
    if config.reasoning_effort is not None:
        body["reasoning_effort"] = config.reasoning_effort
    body |= {**(parameters or {}), **config.extra_body}
    return {key: value for key, value in body.items() if key not in config.omit_params}


def native_body(config: TeacherConfig, text: str, top: int) -> dict[str, Any]:
    """Ask SGLang for the logprobs of a raw text, with `top` alternatives a token.

    https://docs.sglang.ai/basic_usage/native_api.html
    """
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top, "return_text_in_logprobs": True}
    sampling = {"max_new_tokens": 1, "temperature": 1.0}
    return {"model": config.model, "text": text, "sampling_params": sampling, **wanted, **config.extra_body}


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None


Token = TypeVar("Token")
Shown = TypeVar("Shown")


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


_bytes = msgspec.json.Decoder(_BytesToken)
_byte_list: msgspec.json.Decoder[list[int] | None] = msgspec.json.Decoder(list[int] | None)


class _Logprobs(msgspec.Struct, Generic[Token]):
    """`content`, or Together's parallel arrays."""

    content: list[Token] | None = None
    tokens: Any = None
    token_ids: Any = None
    token_logprobs: Any = None
    top_logprobs: Any = None


class _Choice(msgspec.Struct, Generic[Shown]):
    message: _Message
    index: int = 0
    finish_reason: str | None = None
    logprobs: Shown | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Reply(msgspec.Struct, Generic[Shown]):
    choices: list[_Choice[Shown]] | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    usage: _Usage | None = None
    error: Any = None


class _Billed(msgspec.Struct):
    """Of a reply of any endpoint."""

    usage: _Usage | None = None
    meta_info: _Usage | None = None
    """SGLang's own."""


_whole = msgspec.json.Decoder(_Reply[_Logprobs[TokenLogprob]])
_lean = msgspec.json.Decoder(_Reply[_Logprobs[_LeanToken]])
_billed = msgspec.json.Decoder(_Billed)
_places = msgspec.json.Decoder(_Reply[_Logprobs[msgspec.Raw]])
"""Each token with its alternatives unread: half the time of reading them."""
_bare = msgspec.json.Decoder(_Reply[Any])
"""Whatever stands where logprobs should."""

CHECKED_REPLIES = 8
"""Replies whose token bytes must be those of the text before they are taken to be so ever after."""


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
        self.odd = ""
        """Why the logprobs of a reply, the first of this kind, could not be read."""

    def decode(self, data: bytes, request: Request, author: Author, round_: int) -> tuple[list[Completion], Usage]:
        """The answers in the body of a 200 reply; usage stands on the first of them.

        Odd logprobs cost no text: what of them cannot be read is left out.

        Raises:
            TransientError: no JSON, the wrong shape, or no choice in it.
            TeacherError: an error inside a 200.
        """
        lean = self._as_text and self._checked >= CHECKED_REPLIES
        try:
            reply = self._read(data, lean)
        except UNREADABLE as error:  # no JSON, no UTF-8, the wrong shape, bytes that are none
            reply, lean = self._salvage(data, error), False
        if not reply.choices:
            raise _no_choices(reply, data)
        return _completions(reply, reply.choices, request, author, round_, text_bytes=lean), _usage(reply.usage)

    def _read(self, data: bytes, lean: bool) -> _Reply[Any]:
        reply: _Reply[Any] = (_lean if lean else _whole).decode(data)
        if lean:
            _add_bytes(reply.choices or [], data)
        elif self._as_text:
            self._check(reply.choices or [])
        return reply

    def _salvage(self, data: bytes, error: Exception) -> _Reply[Any]:
        """What can be read: of each choice its logprobs without bytes, or none, where they are odd.

        Raises:
            TransientError: it is not the logprobs that are odd.
        """
        try:
            reply = _bare.decode(_strict(data))
        except UNREADABLE:
            raise unreadable(f"a 200 that cannot be read ({error}): {data[:80]!r}", data) from error
        for choice in reply.choices or []:
            given, choice.logprobs = choice.logprobs, None
            for token in (_LeanToken, TokenLogprob):  # the last that fits
                with suppress(ValueError):
                    choice.logprobs = msgspec.convert(given, _Logprobs[token] | None)  # type: ignore[valid-type]
            if given is not None and choice.logprobs is None:
                self.odd = self.odd or str(error)
        return reply

    def _check(self, choices: list[_Choice[_Logprobs[TokenLogprob]]]) -> None:
        shown = [top for choice in choices for token in _content(choice) for top in (token, *token.top_logprobs)]
        self._checked += bool(shown)
        self._as_text = all(
            top.bytes is not None and bytes(top.bytes) == top.token.encode() for top in shown if not is_cut(top.token)
        )


def _strict(data: bytes) -> bytes:
    """JSON as everybody reads it: no NaN or infinity, which become null, and no halves of characters."""
    value = json.loads(data, parse_constant=lambda _: None)
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return text.decode("utf-8", "replace").encode()


def _content(choice: _Choice[_Logprobs[Token]]) -> list[Token]:
    return (choice.logprobs.content if choice.logprobs else None) or []


def _tokens(choice: _Choice[Any]) -> list[TokenLogprob] | None:
    if not isinstance(choice.logprobs, _Logprobs):
        return None
    return _content(choice) or array_tokens(msgspec.structs.asdict(choice.logprobs)) or None


def _add_bytes(choices: list[_Choice[Any]], data: bytes) -> None:
    """Put the bytes of those tokens back that may not be a whole text; few replies have any."""
    if not is_cut("".join([_shown(token) for choice in choices for token in _content(choice)])):
        return
    for choice, other in zip(choices, _places.decode(data).choices or [], strict=True):
        tokens = _content(choice)
        for i, (token, raw) in enumerate(zip(tokens, _content(other), strict=True)):
            if is_cut(_shown(token)):
                tokens[i] = _with_bytes(token, _bytes.decode(raw))


def _shown(token: TokenLogprob) -> str:
    """Its text and those of its alternatives."""
    return "".join([top.token for top in token.top_logprobs]) + token.token


def _with_bytes(token: TokenLogprob, raw: _BytesToken) -> TokenLogprob:
    tops = zip(token.top_logprobs, raw.top_logprobs, strict=True)
    return TokenLogprob(
        token=token.token,
        logprob=token.logprob,
        id=token.id,
        bytes=_read_bytes(raw) if is_cut(token.token) else None,
        top_logprobs=[
            TopLogprob(token=top.token, logprob=top.logprob, id=top.id, bytes=_read_bytes(raw_top))
            if is_cut(top.token)
            else top
            for top, raw_top in tops
        ],
    )


def _read_bytes(token: _BytesTop) -> list[int] | None:
    return _byte_list.decode(token.bytes)


def _no_choices(reply: _Reply[Any], data: bytes) -> TeacherError:
    if reply.error is None:
        return unreadable(f"a 200 without choices: {data[:80]!r}", data)
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
            logprobs=_tokens(choice),
            text_bytes=text_bytes,
        )
        for position, choice in enumerate(choices)
    ]


def usage_of(data: bytes) -> Usage:
    """What a 200 says that it cost; nothing where it cannot be read."""
    try:
        reply = _billed.decode(_strict(data))
        return _usage(reply.usage or reply.meta_info)
    except UNREADABLE:
        return Usage()


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
    asked, written = usage.prompt_tokens or 0, usage.completion_tokens or 0
    reasoning = (completion.reasoning_tokens if completion else None) or 0
    if usage.total_tokens is not None:  # some count reasoning in nothing else
        written = max(written, usage.total_tokens - asked)
    elif reasoning > written:
        written += reasoning
    return Usage(
        prompt_tokens=asked,
        completion_tokens=written,
        cached_tokens=(prompt.cached_tokens if prompt else usage.cached_tokens) or 0,
        reasoning_tokens=reasoning,
    )
