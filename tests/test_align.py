"""Alignment on vocabularies small enough to know the truth, and the odd things that endpoints show."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackbox_kd.align import Aligner, SoftLabels, StudentVocab, check_not_shifted, learn_end_ids
from blackbox_kd.align.spelling import spell, starts
from blackbox_kd.errors import AlignmentError
from blackbox_kd.types import TeacherTokens, VocabToken

INF = math.inf


def longest_match(pieces: Sequence[str], text: str) -> list[int]:
    """Ids of a text by longest match; the id behind the last stands for what cannot be spelt."""
    found, at = [], 0
    while at < len(text):
        fits = [i for i, piece in enumerate(pieces) if text.startswith(piece, at)]
        if not fits:
            return [*found, len(pieces)]
        found.append(max(fits, key=lambda i: len(pieces[i])))
        at += len(pieces[found[-1]])
    return found


def student_of(pieces: Sequence[str]) -> StudentVocab:
    """The last id is the end token."""
    spelled: list[bytes | None] = [piece.encode() for piece in pieces]
    return StudentVocab([*spelled, None], lambda text: longest_match(pieces, text), len(pieces))


def vocab_of(*texts: str) -> dict[int, VocabToken]:
    """-1, -2, ..., with their bytes; "" is an end token without."""
    return {-i: VocabToken(text, text.encode() if text else None) for i, text in enumerate(texts, 1)}


def tokens(vocab: dict[int, VocabToken], *rows: tuple[str, float, dict[str, float]]) -> TeacherTokens:
    """(token, probability, alternatives) each; a probability of 0 is hidden."""
    ids = {token.text: i for i, token in vocab.items()}
    top = max(len(shown) for _, _, shown in rows)
    top_ids, top_p = np.zeros((len(rows), top), np.int64), np.zeros((len(rows), top))
    for t, (_, _, shown) in enumerate(rows):
        for k, (text, p) in enumerate(shown.items()):
            top_ids[t, k], top_p[t, k] = ids[text], p
    with np.errstate(divide="ignore"):
        own = np.array([math.log(p) if p else math.nan for _, p, _ in rows])
        return TeacherTokens(np.array([ids[text] for text, _, _ in rows]), own, top_ids, np.log(top_p))


def read(labels: SoftLabels, student: StudentVocab) -> list[dict[str, float]]:
    """Rows as {text: probability}; "$" is the end."""
    spelled = {i: (piece or b"$").decode("utf-8", "replace") for i, piece in enumerate(student.spelled)}
    return [
        {spelled[i]: round(math.exp(v), 6) for i, v in zip(ids, values, strict=True) if v > -INF}
        for ids, values in zip(labels.ids.tolist(), labels.logprobs.tolist(), strict=True)
    ]


# --- against the truth: a teacher over a small vocabulary, every text enumerated


ALPHABET = "ab"
LENGTH = 4
TEXTS = ["".join(chars) for n in range(1, LENGTH + 1) for chars in itertools.product(ALPHABET, repeat=n)]
WORDS = [w for w in TEXTS if 1 < len(w) <= 3]


class ToyTeacher:
    """A distribution over TEXTS, spelt by longest match; the vocabulary's last token is the end."""

    def __init__(self, pieces: list[str], seed: int) -> None:
        self.pieces = [*ALPHABET, *pieces]
        self.end = len(self.pieces)
        self.weights = dict(zip(TEXTS, np.random.default_rng(seed).dirichlet(np.full(len(TEXTS), 0.5)), strict=True))
        self.spelt = {text: [*longest_match(self.pieces, text), self.end] for text in TEXTS}

    def like(self, prefix: list[int]) -> list[str]:
        """Texts that begin with these tokens."""
        return [text for text, ids in self.spelt.items() if ids[: len(prefix)] == prefix]

    def next_tokens(self, prefix: list[int]) -> np.ndarray:
        """(V + 1,) probability of each token behind a prefix."""
        p = np.zeros(self.end + 1)
        for text in self.like(prefix):
            p[self.spelt[text][len(prefix)]] += self.weights[text]
        return p / p.sum()

    def scored(self, text: str) -> TeacherTokens:
        """All of the distribution at each token."""
        ids = self.spelt[text]
        p = np.array([self.next_tokens(ids[:t]) for t in range(len(ids))])
        with np.errstate(divide="ignore"):
            top = np.log(p)
        shown = np.broadcast_to(np.arange(self.end + 1), top.shape).copy()
        return TeacherTokens(np.array(ids), top[np.arange(len(ids)), ids], shown, top)

    def vocab(self) -> dict[int, VocabToken]:
        """Ids from 100, so that they are nobody else's."""
        return {i: VocabToken(piece, piece.encode()) for i, piece in enumerate([*self.pieces, "</s>"])}


