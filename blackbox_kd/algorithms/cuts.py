"""Where a student's draft can be cut, so that a teacher with other tokens goes on from the student's very state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from blackbox_kd.align import StudentVocab
from blackbox_kd.errors import AlignmentError
from blackbox_kd.health import entropy
from blackbox_kd.teachers.base import Capabilities, Prefill
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Feedback, Purpose, Request, Rollout, SamplingParams


class Cut(NamedTuple):
    """A place in a draft, before one of its tokens."""

    rollout: Rollout
    token: int
    """Completion tokens before it."""
    text: str
    """What they spell."""
    entropy: float
    """Nats: how unsure the student was of the next token."""

    @property
    def depth(self) -> float:
        """Share of the draft before it, below 1."""
        return self.token / len(self.rollout.completion_ids)


def peaks(rollout: Rollout, vocab: StudentVocab, count: int, *, within: float = 1.0, start: bool = False) -> list[Cut]:
    """The `count` places where the student was least sure, in order, in the first share `within` of the draft.

    `start`: also before its first token, where nothing is given to go on with. Empty for a draft without a place.

    Raises:
        AlignmentError: the draft does not have a distribution for each of its tokens.
    """
    ids = rollout.completion_ids
    if rollout.top is None or len(rollout.top.ids) != len(ids):
        name = rollout.completion.completion_id
        raise AlignmentError(f"rollout {name} has no distribution for each of its {len(ids)} tokens")
    near = [cut for cut in places(rollout, vocab) if cut.depth <= within and (cut.token or start)]
    return sorted(sorted(near, key=lambda cut: -cut.entropy)[:count], key=lambda cut: cut.token)


def places(rollout: Rollout, vocab: StudentVocab) -> list[Cut]:
    """All places before a token where the text can end.

    Not in a character or a word: another tokenizer has no cut there, and its next token would be about another word.
    Not behind whitespace: most tokenizers put a space into the token that follows, some endpoints strip or refuse it.
    Not behind tokens that do not spell the text: a special one, half a character, a space that only the tokens have.
    """
    raw, ids = rollout.completion.text.encode(), rollout.completion_ids
    pieces = [vocab.spelled[i] or b"" for i in ids]
    dummy = bool(ids) and pieces[0].startswith(b" ") and not raw.startswith(b" ")
    found, spelled = list[Cut](), b""
    for token, (piece, nats) in enumerate(zip(pieces, entropy(rollout.top), strict=True)):
        before = spelled[dummy:]
        if not raw.startswith(before):
            break
        if _ends(before, raw[len(before) :]) if token else not dummy:
            found.append(Cut(rollout, token, before.decode(), float(nats)))
        spelled += piece
    return found


def _ends(before: bytes, behind: bytes) -> bool:
    try:
        text, rest = before.decode(), behind.decode()
    except UnicodeDecodeError:
        return False
    return bool(text) and not text[-1].isspace() and not (text[-1].isalnum() and rest[:1].isalnum())


def go_on(teacher: Teacher, cut: Cut, purpose: Purpose, sampling: SamplingParams, form: Prefill) -> Request:
    """To go on from there; at the start, where nothing is given, to answer."""
    by = cut.rollout.completion.completion_id
    return teacher.request(cut.rollout.prompt, purpose, sampling, completion_id=by, given=cut.text or None, form=form)


def said(cut: Cut, kind: str, reply_id: str, by: str) -> Feedback:
    """What the scorer `by` replied there."""
    return Feedback(
        completion_id=cut.rollout.completion.completion_id,
        kind=kind,
        scorer=by,
        target_completion_id=reply_id,
        detail={"cut_byte": len(cut.text.encode()), "entropy": round(cut.entropy, 3)},
    )


def unusable(reasons: Sequence[str], asked: int) -> str:
    """One line for a person about replies that do not fit."""
    return f"{len(reasons)} of {asked} replies cannot be used ({reasons[0]})"


def cannot_go_on(can: Capabilities) -> str | None:
    """Why an endpoint cannot be asked about a cut; None where it can."""
    if can.prefill == "none":
        return "the endpoint is not known to go on with a given text; run `probe`, or set teacher.capabilities.prefill"
    if can.prefill_reply == "stripped":
        return "where the endpoint goes on with a given text, the space between the two is lost"
    return None
