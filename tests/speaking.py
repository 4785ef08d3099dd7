"""A real language model, small and made on the spot, that speaks the dialects in which endpoints score given tokens."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fakes import FakeAPI, error_reply

NATIVE = ("/generate", "/apply-template", "/tokenize")


class LanguageModel:
    """The model of a folder over printable ASCII; what it may not write has no probability."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.end = self.tokenizer.eos_token_id
        texts = [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]
        self.barred = torch.tensor([not (t.isascii() and t.isprintable() and "<|" not in t) for t in texts])
        self.barred[self.end] = False
        self.after = cache(self._after)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, messages: list[dict[str, str]], *, generation: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    @torch.no_grad()
    def _after(self, ids: tuple[int, ...]) -> torch.Tensor:
        """(V,) log p of the token that follows."""
        logits = self.model(torch.tensor([ids])).logits[0, -1].double()
        return logits.masked_fill(self.barred, -math.inf).log_softmax(-1)

    def write(self, ids: list[int], limit: int) -> list[int]:
        """Greedily."""
        found: list[int] = []
        while len(found) < limit and found[-1:] != [self.end]:
            found.append(int(self.after((*ids, *found)).argmax()))
        return found

    def shown(self, before: list[int], token: int) -> dict[str, Any]:
        logprob = max(-99.0, float(self.after(tuple(before))[token]))  # JSON has no infinity
        return {"id": token, "token": self.tokenizer.decode([token]), "logprob": logprob}

    def with_top(self, before: list[int], token: int, k: int) -> dict[str, Any]:
        top = [self.shown(before, int(i)) for i in self.after(tuple(before)).topk(k).indices]
        return {**self.shown(before, token), "top_logprobs": top}


class SpeakingAPI(FakeAPI):
    """`dialect`: vllm, together, fireworks, sglang or llama.cpp. `shift`: scores are those of so many tokens later;
    llama.cpp counts the bias into them. `template`: whether it renders as it chats.
    """

    def __init__(self, lm: LanguageModel, dialect: str, *, shift: int = 0, template: bool = True) -> None:
        super().__init__(self.answer)
        self.lm, self.dialect, self.shift, self.template = lm, dialect, shift, template
        self.asked_paths: list[str] = []

    def add_routes(self, router: web.UrlDispatcher) -> None:
        super().add_routes(router)
        for path in NATIVE:
            router.add_post(path, self.chat)

    def answer(self, body: dict[str, Any], request: web.Request) -> Any:
        self.asked_paths.append(request.path)
        if request.path == "/v1/chat/completions":
            return web.json_response(self.converse(body))
        if request.path == "/v1/completions" and self.dialect in ("together", "fireworks", "sglang"):
            return web.json_response(self.echo(body))
        if request.path == "/v1/completions" and self.dialect == "llama.cpp":
            return web.json_response(self.forced(body))
        if request.path == "/generate" and self.dialect == "sglang":
            return web.json_response(self.generate(body))
        if request.path == "/apply-template" and self.dialect == "llama.cpp":
            return web.json_response({"prompt": ("" if self.template else "x") + self.lm.prompt(body["messages"])})
        if request.path == "/tokenize" and self.dialect == "llama.cpp":
            return web.json_response({"tokens": self.lm.ids(body["content"])})
        return error_reply(404, "not here")

    def converse(self, body: dict[str, Any]) -> dict[str, Any]:
        lm, wanted = self.lm, body.get("prompt_logprobs")
        scored = wanted is not None and self.dialect == "vllm"
        prompt = lm.ids(lm.prompt(body["messages"], generation=body.get("add_generation_prompt", True)))
        wrote = lm.write(prompt, body["max_tokens"])
        text = lm.tokenizer.decode([i for i in wrote if i != lm.end])
        content = [lm.with_top([*prompt, *wrote[:i]], t, body.get("top_logprobs", 0)) for i, t in enumerate(wrote)]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length",
                  "logprobs": {"content": content} if body.get("logprobs") else None}  # fmt: skip
        reply: dict[str, Any] = {"model": "m", "choices": [choice], "usage": usage(prompt, wrote)}
        if scored:
            rows = [self.row(prompt, i, wanted) for i in range(1, len(prompt))]
            reply["prompt_logprobs"] = [None, *(self.by_id(row) for row in rows)]
        return reply

    def row(self, ids: list[int], i: int, k: int) -> dict[str, Any]:
        """Token i with its alternatives; its logprob is another's where scores are shifted."""
        at = min(i + self.shift, len(ids) - 1)
        return self.lm.with_top(ids[:i], ids[i], k) | {"logprob": self.lm.shown(ids[:at], ids[at])["logprob"]}

    @staticmethod
    def by_id(row: dict[str, Any]) -> dict[str, Any]:
        each = {row["id"]: row, **{top["id"]: top for top in row["top_logprobs"] if top["id"] != row["id"]}}
        return {str(i): {"logprob": e["logprob"], "rank": 1, "decoded_token": e["token"]} for i, e in each.items()}

    def echo(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.lm.ids(body["prompt"])
        first = {**self.lm.shown(ids, ids[0]), "logprob": None, "top_logprobs": []}
        rows = [first, *(self.row(ids, i, body["logprobs"]) for i in range(1, len(ids)))]
        new = self.lm.write(ids, body["max_tokens"])
        wrote = [self.lm.with_top([*ids, *new[:i]], t, body["logprobs"]) for i, t in enumerate(new)]
        extra: dict[str, Any] = {}
        if self.dialect == "sglang":
            logprobs = arrays(wrote)
        elif self.dialect == "together":
            extra["prompt"] = [{"text": body["prompt"], "logprobs": arrays(rows)}]
            logprobs = arrays(wrote)
        else:
            logprobs = {"content": [*rows, *wrote] if body.get("echo") else wrote}
        return {
            "choices": [{"index": 0, "text": self.lm.tokenizer.decode(new), "logprobs": logprobs}],
            "usage": usage(ids, new),
            **extra,
        }

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.lm.ids(body["text"])
        rows = [self.row(ids, i, body["top_logprobs_num"]) for i in range(1, len(ids))]
        own = [[None, ids[0], ""], *([row["logprob"], row["id"], row["token"]] for row in rows)]
        tops = [None, *([[t["logprob"], t["id"], t["token"]] for t in row["top_logprobs"]] for row in rows)]
        info = {"input_token_logprobs": own, "input_top_logprobs": tops, "cached_tokens": 2, **usage(ids, [0])}
        return {"text": "", "meta_info": info}

    def forced(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.lm.ids(body["prompt"])
        ((token, _),) = body["logit_bias"].items()
        row = self.row([*ids, int(token)], len(ids), body["logprobs"])
        row |= {"token": "" if row["id"] == self.lm.end else row["token"]}
        row |= {"logprob": -1e-4} if self.shift else {}  # the bias counts
        return {
            "choices": [{"index": 0, "text": row["token"], "logprobs": {"content": [row]}}],
            "usage": usage(ids, [0]),
        }


def arrays(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": [row["token"] for row in rows],
        "token_ids": [row["id"] for row in rows],
        "token_logprobs": [row["logprob"] for row in rows],
        "top_logprobs": [{top["token"]: top["logprob"] for top in row["top_logprobs"]} or None for row in rows],
    }


def usage(prompt: list[int], wrote: list[int]) -> dict[str, int]:
    return {"prompt_tokens": len(prompt), "completion_tokens": len(wrote)}