def truth(teacher: ToyTeacher, prefix: list[int], student: StudentVocab) -> tuple[np.ndarray, np.ndarray]:
    """(V student,) the student's first token behind a prefix; and the same by teacher token (V teacher, V student)."""
    joint = np.zeros((teacher.end + 1, len(student.spelled)))
    done = len("".join(teacher.pieces[i] for i in prefix))
    for text in teacher.like(prefix):
        first = student.encode(text[done:])[0] if text[done:] else student.end_id
        joint[teacher.spelt[text][len(prefix)], first] += teacher.weights[text]
    joint /= joint.sum()
    return joint.sum(0), joint


@settings(max_examples=60, deadline=None)
@given(
    theirs=st.lists(st.sampled_from(WORDS), max_size=5, unique=True),
    ours=st.lists(st.sampled_from(WORDS), max_size=6, unique=True),
    seed=st.integers(0, 99),
)
def test_labels_are_the_truth_but_for_what_is_ambiguous(theirs: list[str], ours: list[str], seed: int) -> None:
    teacher, student = ToyTeacher(theirs, seed), student_of([*ALPHABET, *ours])
    # As -1, -2, ...: ids that may be the student's own are no evidence of anything.
    vocab = {-i - 1: token for i, token in teacher.vocab().items()}
    aligner = Aligner(vocab, student, end_ids=[-teacher.end - 1])
    expected: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(len(student.spelled)))
    for text in TEXTS:
        scored = teacher.scored(text)
        ids = [*student.encode(text), student.end_id]
        given_ = scored._replace(token_ids=-scored.token_ids - 1, top_ids=-scored.top_ids - 1)
        labels = aligner.align(text, given_, ids)
        place = {
            len("".join(teacher.pieces[i] for i in teacher.spelt[text][:t])): t for t in range(len(scored.token_ids))
        }
        at = 0
        for s, i in enumerate(ids):
            row = zip(labels.ids[s].tolist(), np.exp(labels.logprobs[s].astype(float)), strict=True)
            filled = {j: p for j, p in row if p > 0}
            if at in place:
                prefix = teacher.spelt[text][: place[at]]
                drawn = teacher.spelt[text][place[at]]
                check_row(filled, *truth(teacher, prefix, student), drawn, i)
                whole = [c for c, piece in enumerate(teacher.pieces) if not begins_another(piece, ours)]
                check_mapped(filled, truth(teacher, prefix, student)[1][[c for c in whole if c != drawn]])
                weight = teacher.weights[text] / sum(teacher.weights[other] for other in teacher.like(prefix))
                for j, p in filled.items():
                    expected[tuple(prefix)][j] += weight * p
            else:
                assert not filled
            at += len(student.spelled[i] or b"")
    for prefix, mean in expected.items():
        if not prefix:  # every text has the first cut: here the mean over texts is whole
            assert (mean <= truth(teacher, [], student)[0] + 1e-5).all()


