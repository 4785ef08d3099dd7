"""The teacher of tests/toy.py behind the chat API, honest in all that it is asked.

It draws under the seed of the request and shows its true logprobs, goes on with an assistant's message, scores a given
one (vLLM's `prompt_logprobs`), and answers a rewrite by a draw of its own. It grades answers, with and without a
rubric, by how likely they are to be its own. The prompt is found in whatever is asked.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from blackbox_kd.student.render import Renderer
from tests.toy import END, PROMPTS, Language

ELSEWHERE = -14.0
"""Nats of what the teacher never says: a server shows a small number, not an infinite one."""


RUBRIC = (1.5, 2.5, 3.5, 4.5, 6.0, 8.0)
"""Nats of surprise that an answer is to stay below."""


class ToyEndpoint:
    """`handler` of a FakeAPI."""

    def __init__(self, language: Language, renderer: Renderer) -> None:
        """The server's tokens are the student's, as `prompt_logprobs` shows their ids."""
        self.language, self.renderer = language, renderer

    def __call__(self, body: dict[str, Any], request: web.Request | None) -> dict[str, Any]:
        messages = body["messages"]
        prompt = prompt_in(messages)
        if "Reply with JSON only" in str(messages[-1]["content"]):
            return self._judged(body, prompt, str(messages[-1]["content"]))
        written = str(messages[-1]["content"]) if messages[-1]["role"] == "assistant" else ""
        rng = random.Random(body.get("seed")) if body.get("temperature", 1) else None
        drawn = [self.language.write(prompt, written, rng, body["max_tokens"]) for _ in range(body.get("n", 1))]
        choices = [self._choice(body, prompt, written, tokens) | {"index": i} for i, tokens in enumerate(drawn)]
        usage = {"prompt_tokens": 9, "completion_tokens": sum(map(len, drawn))}
        reply = {"model": body["model"], "choices": choices, "usage": usage}
        if (k := body.get("prompt_logprobs")) is not None:
            reply["prompt_logprobs"] = self._scored(body, prompt, k)
        return reply

    def _judged(self, body: dict[str, Any], prompt: str, asked: str) -> dict[str, Any]:
        """A rubric, verdicts by one, or grades: all of them fall with the answer's surprise."""
        shown = re.findall(r"<(answer_\d+)>\n(.*?)\n</\1>", asked, re.DOTALL)
        limits = [float(limit) for limit in re.findall(r"^\d+\. surprise below (\S+)$", asked, re.MULTILINE)]
        said: dict[str, Any] = {"criteria": [{"criterion": f"surprise below {each}", "points": 1} for each in RUBRIC]}
        if shown:
            surprise = {key: self._surprise(prompt, text) for key, text in shown}
            said = {key: min(9, max(0, round(9 - nats))) for key, nats in surprise.items()}
            if limits:
                said = {key: [nats < limit for limit in limits] for key, nats in surprise.items()}
        choice = {"index": 0, "message": {"role": "assistant", "content": json.dumps(said)}, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [_shown(char, {char: 1.0}, 1) for char in json.dumps(said)]}
        return {"model": body["model"], "choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}

    def _surprise(self, prompt: str, text: str) -> float:
        """Nats of a whole answer."""
        tokens = [*text, END]
        places = [self.language.next(prompt, text[:i]) for i in range(len(tokens))]
        return -sum(_nats(token, place) for token, place in zip(tokens, places, strict=True))

    def _choice(self, body: dict[str, Any], prompt: str, written: str, tokens: list[str]) -> dict[str, Any]:
        text = "".join(token for token in tokens if token != END)
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop" if END in tokens else "length",
        }
        if body.get("logprobs"):
            places = [self.language.next(prompt, written + "".join(tokens[:i])) for i in range(len(tokens))]
            shown = [_shown(token, place, body["top_logprobs"]) for token, place in zip(tokens, places, strict=True)]
            choice["logprobs"] = {"content": shown}
        return choice

    def _scored(self, body: dict[str, Any], prompt: str, k: int) -> list[dict[str, Any] | None]:
        """One entry for each token of the conversation as the server's template has it."""
        template, messages = self.renderer.tokenizer.apply_chat_template, body["messages"]
        before: list[int] = self.renderer.prompt(messages[:-1])
        ids: list[int] = template(
            messages,
            return_dict=False,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
        )
        assert ids[: len(before)] == before
        tokens = [str(token) for token in self.renderer.tokenizer.convert_ids_to_tokens(ids)]
        found: list[dict[str, Any] | None] = [None]
        for i in range(1, len(ids)):
            written = "".join(tokens[len(before) : i])
            place = self.language.next(prompt, written) if i >= len(before) and END not in written else {}
            found.append(self._scored_token(tokens[i], place, k))
        return found

    def _scored_token(self, token: str, place: Mapping[str, float], k: int) -> dict[str, Any]:
        """The token itself first, then the k likeliest."""
        likeliest = sorted(place, key=lambda other: -place[other])
        shown = [token, *(other for other in likeliest[:k] if other != token)]
        rank = {other: i for i, other in enumerate(likeliest, 1)}
        return {
            str(self.renderer.tokenizer.convert_tokens_to_ids(other)): {
                "logprob": _nats(other, place),
                "rank": rank.get(other, len(rank) + 1),
                "decoded_token": other,
            }
            for other in shown
        }


def prompt_in(messages: list[dict[str, Any]]) -> str:
    """The prompt that a question is about, bare or inside of a template: the last that is named, or just the first."""
    said = re.findall(r"\b[xy]\d\d\b", " ".join(str(m["content"]) for m in messages if m["role"] == "user"))
    return str([PROMPTS[0], *said][-1])


def _shown(token: str, place: Mapping[str, float], k: int) -> dict[str, Any]:
    entries = [{"token": t, "logprob": _nats(t, place), "bytes": list(t.encode())} for t in place]
    likeliest = sorted(entries, key=lambda entry: -float(str(entry["logprob"])))[:k]
    return {**next(entry for entry in entries if entry["token"] == token), "top_logprobs": likeliest}


def _nats(token: str, place: Mapping[str, float]) -> float:
    return math.log(place[token]) if token in place else ELSEWHERE
