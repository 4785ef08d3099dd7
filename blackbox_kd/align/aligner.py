"""A teacher's top-k in its own tokens -> soft labels in the student's tokens. Pure: numpy only.

Both tokenisations of a text are cuts in its bytes. Where both have a cut, each of the teacher's candidates there is
mapped to its image: the student's first token of that candidate. Masses of one image are added up. This is exact but
for candidates that a longer student token may swallow (teacher " un", student " until"): their mass is left out, as is
that of candidates without an image, so that a loss counts it in its tail; both are measured. Cf. GOLD's byte offsets
(Hugging Face 2025) and ULD (Boizard et al. 2024), which need the teacher's whole logits.

Which candidates are ambiguous. Taken literally, nearly every short word begins a longer student token (" the",
" theology"). But a teacher that means " theology" and owns " theo" does not begin with " the". So a student token s
makes candidate c ambiguous only where c is the longest known teacher token that s begins with (and is not s). This is
exact for a teacher that spells by longest match, and the better the more of its vocabulary is known. It still is a
third of all English text: one rare word makes a common one ambiguous. How often that happens is in the corpus: an
ambiguous candidate that was drawn n times, and became its image m times, is mapped with the share m / (n + 1) of its
mass (`observe`); what was never drawn is left out whole. That is true on average over the corpus, not in each row.

The candidate that was sampled needs no rule: the text shows what came of it. All of its mass goes to the student token
that really stands there, a draw from P(student token | candidate), hence unbiased given that candidate.

S student tokens (end token included), T teacher tokens, K alternatives, R rows with a shared cut, W = K + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set

import numpy as np

from blackbox_kd.align.labels import NO_ID, SoftLabels, soft_labels
from blackbox_kd.align.spans import Span, common_spans
from blackbox_kd.align.spelling import lstrip, spell, starts
from blackbox_kd.align.vocab import UNMAPPABLE, StudentVocab, ids_agree
from blackbox_kd.errors import AlignmentError
from blackbox_kd.types import TeacherTokens, VocabToken

MOST_MASS = 1.05
"""Probabilities of a row may sum up to this: logprobs are rounded, and some servers compute them coarsely."""

_UNSEEN = -2
_SAME_NATS = 2e-3


class Aligner:
    """Aligns the completions of one scorer with one student; what it learns of a token it keeps.

    Args:
        vocab: the scorer's tokens (`Corpus.vocab`).
        student: the student's.
        end_ids: scorer tokens that end an answer (`spelling.learn_end_ids`).
        known: more tokens that the teacher owns, such as the vocabulary of its named tokenizer.
        same: both have one tokenizer, by the verdict of `same_tokenizer`. Where the endpoint gives ids, and each that
            was seen is the student's token of that id, this is found out here.
    """

    def __init__(
        self,
        vocab: Mapping[int, VocabToken],
        student: StudentVocab,
        *,
        end_ids: Collection[int],
        known: Iterable[bytes] | None = None,
        same: bool = False,
    ) -> None:
        self.student = student
        self.spelled = spell(vocab) | dict.fromkeys(end_ids, b"")
        self.same_ids = ids_agree(self.spelled, student)
        self.same = same or self.same_ids
        if self.same_ids:  # then the student's bytes are known also where the endpoint shows none, or others
            own = {i: student.spelled[i] for i in self.spelled if i not in end_ids and i < len(student.spelled)}
            self.spelled |= {i: piece for i, piece in own.items() if piece is not None}
        self._texts = {token_id: token.text for token_id, token in vocab.items()}
        self._owned = {piece for piece in self.spelled.values() if piece} | set(known or ())
        ids = [i for i in self.spelled if i < NO_ID] or [0]
        self._base, self._unknown = min(ids), max(ids) - min(ids) + 1
        self._is_end, self._cut, self._mute = (np.zeros(self._unknown + 1, bool) for _ in range(3))
        slots = np.array(ids) - self._base
        self._is_end[slots] = [i in end_ids for i in ids]
        self._cut[slots] = [self.spelled.get(i) is None for i in ids]
        self._mute[slots] = [self.spelled.get(i) == b"" and i not in end_ids for i in ids]
        self._views: dict[tuple[bool, bool], _View] = {}

    def observe(self, scored: Iterable[tuple[str, TeacherTokens, Sequence[int]]]) -> None:
        """Learn from completions, once and before any is aligned, what becomes of ambiguous tokens.

        `scored` = (text, teacher's tokens, student's ids), as for `align`; what cannot be aligned is passed over.
        """
        for text, teacher, student_ids in () if self.same else scored:
            try:
                rows, at, _ = self._meet(text.encode(), teacher, student_ids)
            except AlignmentError:
                continue
            inside = rows > 0
            slots, real = self._slots(teacher.token_ids[at[inside]]), np.asarray(student_ids)[rows[inside]]
            self._view(False, False).observe(slots, real)

    def align(
        self, text: str, teacher: TeacherTokens, student_ids: Sequence[int], *, written_by_teacher: bool = True
    ) -> SoftLabels:
        """Soft labels for one completion.

        Args:
            text: as it is trained on; whitespace around it may have been stripped. Candidates for its first token are
                then compared without the whitespace that they begin with, and the end has a label only where the
                teacher's end stands right behind the stripped text.
            teacher: the tokens and alternatives of the whole completion.
            student_ids: S tokens of `text`, with the end token where it is trained.
            written_by_teacher: what the teacher drew became the student's token that stands there, with all of its
                mass. A token that the teacher was only made to read did not: it counts as any other candidate.

        Raises:
            AlignmentError: tokens of either side do not spell the text, or the probabilities of a row sum up to more
                than 1.
        """
        rows, at, start = self._meet(text.encode(), teacher, student_ids)
        slots = self._slots(np.concatenate([teacher.top_ids[at], teacher.token_ids[at][:, None]], 1))
        p, drawn = self._masses(slots, teacher.top_logprobs[at], teacher.token_logprobs[at])
        student = np.asarray(student_ids, np.int64)
        image, share = self._mapped(slots, drawn & written_by_teacher, rows, student, start)
        return soft_labels(len(student), rows, image, share, p)

    def spans(self, text: str, teacher: TeacherTokens, student_ids: Sequence[int]) -> list[Span]:
        """The shortest runs of tokens that spell the same on both sides, in order; the end of both is one.

        Raises:
            AlignmentError: tokens of either side do not spell the text.
        """
        raw = text.encode()
        student_starts, _ = self.student.starts(raw, student_ids)
        teacher_starts = np.maximum(self._starts(raw, teacher.token_ids.tolist())[0], 0)
        found = common_spans(student_starts, teacher_starts, len(raw))
        last = self._slots(teacher.token_ids[-1:])
        if len(last) and self._is_end[last[0]] and list(student_ids[-1:]) == [self.student.end_id]:
            found.append(Span(*(slice(n - 1, n) for n in (len(student_ids), len(teacher.token_ids)))))
        return found

    def candidates(self, teacher: TeacherTokens) -> SoftLabels:
        """Soft labels at T places in the middle of texts, of which nothing but the candidates is known.

        As where one token is asked for behind a given text: what would have come of the drawn one is not to be seen, so
        it counts as any other. Row t is about place t.

        Raises:
            AlignmentError: the probabilities of a row sum up to more than 1.
        """
        slots = self._slots(np.concatenate([teacher.top_ids, teacher.token_ids[:, None]], 1))
        p, _ = self._masses(slots, teacher.top_logprobs, teacher.token_logprobs)
        image, share = self._view(False, False).of(slots)
        return soft_labels(len(slots), np.arange(len(slots)), image, share, p)

    def _slots(self, ids: np.ndarray) -> np.ndarray:
        """Where a token is in the tables; all that are in no vocabulary are in the last place."""
        slots = ids - self._base
        slots[(slots < 0) | (slots > self._unknown)] = self._unknown
        return slots

    def _meet(
        self, raw: bytes, teacher: TeacherTokens, student_ids: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, tuple[bool, bool]]:
        """(R,) student and (R,) teacher tokens that start together, and how the start of the text was changed.

        Tokens that spell nothing share their start with the next: what they stand for is not known, unless an end.
        """
        student_starts, dummy = self.student.starts(raw, student_ids)
        teacher_starts, stripped = self._starts(raw, teacher.token_ids.tolist())
        if not len(teacher_starts):
            return np.zeros(0, np.int64), np.zeros(0, np.int64), (stripped, dummy)
        at = np.searchsorted(teacher_starts, student_starts)
        fits = at < len(teacher_starts)
        at[~fits] = 0
        fits &= teacher_starts[at] == student_starts
        fits[1:] &= student_starts[1:] != student_starts[:-1]
        drawn = self._slots(teacher.token_ids[at])
        fits &= ~self._mute[drawn] & (self._is_end[drawn] == (student_starts >= len(raw)))
        rows = np.flatnonzero(fits)
        return rows, at[rows], (stripped, dummy)

    def _starts(self, raw: bytes, ids: list[int]) -> tuple[np.ndarray, bool]:
        """(T,) where tokens start, that with the first byte of the text at 0; whether whitespace was stripped there."""
        try:
            spelled = list(map(self.spelled.__getitem__, ids))
        except KeyError as error:
            raise AlignmentError(f"token {error} of a completion is not in the vocabulary of its scorer") from error
        found = starts(raw, spelled, [self._texts.get(i, "") for i in ids] if None in spelled else [])
        stripped = bool(len(found) and found[0] < 0)
        if stripped:
            found[np.searchsorted(found, 0, "right") - 1] = 0
        return found, stripped

    def _masses(
        self, slots_RW: np.ndarray, top_logprobs_RK: np.ndarray, logprobs_R: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(R, W) probability of each candidate, and which of them is the one that was drawn; it counts once.

        Cut characters look alike: the drawn one is that with its logprob.
        """
        drawn = slots_RW == slots_RW[:, -1:]
        cut = self._cut[slots_RW[:, -1:]]
        if cut.any():
            drawn[:, :-1] &= ~(cut & (np.abs(top_logprobs_RK - logprobs_R[:, None]) > _SAME_NATS))
        inside = (drawn[:, :-1] & (top_logprobs_RK > -np.inf)).any(1)
        last = np.where(inside | np.isnan(logprobs_R), -np.inf, logprobs_R)
        p = np.exp(np.concatenate([top_logprobs_RK, last[:, None]], 1))
        if p.sum(1).max(initial=0.0) > MOST_MASS:
            raise AlignmentError(
                f"the probabilities that the teacher shows for one token sum up to {p.sum(1).max():.2f}: its "
                "alternatives do not belong to its tokens"
            )
        return p, drawn

    def _mapped(
        self, slots: np.ndarray, drawn: np.ndarray, rows: np.ndarray, student: np.ndarray, start: tuple[bool, bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(R, W) images, -1 where there is none, and (R, W) the share of the mass that is mapped to them."""
        image, share = self._view(False, False).of(slots)
        real = np.where(self._is_end[slots[:, -1:]], self.student.end_id, student[rows][:, None])
        seen = drawn & (not self.same)  # with one tokenizer a token is its own image, whatever the text became
        if any(start) and len(rows) and rows[0] == 0 and not (self.same and image[0, -1] == student[0]):
            image[0], share[0] = self._view(*start).of(slots[0])
            seen[0] = drawn[0]
        return np.where(seen, real, image), np.where(seen, 1.0, share)

    def _view(self, strip: bool, dummy: bool) -> _View:
        """Images in the middle of a text (False, False), or at its start."""
        if (strip, dummy) not in self._views:
            self._views[strip, dummy] = _View(self._unknown + 1, *self._mapping(strip, dummy))
        return self._views[strip, dummy]

    def _mapping(self, strip: bool, dummy: bool) -> tuple[Callable[[int], int], Callable[[int], bool]]:
        """slot -> its image, and whether that is ambiguous."""
        if self.same and not (strip or dummy):
            return self._same_token, lambda slot: False
        bare = lstrip if strip else bytes
        student = (piece[dummy:] for piece in self.student.id_of if not dummy or piece.startswith(b" "))
        swallowed = _swallowed(student, {bare(piece) for piece in self._owned})

        def image(slot: int) -> int:
            token_id = slot + self._base
            if self._is_end[slot]:
                return self.student.end_id
            piece = bare(self.spelled.get(token_id) or b"")
            return self.student.first(piece, dummy=dummy) if piece else UNMAPPABLE

        return image, lambda slot: bare(self.spelled.get(slot + self._base) or b"") in swallowed

    def _same_token(self, slot: int) -> int:
        if self.same_ids:
            token_id = slot + self._base if slot < self._unknown else UNMAPPABLE
            return token_id if 0 <= token_id < len(self.student.spelled) else UNMAPPABLE
        piece = self.spelled.get(slot + self._base)
        return self.student.end_id if self._is_end[slot] else self.student.id_of.get(piece or b"", UNMAPPABLE)


class _View:
    """slot -> image and the share of its mass that is mapped to it, as tables that are filled where they are read."""

    def __init__(self, slots: int, image: Callable[[int], int], ambiguous: Callable[[int], bool]) -> None:
        self._image, self._share = np.full(slots, _UNSEEN, np.int64), np.ones(slots)
        self._drawn, self._kept, self._ambiguous = np.zeros(slots), np.zeros(slots), np.zeros(slots, bool)
        self._rules = image, ambiguous

    def of(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies, in the shape of `slots`."""
        image = self._image[slots]
        if image.size and image.min() == _UNSEEN:
            for slot in np.unique(slots[image == _UNSEEN]).tolist():
                self._image[slot], self._ambiguous[slot] = (rule(slot) for rule in self._rules)
                self._share[slot] = not self._ambiguous[slot]
            image = self._image[slots]
        return image, self._share[slots]

    def observe(self, slots_R: np.ndarray, real_R: np.ndarray) -> None:
        """Each slot was drawn, and the student token `real_R` came of it."""
        image, _ = self.of(slots_R)
        np.add.at(self._drawn, slots_R, 1)
        np.add.at(self._kept, slots_R, image == real_R)
        share = self._kept[slots_R] / (self._drawn[slots_R] + 1)
        self._share[slots_R] = np.where(self._ambiguous[slots_R], share, 1.0)


def _swallowed(student: Iterable[bytes], teacher: Set[bytes]) -> set[bytes]:
    """Teacher tokens with which the teacher begins to spell a student token that it does not own."""
    found = set()
    for piece in student:
        length = next((n for n in range(len(piece), 0, -1) if piece[:n] in teacher), 0)
        if 0 < length < len(piece):
            found.add(piece[:length])
    return found
