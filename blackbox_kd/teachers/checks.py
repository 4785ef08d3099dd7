"""Whether a reply proves what it is taken for. Pure: an answer goes in, a verdict and its reason come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from blackbox_kd.teachers import scores
from blackbox_kd.teachers.base import PrefillReply, Reply
from blackbox_kd.teachers.failures import UNREADABLE
from blackbox_kd.teachers.scores import TOLERANCE_NATS
from blackbox_kd.types import TokenLogprob

Verdict: TypeAlias = tuple[bool, str]
"""Whether it is believed, and why."""


class Answer(NamedTuple):
    """A reply, or what the endpoint said instead."""

    data: dict[str, Any] = {}
    headers: Mapping[str, str] = {}
    no: str = ""

    @property
    def choices(self) -> list[Any]:
        """As decoded."""
        return scores.items(self.data, "choices")

    @property
    def texts(self) -> list[str]:
        """One a choice; "" for one without text."""
        return [_text(choice) for choice in self.choices]

    @property
    def chat_tokens(self) -> list[TokenLogprob]:
        """Of the first choice, where they are in the chat API's shape."""
        return scores.chat_tokens(self.choices[0]) if self.choices else []

    @property
    def tokens(self) -> list[TokenLogprob]:
        """Of the first choice, in any shape, without those that are none of its text."""
        return scores.written(scores.choice_tokens(self.choices[0]), self.texts[0]) if self.choices else []

    @property
    def alternatives(self) -> int:
        """The most that are given for a token."""
        return max((len(token.top_logprobs) for token in self.chat_tokens), default=0)


def read(reply: Reply) -> Answer:
    """The answer in a 200; without one, what it holds instead."""
    try:
        data = msgspec.json.decode(reply.data)
    except UNREADABLE as error:
        return Answer(no=f"a 200 that cannot be read ({error})")
    answer = Answer(data, reply.headers) if isinstance(data, dict) else Answer()
    said = answer.choices or scores.get(data, "meta_info")
    return answer if said else Answer(no=f"a 200 without choices: {reply.data[:120]!r}")


def agreement(wrote: Sequence[TokenLogprob], scored: Sequence[TokenLogprob], no: str = "") -> Verdict:
    """The self-check: tokens that were written greedily have the same logprobs where they were only to be scored.

    `no` is what the endpoint said where it did not score at all.
    """
    if no:
        return False, no
    if scores.too_certain(wrote):
        return False, "the endpoint's own logprobs are too alike to check it by"
    off = scores.off_by(wrote, scored)
    if off is None:
        return False, "ignored: the given tokens do not come back"
    return off <= TOLERANCE_NATS, f"{len(wrote)} tokens, off by {off:.3f} nats"


class Cut(NamedTuple):
    """A greedy answer in two: what is given back to the endpoint, and what it must go on with."""

    prefix: str
    rest: str
    token: TokenLogprob | None
    """The first of the rest; None where there are no logprobs."""


def cut(text: str, tokens: list[TokenLogprob]) -> Cut | None:
    """In the middle half, before a space, where the answer was least sure; None where there is no such place."""
    places = [i for i in range(len(tokens) // 4, 3 * len(tokens) // 4 + 1) if 0 < i < len(tokens)]
    places = [i for i in places if scores.spelling(tokens[i]).startswith(" ")]
    if places:
        at = min(places, key=lambda i: tokens[i].logprob)
        length = len("".join(scores.spelling(token) for token in tokens[:at]))
        return Cut(text[:length], text[length:], tokens[at])
    length = text.find(" ", len(text) // 2)
    return Cut(text[:length], text[length:], None) if length > 0 and text[length:].strip() else None


def continues(answer: Answer, given: Cut) -> Verdict:
    """Whether an answer goes on where the greedy one was cut, rather than starting anew."""
    if not answer.choices:
        return False, answer.no
    tokens = scores.choice_tokens(answer.choices[0])
    if given.token and tokens:
        value = scores.shown(given.token, tokens[0])
        if value is None:
            return False, "ignored: the answer does not go on with the same token"
        off = abs(value - given.token.logprob)
        return off <= TOLERANCE_NATS, f"the next token is off by {off:.3f} nats"
    new, rest = answer.texts[0].removeprefix(given.prefix).strip(), given.rest.strip()
    if new and (rest.startswith(new) or new.startswith(rest)):
        return True, "the answer goes on with the same words"
    return False, "ignored: the answer does not go on with the same words"


def prefill_reply(answer: Answer, given: Cut) -> tuple[PrefillReply, str]:
    """What the text of an answer that goes on holds. The cut is before a space, so that is how what is new begins."""
    text = answer.texts[0]
    new = text.removeprefix(given.prefix)
    if not new[:1].isspace():
        return "stripped", "what is new lacks the space that it should begin with"
    return ("new", "the text is what is new") if new == text else ("whole", "the text begins with what was given")


def hides_reasoning(answer: Answer) -> Verdict:
    """Whether tokens are billed that are neither in the text nor in a reasoning field.

    Some count them in `reasoning_tokens`, some only in the total.
    """
    usage, get = answer.data.get("usage"), scores.get
    total, prompt, written = (get(usage, f"{n}_tokens") or 0 for n in ("total", "prompt", "completion"))
    unnamed = max(0, total - prompt - written)
    billed = get(get(usage, "completion_tokens_details"), "reasoning_tokens") or unnamed
    message = get(answer.choices[0], "message") if answer.choices else None
    is_shown = bool(get(message, "reasoning_content") or get(message, "reasoning"))
    return billed > 0 and not is_shown, f"{billed} reasoning tokens, {'shown' if is_shown else 'none shown'}"


def heeds_temperature(greedy: Answer, again: Answer, draws: Sequence[Answer]) -> Verdict:
    """0 takes the likeliest token, or (without logprobs) the same text under another seed; 1 does not always."""
    if not any(greedy.texts):
        return False, greedy.no or "no text to tell by"
    if not (scores.greedy(greedy.tokens) if greedy.alternatives else greedy.texts == again.texts):
        return False, again.no or "ignored: an answer at temperature 0 is not the likeliest"
    texts = [text for draw in draws for text in draw.texts]
    if set(texts) <= set(greedy.texts):
        refused = "".join(draw.no for draw in draws[:1])
        return False, refused or "ignored: at temperature 1 every answer is the greedy one"
    return True, f"0 is greedy, {len(set(texts))} of {len(texts)} answers at 1 are different"


def heeds_seed(first: Answer, same: Answer, other: Answer, *, sent: bool) -> Verdict:
    """A seed repeats a draw at temperature 1, and another seed does not."""
    if not sent or not (first.texts and same.texts and other.texts):
        return False, first.no or same.no or other.no or "none is sent (teacher.seed, teacher.omit_params)"
    if first.texts[0] != same.texts[0]:
        return False, "ignored: the same seed gives another text"
    different = first.texts[0] != other.texts[0]
    return different, "repeats its text" if different else "ignored: every seed gives the same text"


def rate_headers(headers: Mapping[str, str]) -> list[str]:
    """Names (in lower case) of the headers that tell what is left of a rate limit."""
    return sorted(name for name in headers if "ratelimit" in name.replace("-", "") and "remaining" in name)


def _text(choice: Any) -> str:
    """Of a chat or a completions choice."""
    message = scores.get(choice, "message")
    text = scores.get(choice, "text") if message is None else scores.get(message, "content")
    return text if isinstance(text, str) else ""
