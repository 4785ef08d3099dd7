"""Provider `scripted`: a deterministic teacher in this process, for tests and dry runs. It never leaves the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal

import jinja2
import jinja2.meta

from blackbox_kd.errors import ConfigError, RequestRejected
from blackbox_kd.teachers.base import Reply, TeacherConfig, Transport

Script = Callable[[dict[str, Any]], str]
"""Body of a question -> text of the answer; it may raise a TeacherError."""

END = "<|end|>"

_environment = jinja2.Environment(undefined=jinja2.StrictUndefined)


class ScriptedTeacherConfig(TeacherConfig):
    """Answers by a template."""

    provider: Literal["scripted"] = "scripted"
    model: str = "scripted"
    capabilities: dict[str, Any] = {
        "prefill": "assistant_last", "scoring": "prompt_logprobs", "top_logprobs_max": 1, "has_bytes": True,
    }  # fmt: skip
    reply: str = "You said: {{ text }}"
    """Jinja text; {{ text }} is the last message, {{ messages }} all of them."""

    def check(self) -> None:
        """The template compiles and uses only what there is."""
        try:
            unknown = jinja2.meta.find_undeclared_variables(_environment.parse(self.reply)) - {"text", "messages"}
        except jinja2.TemplateError as error:
            raise ConfigError(f"teacher.reply: {error}") from error
        if unknown:
            raise ConfigError(f"teacher.reply: {min(unknown)!r} is unknown; it may use text, messages")

    def connect(self) -> AbstractAsyncContextManager[Transport]:
        """Answers from the template."""
        template = _environment.from_string(self.reply)

        def script(body: dict[str, Any]) -> str:
            try:
                return template.render(text=body["messages"][-1]["content"], messages=body["messages"])
            except jinja2.UndefinedError as error:
                raise ConfigError(f"teacher.reply: {error}") from error

        return scripted(script)


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Transport]:
    """A transport that answers by a function."""
    yield ScriptedTransport(script)


class ScriptedTransport:
    """Replies in the shape of the real wire, so that everything behind it is the real code."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.bodies: list[dict[str, Any]] = []

    async def send(self, body: dict[str, Any], path: str = "chat/completions") -> Reply:
        """A chat completion whose tokens are its words, with made-up but repeatable logprobs.

        With `prompt_logprobs` also those of the last message, and of the token that ends it.
        """
        if path != "chat/completions":
            raise RequestRejected(f"the scripted teacher has no /{path}", status=404)
        self.bodies.append(body)
        text = self._script(body)
        words = _words(text)
        shown = words[: body.get("max_tokens")]
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(shown)},
            "finish_reason": "stop" if shown == words else "length",
        }
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [_token(word) for word in shown]}
        prompt_tokens = sum(len(message["content"].split()) for message in body["messages"])
        reply = {
            "model": body["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(shown)},
        }
        if "prompt_logprobs" in body:
            given = [*_words(body["messages"][-1]["content"]), END]
            reply["prompt_logprobs"] = [None, *({f"<{w}>": _token(w) | {"decoded_token": w}} for w in given)]
        return Reply(json.dumps(reply).encode())


def _words(text: str) -> list[str]:
    return [word if i == 0 else f" {word}" for i, word in enumerate(text.split(" ")) if i or word or not text]


def _token(word: str) -> dict[str, Any]:
    logprob = -(1 + hashlib.sha256(word.encode()).digest()[0]) / 256
    shown = {"token": word, "logprob": logprob, "bytes": list(word.encode())}
    return {**shown, "top_logprobs": [shown]}
