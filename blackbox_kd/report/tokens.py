"""A text in the pieces that its writer wrote, each with its logprob. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BOUNDS = (0.9, 0.5, 0.2, 0.05)
"""Probabilities that part the colours: piece 0 is at least the first, piece 4 below the last."""
FARTHEST = 6
"""Characters for each token that could not be placed, within which the next one must be found."""


class Piece(NamedTuple):
    """Characters of a text with the logprob of the token that wrote them."""

    text: str
    logprob: float | None
    """Natural; the sum where several tokens share a character, None where it is not known."""

    @property
    def tone(self) -> int | None:
        """0 for a sure token to 4 for the least sure."""
        if self.logprob is None:
            return None
        p = math.exp(self.logprob)
        return next((tone for tone, bound in enumerate(BOUNDS) if p >= bound), len(BOUNDS))


def pieces(text: str, tokens: Sequence[tuple[str, float | None]]) -> list[Piece]:
    """The text cut at its tokens; put together again it is the text, whatever the tokens say.

    A token that is no whole characters (a byte of an emoji), or is spelt otherwise than in the text (a tokenizer that
    leaves out spaces), is joined with those beside it until the text goes on with the next one.
    """
    return list(_merged(text, tokens)) if tokens else [Piece(text, None)]


def _merged(text: str, tokens: Sequence[tuple[str, float | None]]) -> Iterator[Piece]:
    at, waiting = 0, list[float | None]()
    for token, logprob in tokens:
        found = text.find(token, at + bool(waiting), at + FARTHEST * (len(waiting) + 1) + len(token)) if token else -1
        if found < 0:
            waiting.append(logprob)
            continue
        if waiting:
            yield Piece(text[at:found], _sum(waiting))
            at, waiting = found, []
        yield Piece(text[at : found + len(token)], logprob)  # with a space that the token leaves out
        at = found + len(token)
    if at < len(text):
        yield Piece(text[at:], _sum(waiting))


def _sum(logprobs: Sequence[float | None]) -> float | None:
    known = [value for value in logprobs if value is not None]
    return sum(known) if known else None
