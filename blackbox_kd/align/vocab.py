"""The student's vocabulary in bytes, and whether it is the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from blackbox_kd.align.spelling import mismatch, spell, starts
from blackbox_kd.errors import AlignmentError
from blackbox_kd.types import TeacherTokens, VocabToken

UNMAPPABLE = -1
SAME_SHARE = 0.98
"""Of the teacher's tokens that are the student's, for one tokenizer: at temperature 1 a model now and then spells a
word in an uncommon way."""
EXACT_SHARE = 0.8
"""Of the tokens that were seen: the others may be special, or bytes of characters that are shown whole."""


class StudentVocab:
    """What the student's tokens spell.

    Args:
        spelled: bytes of every token id, None for special tokens.
        encode: text in the middle of an answer -> ids.
        end_id: the token that ends an answer.
        encode_first: text at the start of an answer -> ids, where that differs (a SentencePiece dummy prefix).
    """

    def __init__(
        self,
        spelled: Sequence[bytes | None],
        encode: Callable[[str], list[int]],
        end_id: int,
        *,
        encode_first: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.spelled = spelled
        self.encode = encode
        self.encode_first = encode_first or encode
        self.end_id = end_id
        self.lengths = np.array([len(piece or b"") for piece in spelled], np.int64)
        self.id_of = {piece: i for i, piece in reversed(list(enumerate(spelled))) if piece}
        self._longest = max(map(len, self.id_of), default=0)

    def starts(self, raw: bytes, ids: Sequence[int]) -> tuple[np.ndarray, bool]:
        """(S,) byte at which each token starts, and whether the tokens begin with a space that the text lacks.

        Raises:
            AlignmentError: the tokens do not spell the text.
        """
        written = ids[:-1] if len(ids) and ids[-1] == self.end_id else ids
        whole = b"".join(piece for piece in map(self.spelled.__getitem__, written) if piece)
        dummy = whole != raw and whole == b" " + raw
        if whole != raw and not dummy:
            raise mismatch("the student's tokens", whole, raw)
        lengths = self.lengths[np.asarray(ids, np.int64)]
        return np.maximum(np.cumsum(lengths) - lengths - dummy, 0), dummy

    def first(self, candidate: bytes, *, dummy: bool = False) -> int:
        """The first token of a candidate's own tokenisation; -1 where there is none that spells its beginning."""
        try:
            text = candidate.decode()
        except UnicodeDecodeError as error:
            return self._first_of_cut(candidate, candidate[: error.start], dummy)
        ids = (self.encode_first if dummy else self.encode)(text)
        piece = self.spelled[ids[0]] if ids else None
        return ids[0] if piece and (b" " * dummy + candidate).startswith(piece) else UNMAPPABLE

    def _first_of_cut(self, candidate: bytes, whole: bytes, dummy: bool) -> int:
        """Of bytes that cut a character: that of the whole characters before it, else the longest token that fits."""
        if (exact := self.id_of.get(candidate)) is not None:
            return exact
        if whole:
            return self.first(whole, dummy=dummy)
        lengths = range(min(len(candidate), self._longest), 0, -1)
        return next((self.id_of[candidate[:n]] for n in lengths if candidate[:n] in self.id_of), UNMAPPABLE)


def same_tokenizer(
    vocab: Mapping[int, VocabToken],
    student: StudentVocab,
    scored: Iterable[tuple[str, TeacherTokens, Sequence[int]]],
    *,
    end_ids: Collection[int],
) -> bool:
    """Whether teacher and student have one tokenizer, by all that is known of it.

    Without ids from the endpoint, every token that was seen has to be a student token, and completions have to be cut
    alike: `scored` is some of them, as (text, the teacher's tokens, the student's ids).
    """
    spelled = spell(vocab) | dict.fromkeys(end_ids, b"")
    if ids_agree(spelled, student):
        return True
    if any(piece and piece not in student.id_of for piece in spelled.values()):
        return False
    alike = [_alike(text.encode(), teacher, ids, spelled, student) for text, teacher, ids in scored]
    same, tokens = sum(a for a, _ in alike), sum(n for _, n in alike)
    return tokens > 0 and same >= SAME_SHARE * tokens


def ids_agree(spelled: Mapping[int, bytes | None], student: StudentVocab) -> bool:
    """Whether the endpoint gives ids, and every token that was seen is the student's of that id."""
    size = len(student.spelled)
    seen = [(student.spelled[i] if 0 <= i < size else b"", piece) for i, piece in spelled.items() if piece or i < 0]
    exact = sum(own == piece for own, piece in seen)
    return exact > 0 and exact >= EXACT_SHARE * len(seen) and all(_shows(piece or b"", own) for own, piece in seen)


def _shows(piece: bytes, own: bytes | None) -> bool:
    """Whether `piece` may be how this token is shown.

    llama.cpp shows a whole character at the token that ends it, and of a token that begins one what stands before it.
    """
    if own is None or piece == own:
        return True
    whole = own.decode("utf-8", "ignore").encode()
    return bool(own) and whole != own and (piece == whole or piece.endswith(own))


def _alike(
    raw: bytes, teacher: TeacherTokens, ids: Sequence[int], spelled: Mapping[int, bytes | None], student: StudentVocab
) -> tuple[int, int]:
    """How many of the teacher's tokens in a text are the student's, and how many there are."""
    pieces = [spelled.get(i) for i in teacher.token_ids.tolist()]
    if None in pieces:
        return 0, 0
    try:
        of_teacher = starts(raw, pieces, []).tolist()
        of_student = student.starts(raw, ids)[0].tolist()
    except AlignmentError:
        return 0, len(pieces)
    theirs = {(at, piece) for at, piece in zip(of_teacher, pieces, strict=True) if piece and at >= 0}
    theirs = {(at, piece) for at, piece in theirs if at + len(piece or b"") <= len(raw)}
    return len(theirs & {(at, student.spelled[i]) for at, i in zip(of_student, ids, strict=True)}), len(theirs)
