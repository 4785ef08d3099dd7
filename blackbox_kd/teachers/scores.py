"""Tokens and their log-probabilities, in the dialects that endpoints answer in, and whether two accounts of them agree.

Pure. A reply is its decoded JSON, read leniently: what has another shape counts as not given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from blackbox_kd.types import TokenLogprob, TopLogprob

TOLERANCE_NATS = 0.05
"""Two logprobs of a token agree within this."""


def chat_tokens(choice: Any) -> list[TokenLogprob]:
    """`logprobs.content[]` of a choice, as the chat API has it, or Together's arrays in its place."""
    shown = get(choice, "logprobs")
    return _entries(items(shown, "content")) or array_tokens(shown)


def choice_tokens(choice: Any) -> list[TokenLogprob]:
    """A choice's tokens in either shape: `content[]`, or the parallel arrays of the older completions API."""
    return chat_tokens(choice) or _arrays(get(choice, "logprobs"))


def array_tokens(logprobs: Any) -> list[TokenLogprob]:
    """Parallel arrays with their alternatives (`{text: logprob}` a token); none where they are not whole."""
    tokens, values = items(logprobs, "tokens"), items(logprobs, "token_logprobs")
    ids, tops = (items(logprobs, name) or [None] * len(tokens) for name in ("token_ids", "top_logprobs"))
    if not len(tokens) == len(values) == len(ids) == len(tops):
        return []
    return _entries([
        {"token": token, "logprob": value, "id": id_, "top_logprobs": _alternatives(top)}
        for token, value, id_, top in zip(tokens, values, ids, tops, strict=True)
    ])  # fmt: skip


def _alternatives(top: Any) -> list[Any]:
    pairs = top.items() if isinstance(top, dict) else ()
    return [{"token": text, "logprob": value} for text, value in pairs]


def echoed_tokens(reply: Any) -> list[TokenLogprob]:
    """What a reply says of its prompt: Together's `prompt[]`, else the choice that begins with the prompt."""
    for name in ("prompt", "choices"):
        for part in items(reply, name):
            if tokens := choice_tokens(part):
                return tokens
    return []


def prompt_tokens(reply: Any) -> list[TokenLogprob]:
    """vLLM's `prompt_logprobs`: null, then one `{"<id>": {"logprob", "decoded_token"}}` a token, its own id first."""
    found = []
    for entry in items(reply, "prompt_logprobs"):
        for token_id, given in list(entry.items())[:1] if isinstance(entry, dict) else []:
            number = int(token_id) if token_id.isdecimal() else None
            text, value = str(get(given, "decoded_token")), _number(get(given, "logprob"))
            found.append(TokenLogprob(token=text, logprob=value, id=number))
    return found


def written(tokens: Sequence[TokenLogprob], text: str) -> list[TokenLogprob]:
    """The tokens that a text begins with: an end token is none of its text."""
    found, so_far = [], ""
    for token in tokens:
        so_far += spelling(token)
        if not token.token or not text.startswith(so_far):
            break
        found.append(token)
    return found


def spelling(token: TopLogprob) -> str:
    """A token as text; some servers show the vocabulary's own marks for a space."""
    return token.token.replace("Ġ", " ").replace("▁", " ")


def too_certain(tokens: Sequence[TokenLogprob]) -> bool:
    """Whether these logprobs are so alike that shifted or made-up ones would pass for them."""
    values = [token.logprob for token in tokens]
    return len(values) < 2 or max(values) - min(values) <= 2 * TOLERANCE_NATS


def off_by(wrote: Sequence[TokenLogprob], scored: Sequence[TokenLogprob]) -> float | None:
    """Largest difference in nats where the last occurrence of the same tokens is; None where there is none."""
    texts = [spelling(token).strip() for token in wrote]
    for start in range(len(scored) - len(wrote), -1, -1):
        window = scored[start : start + len(wrote)]
        if [spelling(token).strip() for token in window] == texts:
            return max((abs(a.logprob - b.logprob) for a, b in zip(wrote, window, strict=True)), default=0.0)
    return None


def apart(first: Sequence[TokenLogprob], second: Sequence[TokenLogprob]) -> float | None:
    """Largest difference in nats over what two greedy answers share; None where nothing can be compared."""
    differences = []
    for one, other in zip(first, second, strict=False):
        if (value := shown(one, other)) is not None:
            differences.append(abs(one.logprob - value))
        if one.token != other.token:
            break
    return max(differences, default=None)


def shown(wanted: TopLogprob, at: TokenLogprob) -> float | None:
    """A token's logprob where it is the sampled one or among its alternatives."""
    return next((top.logprob for top in (at, *at.top_logprobs) if top.token == wanted.token), None)


def greedy(tokens: Sequence[TokenLogprob]) -> bool:
    """Each token is the likeliest of those shown."""
    return all(
        token.logprob >= max((top.logprob for top in token.top_logprobs), default=-math.inf) - TOLERANCE_NATS
        for token in tokens
    )


def _entries(content: list[Any]) -> list[TokenLogprob]:
    try:
        return msgspec.convert(content, list[TokenLogprob])
    except msgspec.ValidationError:
        return []


def _arrays(logprobs: Any) -> list[TokenLogprob]:
    tokens, values = items(logprobs, "tokens"), items(logprobs, "token_logprobs")
    return [TokenLogprob(token=str(t), logprob=_number(v)) for t, v in zip(tokens, values, strict=False)]


def _number(value: Any) -> float:
    """The first token of a prompt has none."""
    return float(value) if isinstance(value, int | float) else -math.inf


def get(value: Any, name: str) -> Any:
    """A key of an object; None where it is none, or has no such key."""
    return value.get(name) if isinstance(value, dict) else None


def items(value: Any, name: str) -> list[Any]:
    """A list in an object; empty where there is none."""
    found = get(value, name)
    return found if isinstance(found, list) else []