def check_row(row: dict[int, float], total: np.ndarray, joint: np.ndarray, drawn: int, real: int) -> None:
    """Candidates other than the drawn one: each is mapped whole and truly, or not at all."""
    others = joint.copy()
    others[drawn] = 0.0
    mapped = dict(row)
    mapped[real] = mapped.get(real, 0.0) - joint[drawn].sum()  # all of the drawn candidate is where the text went
    for j, p in mapped.items():
        assert -1e-5 <= p <= others[:, j].sum() + 1e-5
    certain = [c for c in range(len(joint)) if c != drawn and np.count_nonzero(joint[c]) == 1]
    clear = sum(joint[c].sum() for c in certain)
    assert sum(mapped.values()) <= clear + 1e-5 <= total.sum() + 1e-4


def begins_another(piece: str, ours: list[str]) -> bool:
    return any(other.startswith(piece) and other != piece for other in ours)


def check_mapped(row: dict[int, float], clear: np.ndarray) -> None:
    """Candidates that begin no longer student token are in the labels, where the truth has them."""
    for j, p in enumerate(clear.sum(0)):
        assert row.get(j, 0.0) >= p - 1e-5


def test_a_fine_teacher_and_a_coarse_student_by_hand() -> None:
    """Teacher a, b; student a, b, ab. "a" may go on to "ab": ambiguous where it is not the drawn one."""
    student, vocab = student_of(["a", "b", "ab"]), vocab_of("a", "b", "")
    aligner = Aligner(vocab, student, end_ids=[-3])
    scored = tokens(
        vocab,
        ("b", 0.3, {"a": 0.7, "b": 0.3}),
        ("a", 0.6, {"a": 0.6, "": 0.3, "b": 0.1}),
        ("b", 0.9, {"b": 0.9, "a": 0.1}),
        ("", 0.8, {"": 0.8, "a": 0.2}),
    )
    labels = aligner.align("bab", scored, [1, 2, 3])
    assert read(labels, student) == [{"b": 0.3}, {"ab": 0.6, "$": 0.3, "b": 0.1}, {"$": 0.8}]
    assert labels.coverage == 1.0
    assert (labels.mapped, labels.ambiguous) == pytest.approx(((0.3 + 1.0 + 0.8) / 3, (0.7 + 0 + 0.2) / 3))
    assert (labels.unmapped, labels.captured) == pytest.approx((0.0, 1.0))


def test_a_coarse_teacher_adds_up() -> None:
    student, vocab = student_of(["a", "b", "c"]), vocab_of("a", "b", "ab", "ac", "bc", "")
    rows = ("ac", 0.5, {"ac": 0.5, "ab": 0.2, "a": 0.1, "bc": 0.1}), ("b", 0.5, {"b": 0.5, "": 0.5})
    labels = Aligner(vocab, student, end_ids=[-6]).align("acb", tokens(vocab, *rows), [0, 2, 1, 3])
    assert read(labels, student) == [{"a": 0.8, "b": 0.1}, {}, {"b": 0.5, "$": 0.5}, {}]
    assert labels.coverage == 0.5


def test_what_the_teacher_owns_is_not_swallowed() -> None:
    """A teacher that owns " theo" does not spell " theology" with " the"."""
    student = student_of([" the", " theology", " cat", "o", "logy", " ", *"thecatlgy"])
    scored = [(" cat", 0.5, {" cat": 0.5, " the": 0.4})]
    for owned, ambiguous in (([], 0.4), ([b" theology"], 0.0), ([b" theo"], 0.0), ([b" th"], 0.4)):
        vocab = vocab_of(" cat", " the")
        labels = Aligner(vocab, student, end_ids=[], known=owned).align(" cat", tokens(vocab, *scored), [2])
        assert labels.ambiguous == pytest.approx(ambiguous), owned


