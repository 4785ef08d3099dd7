"""Replies as a hosted API sends them: real words, peaked and flat positions, tokens that are half a letter."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).parent.parent / "data" / "action_items" / "train.jsonl"
FOREIGN = "éüßñ“”…€✓漢字日本語한국Ж🙂🚀👍🎉"
FOREIGN_SHARE = 0.001
"""Of the tokens: byte-level tokenizers cut rare letters into pieces that are no UTF-8, shown as U+FFFD.

The quickstart's teacher shows 0.00012 such tokens in its top-20 (4 in 33,320), in 3 of 108 replies."""
CANDIDATES = 64
"""Tokens that have any probability at a position."""


def pieces() -> list[tuple[str, list[int]]]:
    """(text, bytes) of some thousand tokens: words, their halves and endings, punctuation."""
    words = set(re.findall(r" ?\w+|[^\w\s]|\n", TEXTS.read_text("utf-8")))
    halves = {word[: len(word) // 2] for word in words if len(word) > 6} | {word[-3:] for word in words}
    return [(text, list(text.encode())) for text in sorted(words | halves)]


def foreign() -> list[tuple[str, list[int]]]:
    """Rare letters, those of three and four bytes in pieces."""
    found = []
    for letter in FOREIGN:
        raw = letter.encode()
        cuts = [raw] if len(raw) < 3 else [raw[:-1], raw[-1:]]
        found += [(cut.decode("utf-8", "replace"), list(cut)) for cut in cuts]
    return found


class Maker:
    """Draws replies; the same seed makes the same ones."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._pieces, self._foreign = pieces(), foreign()
        self._rng.shuffle(self._pieces)
        zipf = [1 / (rank + 10) for rank in range(len(self._pieces))]  # with a flat head
        self._popularity = list(itertools.accumulate(zipf))

    def reply(self, tokens: int, top: int) -> tuple[bytes, bytes]:
        """The JSON before and after the answer's text; without `tokens` it has no logprobs."""
        message = {"role": "assistant", "content": "@", "refusal": None}
        content = [self._position(top) for _ in range(tokens)]
        choice = {"index": 0, "message": message, "finish_reason": "stop",
                  "logprobs": {"content": content, "refusal": None} if tokens else None}  # fmt: skip
        usage = {"prompt_tokens": 12, "completion_tokens": tokens or 8, "total_tokens": 12 + (tokens or 8),
                 "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
                 "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0}}  # fmt: skip
        body = {"id": "chatcmpl-fake", "object": "chat.completion", "created": 1, "model": "fake-served",
                "choices": [choice], "usage": usage, "system_fingerprint": "fp_fake"}  # fmt: skip
        before, _, after = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode().partition(b'"@"')
        return before, after

    def _position(self, top: int) -> dict[str, Any]:
        """A sampled token beside the likeliest; peaked where the text leaves no choice, flat where it does."""
        steepness = self._rng.lognormvariate(0.9, 0.6)
        weights = [(rank + 1) ** -steepness * self._rng.uniform(0.6, 1.0) for rank in range(CANDIDATES)]
        total = math.fsum(weights)
        likeliest = sorted((weight / total for weight in weights), reverse=True)
        (drawn,) = self._rng.choices(range(CANDIDATES), likeliest)
        shown = [self._entry(probability) for probability in likeliest[:top]]
        sampled = shown[drawn] if drawn < top else self._entry(likeliest[drawn])
        return {**sampled, "top_logprobs": shown}

    def _entry(self, probability: float) -> dict[str, Any]:
        if self._rng.random() < FOREIGN_SHARE:
            text, raw = self._rng.choice(self._foreign)
        else:
            ((text, raw),) = self._rng.choices(self._pieces, cum_weights=self._popularity)
        return {"token": text, "logprob": round(math.log(probability), 10), "bytes": raw}
