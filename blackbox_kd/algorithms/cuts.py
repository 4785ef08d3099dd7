"""Where a student's draft can be cut, so that a teacher with other tokens goes on from the very state of the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blackbox_kd.align import StudentVocab
from blackbox_kd.errors import AlignmentError
from blackbox_kd.health import entropy
from blackbox_kd.teachers.base import Capabilities
from blackbox_kd.types import Rollout


class Cut(NamedTuple):
    """A place in a draft, before one of its tokens."""

    rollout: Rollout
    token: int
    """Completion tokens before it, at least 1."""
    text: str
    """What they spell."""
    entropy: float
    """Nats: how unsure the student was of the next token."""

    @property
    def depth(self) -> float:
        """Share of the draft before it, below 1."""
        return self.token / len(self.rollout.completion_ids)


def peaks(rollout: Rollout, vocab: StudentVocab, count: int, within: float = 1.0) -> list[Cut]:
    """The `count` places where the student was least sure, in order, in the first share `within` of the draft.

    Empty for a draft without a place, also where its tokens do not spell its text (a special token, half a character).

    Raises:
        AlignmentError: the draft does not have a distribution for each of its tokens.
    """
    ids = rollout.completion_ids
    if rollout.top is None or len(rollout.top.ids) != len(ids):
        raise AlignmentError(f"rollout {rollout.completion.completion_id} has no distributions of its {len(ids)} tokens")
    near = [cut for cut in places(rollout, vocab) if cut.depth <= within]
    return sorted(sorted(near, key=lambda cut: -cut.entropy)[:count], key=lambda cut: cut.token)


def places(rollout: Rollout, vocab: StudentVocab) -> list[Cut]:
    """All places before a token where the text can end.

    Not in a character or a word: another tokenizer has no cut there, and its next token would be about another word.
    Not behind whitespace: most tokenizers put a space into the token that follows, some endpoints strip or refuse it.
    Not at the start: an empty text is none to go on with.
    """
    raw = rollout.completion.text.encode()
    try:
        starts, _ = vocab.starts(raw, rollout.completion_ids)
    except AlignmentError:
        return []
    return [
        Cut(rollout, token, raw[:byte].decode(), float(nats))
        for token, (byte, nats) in enumerate(zip(starts.tolist(), entropy(rollout.top), strict=True))
        if token and _ends(raw[:byte], raw[byte:])
    ]


def _ends(before: bytes, behind: bytes) -> bool:
    try:
        text, rest = before.decode(), behind.decode()
    except UnicodeDecodeError:
        return False
    return bool(text) and not text[-1].isspace() and not (text[-1].isalnum() and rest[:1].isalnum())


def cannot_go_on(can: Capabilities) -> str | None:
    """Why an endpoint cannot be asked about a cut; None where it can."""
    if can.prefill != "none":
        return None
    return (
        "the endpoint is not known to go on with a given text; run `probe`, or set teacher.capabilities.prefill if you "
        "know that it does"
    )


def unusable(reasons: Sequence[str], asked: int) -> str:
    """One line for a person about replies that do not fit."""
    return f"{len(reasons)} of {asked} replies cannot be used ({reasons[0]})"