def test_what_became_of_a_token_is_learnt() -> None:
    """Drawn four times behind the first token, "a" was three times followed by something that left it alone."""
    student, vocab = student_of(["a", "b", "ab"]), vocab_of("a", "b")
    aligner = Aligner(vocab, student, end_ids=[])
    drawn = {"b": 0.6, "a": 0.4}
    before = aligner.align("bb", tokens(vocab, *[("b", 0.6, drawn)] * 2), [1, 1])
    assert read(before, student) == [{"b": 0.6}] * 2
    aligner.observe(
        (text, tokens(vocab, *[(c, 0.5, {}) for c in text]), student.encode(text)) for text in ("baaa", "bab")
    )
    aligner.observe([("b", tokens(vocab, ("a", 0.5, {})), [1])])  # of another text
    after = aligner.align("bb", tokens(vocab, *[("b", 0.6, drawn)] * 2), [1, 1])
    assert read(after, student) == [{"b": 0.6, "a": 0.24}] * 2  # 3 / (4 + 1)
    assert (after.mapped, after.ambiguous) == pytest.approx((0.84, 0.16))
    real = aligner.align("ab", tokens(vocab, ("a", 0.4, drawn), ("b", 0.6, drawn)), [2])
    assert read(real, student) == [{"ab": 0.4, "b": 0.6}]
    forced = aligner.align(
        "ab", tokens(vocab, ("a", 0.4, drawn), ("b", 0.6, drawn)), [2], written_by_teacher=False
    )  # it was only made to read "ab": that is no reason to take all of its "a" for the student's "ab"
    assert read(forced, student) == [{"b": 0.6, "a": 0.24}]


def test_places_of_which_only_the_candidates_are_known() -> None:
    """As by hand above, but what came of a drawn token is not to be seen: "a" is ambiguous also where it was drawn."""
    student, vocab = student_of(["a", "b", "ab"]), vocab_of("a", "b", "", "<tool>")
    aligner = Aligner(vocab, student, end_ids=[-3])
    rows = tokens(
        vocab,
        ("a", 0.6, {"a": 0.6, "": 0.3, "b": 0.1}),
        ("", 0.2, {"b": 0.7, "<tool>": 0.1}),  # the drawn one is not among the alternatives
        ("b", 0.0, {"b": 0.9}),
    )
    labels = aligner.candidates(rows)
    assert read(labels, student) == [{"$": 0.3, "b": 0.1}, {"b": 0.7, "$": 0.2}, {"b": 0.9}]
    assert (labels.mapped, labels.ambiguous) == pytest.approx(((0.4 + 0.9 + 0.9) / 3, 0.6 / 3))
    assert labels.unmapped == pytest.approx(0.1 / 3)
    with pytest.raises(AlignmentError, match=r"sum up to 1\.30"):
        aligner.candidates(tokens(vocab, ("a", 0.7, {"a": 0.7, "b": 0.6})))


# --- odd things


STUDENT = student_of(["a", "b", "c", "ab", " ", " a", "é", "\n"])
VOCAB = vocab_of("a", "b", "c", "bc", " a", "", " ", "\n", "\n\n", "<tool>")
PLAIN = Aligner(VOCAB, STUDENT, end_ids=[-6], known=[b"ab", b" a"])


def test_a_drawn_token_outside_of_the_alternatives_counts() -> None:
    found = PLAIN.align("c", tokens(VOCAB, ("c", 0.05, {"b": 0.6, "bc": 0.2})), [2])
    assert read(found, STUDENT) == [{"b": 0.8, "c": 0.05}]
    assert found.captured == pytest.approx(0.85)


def test_a_drawn_token_among_the_alternatives_counts_once() -> None:
    assert read(PLAIN.align("c", tokens(VOCAB, ("c", 0.3, {"b": 0.6, "c": 0.3})), [2]), STUDENT) == [
        {"b": 0.6, "c": 0.3}
    ]


def test_a_hidden_logprob_counts_for_nothing() -> None:
    assert read(PLAIN.align("c", tokens(VOCAB, ("c", 0.0, {"b": 0.6})), [2]), STUDENT) == [{"b": 0.6}]


