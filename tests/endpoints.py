"""A small deterministic "language model" behind the dialects of hosted APIs, honest ones and liars."""

from __future__ import annotations

import random
import re
from typing import Any

import msgspec
from aiohttp import web

from tests.fakes import Answer, error_reply

CHAT = re.findall(r"\w+", "A red fox keeps the old lighthouse lit because every ship had once promised it a song")
RAW = re.findall(r"\w+", "climbed up to the lamp and saw that all of the sea was full of stars and boats")


def tokens_of(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


def logprob(position: int, rank: int = 0) -> float:
    """Of the alternatives at a position; rank 0 is the greedy one."""
    return -(0.1 + 0.37 * (position * 7 % 5)) - 0.9 * rank


class Dialect(msgspec.Struct, kw_only=True):
    """How an endpoint answers; the defaults are an OpenAI-like chat API without anything more."""

    logprobs: str = "content"
    """content, arrays (Together), dropped (200 without), or refused."""
    max_top: int = 20
    clamps: bool = False
    """Asked for more than `max_top`, it gives `max_top` instead of a 400."""
    bytes: bool = True
    ids: bool = False
    n: str = "works"
    """works, ignored, copies, refused."""
    max_n: int = 128
    temperature: str = "works"
    """works, cold (always greedy), hot (always drawn), refused."""
    seed: bool = True
    prefill: tuple[str, ...] = ()
    """Forms that continue; with any other one it starts a new turn."""
    refuses_assistant_last: bool = False
    repeats_prefill: bool = False
    strips_prefilled: bool = False
    """What is new loses the space that it begins with."""
    prompt_logprobs: str = "ignored"
    """works, ignored, refused."""
    completions: str = "missing"
    """missing, legacy (arrays), or content."""
    echo: str = "ignored"
    """works, prompt (Together), ignored, refused, shifted, made-up."""
    bias: str = "ignored"
    """works (leaves logprobs alone), counted (into the logprobs), ignored."""
    noise: float = 0.0
    """Nats between two calls."""
    headers: dict[str, str] = {}
    usage: dict[str, Any] = {}
    reasoning: str | None = None


class Refused(Exception):
    """A 400."""


class Endpoint:
    """`handler` of a FakeAPI."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect, self.calls, self.paths = dialect, 0, list[str]()

    def __call__(self, body: dict[str, Any], request: web.Request) -> Answer:
        self.calls += 1
        self.paths.append(request.path)
        try:
            reply = self.complete(body) if request.path == "/v1/completions" else self.chat(body)
        except Refused as error:
            return error_reply(400, str(error), "invalid_request_error")
        return web.json_response({"model": "m", **reply}, headers=self.dialect.headers)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        d = self.dialect
        before, extra = self._given(body), dict[str, Any]()
        if body.get("prompt_logprobs") is not None and d.prompt_logprobs == "refused":
            raise Refused("prompt_logprobs is not supported")
        if body.get("prompt_logprobs") is not None and d.prompt_logprobs == "works":
            last = tokens_of(str(body["messages"][-1]["content"]))
            extra["prompt_logprobs"] = [None, *({"7": self._shown(t, i)} for i, t in enumerate(last))]
        if body.get("n", 1) > 1 and (d.n == "refused" or body["n"] > d.max_n):
            raise Refused("n is too large")
        choices = [
            self._choice(body, CHAT, before, draw) for draw in range(body.get("n", 1) if d.n != "ignored" else 1)
        ]
        return {"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": 9, **d.usage}, **extra}

    def _given(self, body: dict[str, Any]) -> str:
        """The text to go on with."""
        last = body["messages"][-1]
        if last["role"] != "assistant":
            return ""
        form = "prefix" if last.get("prefix") else "assistant_last"
        form = "continue_final_message" if body.get("continue_final_message") else form
        if form == "assistant_last" and self.dialect.refuses_assistant_last:
            raise Refused("Expected last role User or Tool (or Assistant with prefix True)")
        return str(last["content"]) if form in self.dialect.prefill else ""

    def _choice(self, body: dict[str, Any], words: list[str], before: str, draw: int) -> dict[str, Any]:
        d, limit = self.dialect, body.get("max_tokens") or body["max_completion_tokens"]
        if "temperature" in body and d.temperature == "refused":
            raise Refused("Unsupported value: 'temperature' does not support 0 with this model")
        start = len(tokens_of(before))
        drawn = self._drawn(body, words, draw)[start : start + limit]
        written = [(" " if start + i else "") + word for i, word in enumerate(drawn)]
        new = "".join(written).lstrip() if d.strips_prefilled else "".join(written)
        text = (before if d.repeats_prefill else "") + new
        message = {"role": "assistant", "content": text} | ({"reasoning_content": d.reasoning} if d.reasoning else {})
        choice: dict[str, Any] = {"index": draw, "message": message, "finish_reason": "length"}
        return choice | self._logprobs(body, written, start, words)

    def _drawn(self, body: dict[str, Any], words: list[str], draw: int) -> list[str]:
        d = self.dialect
        hot = body.get("temperature", 1) > 0 if d.temperature in ("works", "refused") else d.temperature == "hot"
        if not hot:
            return words
        seed = body.get("seed", 0) if d.seed else self.calls
        rng = random.Random(f"{seed}/{0 if d.n == 'copies' else draw}")
        return rng.sample(words, len(words))

    def _logprobs(self, body: dict[str, Any], written: list[str], start: int, words: list[str]) -> dict[str, Any]:
        d, top = self.dialect, body.get("top_logprobs")
        if not body.get("logprobs") or d.logprobs == "dropped":
            return {}
        if d.logprobs == "refused":
            raise Refused("logprobs are not supported with reasoning models")
        if top > d.max_top and not d.clamps:
            raise Refused(f"top_logprobs must be at most {d.max_top}")
        content = [self._entry(token, start + i, min(top, d.max_top), words) for i, token in enumerate(written)]
        if d.logprobs == "arrays":
            return {"logprobs": {"tokens": written, "token_logprobs": [entry["logprob"] for entry in content]}}
        return {"logprobs": {"content": content}}

    def _entry(self, token: str, position: int, top: int, words: list[str]) -> dict[str, Any]:
        """The greedy word at a position has rank 0, any other one rank 3."""
        rank = 0 if position < len(words) and token.strip() == words[position] else 3
        shown = [self._token(f" {words[position % len(words)]}", position, 0)] if rank else []
        shown = [self._token(token, position, rank), *shown]
        others = [self._token(f" word{i}", position, i + 1, id_=100 + i) for i in range(max(0, top - len(shown)))]
        ordered = sorted([*shown, *others], key=lambda entry: -float(entry["logprob"]))[:top]
        return {**shown[0], "top_logprobs": ordered}

    def _token(self, text: str, position: int, rank: int, id_: int = 0) -> dict[str, Any]:
        entry: dict[str, Any] = {"token": text, "logprob": self._value(position, rank)}
        entry |= {"id": id_ or sum(text.encode())} if self.dialect.ids else {}
        return entry | {"bytes": list(text.encode()) if self.dialect.bytes else None}

    def _value(self, position: int, rank: int = 0) -> float:
        return logprob(position, rank) - self.dialect.noise * (self.calls % 2)

    def _shown(self, text: str, position: int) -> dict[str, Any]:
        return {"logprob": self._value(position), "rank": 1, "decoded_token": text}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Raw text: the words of RAW follow whatever does not contain them."""
        d, prompt = self.dialect, str(body["prompt"])
        if d.completions == "missing":
            raise Refused("This is a chat model and not supported in the v1/completions endpoint")
        start = next((i for i in range(len(RAW), 0, -1) if prompt.endswith(" " + " ".join(RAW[:i]))), 0)
        words = [f" {word}" for word in RAW[start : start + body["max_tokens"]]]
        entries = [self._entry(word, start + i, 5, RAW) for i, word in enumerate(words)]
        for token_id in body.get("logit_bias") or {}:
            entries = self._forced(entries, int(token_id))
        extra = dict[str, Any]()
        if body.get("echo") and d.echo != "ignored":
            entries, extra = self._echoed(prompt, entries, start)
        text = "".join(entry["token"] for entry in entries)
        shown = {"tokens": [entry["token"] for entry in entries], "token_logprobs": [e["logprob"] for e in entries]}
        logprobs = {"content": entries} if d.completions == "content" else shown
        return {"choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": "length"}], **extra}

    def _forced(self, entries: list[dict[str, Any]], token_id: int) -> list[dict[str, Any]]:
        if self.dialect.bias == "ignored":
            return entries
        chosen = next(top for top in entries[0]["top_logprobs"] if top["id"] == token_id)
        return [chosen | ({"logprob": -0.0001} if self.dialect.bias == "counted" else {})]

    def _echoed(
        self, prompt: str, entries: list[dict[str, Any]], start: int
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        d, given = self.dialect, tokens_of(prompt)
        if d.echo == "refused":
            raise Refused("echo is not supported")
        first = len(given) - start  # of the words that were written before
        values = [self._value(max(0, i - first)) for i in range(len(given))]
        values = values[1:] + values[:1] if d.echo == "shifted" else values
        values = [0.0] * len(values) if d.echo == "made-up" else values
        if d.echo == "prompt":
            return entries, {"prompt": [{"text": prompt, "logprobs": {"tokens": given, "token_logprobs": values}}]}
        echoed = [{"token": token, "logprob": value} for token, value in zip(given, values, strict=True)]
        return [{**echoed[0], "logprob": None if d.completions == "legacy" else 0.0}, *echoed[1:], *entries], {}
