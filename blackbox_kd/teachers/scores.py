"""Tokens and their log-probabilities, in the dialects that endpoints answer in, and whether two accounts of them agree.

Pure. A reply is its decoded JSON, read leniently: what has another shape counts as not given.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
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
    """Parallel arrays with their alternatives (`{text: logprob}` a token); none where they are not whole.

    Alternatives have no ids, and then the tokens have none either: one of them would be two.
    """
    tokens, values = items(logprobs, "tokens"), items(logprobs, "token_logprobs")
    ids, tops = (items(logprobs, name) or [None] * len(tokens) for name in ("token_ids", "top_logprobs"))
    ids = [None] * len(ids) if any(tops) else ids
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
            if tokens := choice_tokens(_with_first(part)):
                return tokens
    return []


def _with_first(part: Any) -> Any:
    """The first token of a prompt has no logprob: here it has one."""
    shown = get(part, "logprobs")
    if (values := items(shown, "token_logprobs")) and values[0] is None:
        shown = {**shown, "token_logprobs": [-math.inf, *values[1:]]}
    if (content := items(shown, "content")) and get(content[0], "logprob") is None and isinstance(content[0], dict):
        shown = {**shown, "content": [{**content[0], "logprob": -math.inf}, *content[1:]]}
    return {"logprobs": shown}


def prompt_tokens(reply: Any, top: int = 0) -> list[TokenLogprob]:
    """vLLM's `prompt_logprobs`: null, then `{"<id>": {"logprob", "decoded_token"}}` of a token (its own id comes first)
    and of the likeliest, of which `top` are kept. https://docs.vllm.ai/en/latest/api/vllm/logprobs
    """
    found = []
    for entry in items(reply, "prompt_logprobs"):
        shown = [_prompt_token(*each) for each in entry.items()] if isinstance(entry, dict) else []
        found += [_beside(shown[0], shown, top)] if shown else []
    return found


def _prompt_token(token_id: str, given: Any) -> TopLogprob:
    number = int(token_id) if token_id.isdecimal() else None
    return TopLogprob(token=str(get(given, "decoded_token")), logprob=_number(get(given, "logprob")), id=number)


def native_tokens(reply: Any) -> list[TokenLogprob]:
    """SGLang's `meta_info`: `[logprob, id, text]` of each token of the prompt, and lists of such for its alternatives.

    https://docs.sglang.ai/basic_usage/native_api.html
    """
    meta = get(reply, "meta_info")
    shown = [_triple(each) for each in items(meta, "input_token_logprobs")]
    tops = items(meta, "input_top_logprobs") or [None] * len(shown)
    return [
        _beside(own, [_triple(each) for each in top or []], len(top or []))
        for own, top in zip(shown, tops, strict=False)
    ]


def _triple(given: Any) -> TopLogprob:
    value, number, text = (list(given) + [None] * 3)[:3] if isinstance(given, list) else (None, None, None)
    return TopLogprob(token=str(text), logprob=_number(value), id=number if isinstance(number, int) else None)


def _beside(own: TopLogprob, shown: list[TopLogprob], top: int) -> TokenLogprob:
    """A token with the likeliest `top` of what is shown."""
    likeliest = sorted(shown, key=lambda each: -each.logprob)[:top]
    return TokenLogprob(token=own.token, logprob=own.logprob, id=own.id, top_logprobs=likeliest)


def of_text(tokens: Sequence[TokenLogprob], text: str, end: TopLogprob | None = None) -> list[TokenLogprob] | None:
    """The last tokens that spell a text and are followed by `end` (None: by any token), with that; None without them.

    A character that tokens cut stands in them as itself, or as one U+FFFD for each of its pieces; where it stands at
    the last of them, and the text begins with it, nobody knows where that is.
    """
    pattern = re.compile("".join(re.escape(c) if c.isascii() else f"(?:{re.escape(c)}|\\ufffd{{1,4}})" for c in text))
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(spelling(token)))
    whole = "".join(map(spelling, tokens))
    for i in range(len(tokens) - 1, -1, -1):
        found = pattern.match(whole, starts[i])
        if not found or (text and starts[i] == starts[i + 1]):
            continue
        behind = range(bisect_left(starts, found.end(), i), bisect_right(starts, found.end(), i, len(tokens)))
        last = next((j for j in behind if (not text or j > i) and (end is None or same(tokens[j], end))), None)
        if last is not None:
            hidden = i > 0 and starts[i - 1] == starts[i] and bool(text) and not text[0].isascii()
            return None if hidden else list(tokens[last if not text else i : last + 1])
    return None


def same(one: TopLogprob, other: TopLogprob) -> bool:
    """One token, by its id where there is one."""
    return one.token == other.token if None in (one.id, other.id) else one.id == other.id


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