def test_fewer_alternatives_than_k_and_none_at_all() -> None:
    found = PLAIN.align("cb", tokens(VOCAB, ("c", 0.5, {"c": 0.5, "b": 0.4}), ("b", 0.25, {})), [2, 1])
    assert read(found, STUDENT) == [{"c": 0.5, "b": 0.4}, {"b": 0.25}]
    found = PLAIN.align("cb", tokens(VOCAB, ("c", 0.5, {}), ("b", 0.25, {})), [2, 1])
    assert read(found, STUDENT) == [{"c": 0.5}, {"b": 0.25}]
    assert found.ids.shape == (2, 1)


def test_a_special_token_has_no_image() -> None:
    found = PLAIN.align("c", tokens(VOCAB, ("c", 0.5, {"c": 0.5, "<tool>": 0.25})), [2])
    assert (read(found, STUDENT), found.unmapped) == ([{"c": 0.5}], 0.25)


def test_the_first_token_is_compared_without_stripped_whitespace() -> None:
    scored = tokens(VOCAB, (" a", 0.5, {" a": 0.5, "a": 0.25, "\n": 0.125}), ("", 1.0, {"": 1.0}))
    found = PLAIN.align("a", scored, [0, 8])
    assert read(found, STUDENT) == [{"a": 0.75}, {"$": 1.0}]
    assert found.unmapped == pytest.approx(0.0625)  # nobody knows what would have followed "\n": 0.125 over 2 rows
    found = PLAIN.align(" a", scored, [5, 8])
    assert read(found, STUDENT) == [{" a": 0.5, "a": 0.25, "\n": 0.125}, {"$": 1.0}]


def test_whitespace_tokens_before_and_behind() -> None:
    scored = tokens(
        VOCAB,
        ("\n", 0.5, {"\n": 0.5}),
        ("b", 0.5, {"b": 0.5, " a": 0.25}),
        (" ", 0.5, {" ": 0.5, "": 0.5}),
        ("", 1.0, {}),
    )
    assert read(PLAIN.align("b", scored, [1, 8]), STUDENT) == [{"b": 0.5, "a": 0.25}, {}]


def test_an_end_among_the_alternatives_and_one_that_is_missing() -> None:
    found = PLAIN.align("bb", tokens(VOCAB, ("b", 0.5, {"b": 0.5}), ("b", 0.5, {"b": 0.5, "": 0.25})), [1, 1, 8])
    assert read(found, STUDENT) == [{"b": 0.5}, {"b": 0.5, "$": 0.25}, {}]


def test_only_an_end_and_nothing_at_all() -> None:
    assert read(PLAIN.align("", tokens(VOCAB, ("", 0.5, {"": 0.5, "b": 0.25})), [8]), STUDENT) == [
        {"$": 0.5, "b": 0.25}
    ]
    empty = TeacherTokens(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 3), np.int64), np.zeros((0, 3)))
    assert PLAIN.align("", empty, [8]).coverage == 0.0
    assert PLAIN.align("", empty, []).ids.shape == (0, 4)


def test_tokens_that_cut_a_character() -> None:
    vocab = {1: VocabToken("a\ufffd", b"a\xc3"), 2: VocabToken("\ufffd", b"\xa9"), 3: VocabToken("b", b"b")}
    student = StudentVocab([b"a", b"\xc3", b"\xa9", b"b", None], lambda text: [0], 4)
    labels = Aligner(vocab, student, end_ids=[]).align("a\u00e9b", by_id(1, 2, 3), [0, 1, 2, 3])
    assert labels.coverage == 0.75
    assert read(labels, student)[2:] == [{"\ufffd": 0.5}, {"b": 0.5}]


def by_id(*ids: int, top: Iterable[int] = ()) -> TeacherTokens:
    """Each with probability 0.5, the alternatives with 0.125."""
    others = np.array([[i, *top] for i in ids], np.int64)
    values = np.log(np.array([[0.5, *(0.125 for _ in top)] for _ in ids]))
    return TeacherTokens(np.array(ids), values[:, 0], others, values)


@pytest.mark.parametrize("raw", [None, "\ufffd".encode()])
def test_cut_characters_without_bytes_are_found_again(raw: bytes | None) -> None:
    """Three tokens of a family emoji, of which two look alike; behind it the cuts are known again."""
    vocab = {1: VocabToken("a", None), 2: VocabToken("\ufffd", raw), 3: VocabToken(" ", None), 4: VocabToken("b", None)}
    vocab |= {5: VocabToken("", None)}
    text = "a\U0001f469\u200d\U0001f467 b\U0001f600"
    pieces = ["a", "b", " ", "\U0001f469", "\u200d", "\U0001f467", "\U0001f600"]
    student = student_of(pieces)
    ids = [*longest_match(pieces, text), student.end_id]
    aligner = Aligner(vocab, student, end_ids=[5])
    found = aligner.align(text, by_id(1, 2, 2, 2, 3, 4, 2, 2, 5), ids)
    rows = read(found, student)
    assert [bool(row) for row in rows] == [True, True, False, False, True, True, True, True]
    assert rows[1] == {"\U0001f469": 0.5}
    with pytest.raises(AlignmentError, match="spell"):
        aligner.align("a b", by_id(1, 2, 2, 2, 3, 4), longest_match(pieces, "a b"))
    with pytest.raises(AlignmentError, match="spell"):
        aligner.align("a", by_id(1, 2), longest_match(pieces, "a"))


def test_alike_tokens_are_not_all_the_drawn_one() -> None:
    vocab = {1: VocabToken("\ufffd", None), 2: VocabToken("b", None)}
    student = student_of(["\u00e9", "b"])
    scored = TeacherTokens(np.array([1]), np.log([0.25]), np.array([[1, 1, 2]]), np.log([[0.5, 0.25, 0.125]]))
    found = Aligner(vocab, student, end_ids=[]).align("\u00e9", scored, [0])
    assert read(found, student) == [{"\u00e9": 0.25, "b": 0.125}]
    assert found.unmapped == 0.5


def test_a_character_shown_at_its_last_token_is_no_label_for_the_whole() -> None:
    vocab = {1: VocabToken("", None), 2: VocabToken("\u00e9", None), 3: VocabToken("b", None)}
    found = Aligner(vocab, STUDENT, end_ids=[]).align("\u00e9b", by_id(1, 2, 3), [6, 1])
    assert read(found, STUDENT) == [{}, {"b": 0.5}]


def test_one_tokenizer_is_known_by_its_ids_also_where_characters_are_shown_whole() -> None:
    """As llama.cpp does: nothing at the first of two tokens, the character at the second, U+FFFD among alternatives."""
    pieces: list[bytes | None] = [b"a", b" \xc3", b"\xbc", b"\x9f", b"b", None]
    shown = {0: VocabToken("a", b"a"), 1: VocabToken("", b""), 2: VocabToken(" \u00fc", " \u00fc".encode())}
    shown |= {3: VocabToken("\ufffd", "\ufffd".encode()), 5: VocabToken("", None)}
    pieces += [char.encode() for char in "cdefghij"]
    shown |= {i: VocabToken(char, char.encode()) for i, char in enumerate("cdefghij", 6)}
    student = StudentVocab(pieces, lambda text: [0], 5)
    aligner = Aligner(shown, student, end_ids=[5])
    assert aligner.same_ids
    ids = [0, 1, 2, 5]
    found = aligner.align("a \u00fc", by_id(*ids, top=[3]), ids)
    assert found.coverage == 1.0
    assert [set(row[v > -INF]) for row, v in zip(found.ids, found.logprobs, strict=True)] == [{i, 3} for i in ids]
    before = {1: VocabToken(" ", b" ")}  # what stands before the character that the token begins
    assert Aligner(shown | before, student, end_ids=[5]).same_ids
    assert not Aligner(shown | {4: VocabToken("c", b"c")}, student, end_ids=[5]).same_ids
    assert not Aligner({i + 1: token for i, token in shown.items()}, student, end_ids=[6]).same_ids


@pytest.mark.parametrize(
    ("token", "spelled"),
    [
        (VocabToken("a", None), b"a"),
        (VocabToken("a", b"a"), b"a"),
        (VocabToken(r"\xe2\x80", None), b"\xe2\x80"),
        (VocabToken(r"\xe2\x80", rb"\xe2\x80"), b"\xe2\x80"),
        (VocabToken(r"\xe2\x80", b"\xe2\x80"), b"\xe2\x80"),
        (VocabToken(r"bytes: \xf0\x9f", None), b" \xf0\x9f"),
        (VocabToken(r"\x", None), rb"\x"),
        (VocabToken("<0xE2>", None), b"\xe2"),
        (VocabToken("\ufffd", None), None),
        (VocabToken("\ufffd", b"\xef\xbf\xbd"), None),
        (VocabToken("\ufffd", b"\xe2"), b"\xe2"),
        (VocabToken("", None), b""),
        (VocabToken("\u0120a", None), "\u0120a".encode()),  # alone it is no proof of marks
    ],
)
def test_what_a_token_spells(token: VocabToken, spelled: bytes | None) -> None:
    others = {-i: VocabToken(text, None) for i, text in enumerate([" a", " b", " c"], 1)}
    assert spell({1: token} | others)[1] == spelled


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=8), st.data())
def test_starts_are_found_again_where_characters_are_hidden(words: list[str], data: st.DataObject) -> None:
    """Known starts are the true ones, whichever tokens show only U+FFFD for characters outside ASCII."""
    words = [word.replace("\ufffd", "?") for word in words]
    hidden = [data.draw(st.booleans()) and not any(c.isascii() for c in word) for word in words]
    text = "".join(words)
    texts = ["\ufffd" * len(word) if hide else word for word, hide in zip(words, hidden, strict=True)]
    spelled = [None if hide else word.encode() for word, hide in zip(words, hidden, strict=True)]
    true = [len("".join(words[:t]).encode()) for t in range(len(words))]
    try:
        found = starts(text.encode(), spelled, texts).tolist()
    except AlignmentError:
        assert any(hidden)
        return
    if not any(hidden):
        assert found == true
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("stopped", "ends"),
    [
        ([("a", ["a", "<|im_end|>"]), ("b", ["b", "<|im_end|>"])], {"<|im_end|>"}),
        ([("a", ["a", ""]), ("b", ["b", "</s>"])], {"", "</s>"}),
        ([("a", [" a"]), ("b", ["b", "\n"]), ("b", ["\n\n", "b"])], set()),
        ([("a</s>", ["a", "</s>"])], set()),
        ([("a", ["a", "</s>"]), ("</s>a", ["</s>", "a"])], set()),
        ([("\u00e9", ["\ufffd", "\ufffd"])], set()),
        ([], set()),
    ],
)
def test_end_tokens_are_learnt(stopped: list[tuple[str, list[str]]], ends: set[str]) -> None:
    texts = sorted({text for _, row in stopped for text in row})
    vocab = {-i: VocabToken(text, None) for i, text in enumerate(texts, 1)}
    ids = {token.text: i for i, token in vocab.items()}
    rows = [(text, by_id(*[ids[t] for t in row])) for text, row in stopped]
    assert {vocab[i].text for i in learn_end_ids(vocab, rows)} == ends


# --- refused


def test_tokens_of_another_text_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"the teacher's tokens spell b'b' where the text has b'c' \(byte 0\)"):
        PLAIN.align("c", tokens(VOCAB, ("b", 0.5, {})), [2])
    with pytest.raises(AlignmentError, match="the student's tokens spell b'b'"):
        PLAIN.align("c", tokens(VOCAB, ("c", 0.5, {})), [1])
    with pytest.raises(AlignmentError, match="the teacher's tokens spell"):
        PLAIN.align("c", tokens(VOCAB, ("c", 0.5, {}), ("b", 0.5, {})), [2])
    with pytest.raises(AlignmentError, match="not in the vocabulary"):
        PLAIN.align("c", by_id(-999), [2])


def test_alternatives_of_another_token_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"sum up to 1\.70"):
        PLAIN.align("c", tokens(VOCAB, ("c", 0.8, {"b": 0.9})), [2])


def test_unheard_of_alternatives_are_left_out() -> None:
    found = PLAIN.align("c", by_id(-3, top=[7, -500, 1 << 40]), [2])
    assert (read(found, STUDENT), found.unmapped) == ([{"c": 0.5}], pytest.approx(0.375))


def test_a_token_beyond_the_students_vocabulary_has_no_image() -> None:
    """A teacher of the same tokenizer with more special tokens, which it shows as nothing."""
    student = student_of(list("abcdef"))
    vocab = {i: VocabToken(char, char.encode()) for i, char in enumerate("abcdef")}
    beyond = len(student.spelled)
    vocab |= {beyond: VocabToken("", b""), beyond + 1: VocabToken("", None)}
    aligner = Aligner(vocab, student, end_ids=[beyond + 1])
    assert aligner.same_ids
    found = aligner.align("c", by_id(2, top=[beyond, beyond + 1]), [2])
    assert read(found, student) == [{"c": 0.5}]
    assert found.unmapped == pytest.approx(0.25)


def test_masses_are_means_over_the_rows_that_have_a_label() -> None:
    """The second row is at a shared cut, but all of its mass is without an image: it counts in the coverage alone."""
    scored = tokens(VOCAB, ("c", 0.5, {"c": 0.5, "<tool>": 0.25}), ("b", 0.0, {"<tool>": 0.75}))
    found = PLAIN.align("cb", scored, [2, 1])
    assert read(found, STUDENT) == [{"c": 0.5}, {}]
    assert found.coverage == 0.5
    assert (found.captured, found.mapped, found.ambiguous, found.unmapped) == pytest.approx((0.75, 0.5, 0.0, 0.25))
    nothing = PLAIN.align("b", tokens(VOCAB, ("b", 0.0, {"<tool>": 0.75})), [1])
    assert nothing[2:] == (0.0,) * 5


# --- the self-check


def labels_of(rows: Sequence[tuple[int, float]]) -> SoftLabels:
    """One id with its probability in each row."""
    ids = np.array([[i] for i, _ in rows], np.int32)
    return SoftLabels(ids, np.log(np.array([[p] for _, p in rows], np.float32)), 1.0, 1.0, 1.0, 0.0, 0.0)


@settings(max_examples=200, deadline=None)
@given(p=st.floats(0.05, 1.0), size=st.integers(1, 300), seed=st.integers(0, 10_000), sharper=st.booleans())
def test_right_labels_pass(p: float, size: int, seed: int, sharper: bool) -> None:
    """Text drawn as promised, or more often (at a lower temperature)."""
    rng = np.random.default_rng(seed)
    hit = rng.random(size) < (p**0.5 if sharper else p)
    check_not_shifted([labels_of([(1, p)] * size)], [np.where(hit, 1, 2).tolist()])


@pytest.mark.parametrize("size", [1, 3, 10])
def test_short_sets_pass_unless_nothing_fits(size: int) -> None:
    target = list(range(1, size + 1))
    check_not_shifted([labels_of([(i, 0.9) for i in target])], [target])
    check_not_shifted([], [])
    empty = labels_of([(0, 0.5)])._replace(logprobs=np.full((1, 1), -INF, np.float32))
    check_not_shifted([empty], [[5]])


def test_labels_of_the_next_row_do_not_pass() -> None:
    target = np.random.default_rng(0).integers(1, 50, 200).tolist()
    with pytest.raises(
        AlignmentError, match=r"in \d+ of 200 rows where their mass promises 180: the labels are shifted"
    ):
        check_not_shifted([labels_of([(i, 0.9) for i in [*target[1:], 0]])], [target])
