"""Alignment between real tokenizers that share little but bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blackbox_kd.align import Aligner, SoftLabels, check_not_shifted, same_tokenizer
from blackbox_kd.errors import AlignmentError
from blackbox_kd.types import TeacherTokens, VocabToken
from tests.vocabularies import (
    StudentTokenizer,
    TeacherVocab,
    deepseek,
    deepseek_student,
    mistral,
    mistral_student,
    scored,
    smollm2,
    tekken,
)

TEXTS = {
    "english": "It was the best of times; it wasn't the worst. \u201cQuite so\u201d, she said \u2014 and left.",
    "code": 'def f(x: int) -> list[int]:\n    """Doc."""\n\treturn [x**2 for _ in range(10)]\n\n\nprint(f(3))',
    "chinese": "今天天气很好,我们去公园散步吧。机器学习模型需要大量数据。",
    "arabic": "الطقس جميل اليوم، وسنذهب إلى الحديقة. ٣ ١٤",
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308",
    "numbers": "3.14159 1,234,567 0x1F 2026-11-24 10:05 50% 1e-9",
    "whitespace": "a  b   c\t\td\n\n\n  e \u00a0f \r\n g",
    "combining": "e\u0301 n\u0303o\u0308 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0938\u094d\u0924\u0947 !",
    "replaced": "a \ufffd b\ufffd\ufffd c",
}
TEACHERS: dict[str, Callable[[], TeacherVocab]] = {"mistral": mistral, "tekken": tekken, "deepseek": deepseek}
STUDENTS: list[object] = [
    pytest.param(smollm2, marks=pytest.mark.slow, id="smollm2"),  # reading the GGUF takes ten seconds
    pytest.param(mistral_student, id="mistral"),
    pytest.param(deepseek_student, id="deepseek"),
]

_aligners: dict[object, Aligner] = {}


def aligner(teacher: TeacherVocab, student: StudentTokenizer) -> Aligner:
    """One for each pair: its tables are filled once."""
    key = teacher.end_id, id(student.vocab)
    if key not in _aligners:
        _aligners[key] = Aligner(teacher.vocab, student.vocab, end_ids=[teacher.end_id])
    return _aligners[key]


def align(teacher: TeacherVocab, student: StudentTokenizer, text: str, *, stripped: bool = True) -> SoftLabels:
    """What becomes of a text that the teacher wrote, with random alternatives; checks what holds for every text."""
    ids = [*teacher.encode(text), teacher.end_id]
    text, whole = text.strip() if stripped else text, text
    own = student.encode(text)
    found = aligner(teacher, student).align(text, scored(ids, vocab_size=len(teacher.vocab)), own)
    last = next((i for i in ids[-2::-1] if (teacher.vocab[i].bytes or b"").strip()), None)
    whole_last = aligner(teacher, student).same_ids and whole.rstrip() != whole
    filled = found.logprobs > -np.inf
    assert found.ids.shape == found.logprobs.shape == (len(own), 6)
    assert found.ids[~filled].sum() == 0
    for place, (row, mask, value, real) in enumerate(zip(found.ids, filled, found.logprobs, own, strict=True)):
        assert len(set(row[mask])) == mask.sum()
        assert np.exp(value.astype(float)).sum() < 1.001
        if mask.any() and whole_last and place == len(own) - 2:
            assert {real, last} & set(row[mask])  # one tokenizer: it may end in what was stripped, and stays itself
        elif mask.any():
            assert real in row[mask]  # the teacher's own token was drawn, and this is what it became
    assert found.coverage == pytest.approx(filled.any(1).mean())
    assert found.mapped + found.ambiguous + found.unmapped == pytest.approx(found.captured)
    return found


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_in_many_scripts(teacher: str, student: Callable[[], StudentTokenizer], name: str) -> None:
    found = align(TEACHERS[teacher](), student(), TEXTS[name])
    assert found.coverage > 0.25, name
    if name in ("english", "code"):
        assert found.coverage > 0.7
        assert found.mapped > 0.5


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_any_text(teacher: str, student: Callable[[], StudentTokenizer]) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(text=st.one_of(st.text(max_size=30), st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "replace"))))
    @example(text=":\n")
    def check(text: str) -> None:
        if text.strip() and spelt(TEACHERS[teacher](), text) and spelt_by_student(student(), text.strip()):
            align(TEACHERS[teacher](), student(), text)

    check()


def spelt(teacher: TeacherVocab, text: str) -> bool:
    """SentencePiece normalises some characters away: there is nothing to align then."""
    ids = teacher.encode(text)
    raw = b"".join(teacher.vocab[i].bytes or b"" for i in ids)
    return raw.decode("utf-8", "replace").strip() == text.strip()


def spelt_by_student(student: StudentTokenizer, text: str) -> bool:
    """SmolLM2 lacks a few bytes, SentencePiece takes its own mark for a space; such rows have no labels."""
    try:
        student.vocab.starts(text.encode(), student.encode(text))
    except AlignmentError:
        return False
    return True


@pytest.mark.parametrize("teacher", TEACHERS)
def test_observing_maps_most_of_what_was_ambiguous(teacher: str) -> None:
    """Over the texts that were observed, what is mapped grows."""
    own, student = TEACHERS[teacher](), deepseek_student() if teacher == "mistral" else mistral_student()
    made = Aligner(own.vocab, student.vocab, end_ids=[own.end_id])
    rows = []
    for text in [TEXTS["english"], TEXTS["code"]] * 10:
        ids = np.array(own.encode(text))
        half = np.full(len(ids), np.log(0.5))
        rows.append((text, TeacherTokens(ids, half, ids[::-1, None], half[:, None]), student.encode(text)))
    before = [made.align(*row) for row in rows]
    made.observe(rows)
    after = [made.align(*row) for row in rows]
    assert sum(x.ambiguous for x in after) < 0.6 * sum(x.ambiguous for x in before)
    assert sum(x.mapped for x in after) >= sum(x.mapped for x in before)
    assert [x.captured for x in after] == [x.captured for x in before]


def test_whitespace_that_the_teacher_wrote_around_the_text() -> None:
    for teacher in (tekken(), deepseek()):
        found = align(teacher, mistral_student(), "\n\n Hello there. ")
        assert (found.logprobs[0] > -np.inf).any()
        assert not (found.logprobs[-1] > -np.inf).any()  # the teacher did not end here: it wrote a space
        found = align(teacher, mistral_student(), " Hello there.")
        assert (found.logprobs[[0, -1]] > -np.inf).any(1).all()


def test_the_end_is_the_students_end() -> None:
    found = align(tekken(), deepseek_student(), "Yes.")
    end = deepseek_student().vocab.end_id
    assert end in found.ids[-1]
    ids = [*tekken().encode("Yes."), tekken().end_id]
    cut_off = scored(ids[:-1], vocab_size=1000)
    found = aligner(tekken(), deepseek_student()).align("Yes.", cut_off, deepseek_student().encode("Yes."))
    assert not (found.logprobs[-1] > -np.inf).any()


# --- the same tokenizer


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("name", [name for name in TEXTS if name != "replaced"])
def test_the_same_tokenizer_is_the_identity(with_ids: bool, name: str) -> None:
    teacher, student = deepseek(), deepseek_student()
    ids = [*teacher.encode(TEXTS[name]), teacher.end_id]
    tokens = scored(ids, vocab_size=100_000, top=20)
    vocab, given = teacher.vocab, tokens
    if not with_ids:  # interned: -1, -2, ...
        vocab = {-i - 1: token for i, token in teacher.vocab.items()}
        given = tokens._replace(token_ids=-tokens.token_ids - 1, top_ids=-tokens.top_ids - 1)
    end_ids = [teacher.end_id if with_ids else -teacher.end_id - 1]
    vocab = {i: vocab[i] for i in {*given.token_ids.tolist(), *given.top_ids.ravel().tolist()}}
    row = (TEXTS[name], given, ids)
    assert same_tokenizer(vocab, student.vocab, [row], end_ids=end_ids)
    made = Aligner(vocab, student.vocab, end_ids=end_ids, same=not with_ids)
    assert made.same_ids is with_ids
    found = made.align(*row)
    assert found.coverage == 1.0
    assert found.ambiguous == 0.0
    for s in range(len(ids)):
        labels = {i: v for i, v in zip(found.ids[s], found.logprobs[s], strict=True) if v > -np.inf}
        expected = dict(zip(tokens.top_ids[s].tolist(), tokens.top_logprobs[s].astype(np.float32), strict=True))
        special = {i for i in expected if student.vocab.spelled[i] is None} - {student.vocab.end_id}
        if not with_ids:  # special tokens have no bytes by which to know them
            expected = {i: v for i, v in expected.items() if i not in special}
        assert labels == expected


def test_different_tokenizers_are_not_the_same() -> None:
    text = TEXTS["english"]
    for teacher in (mistral(), tekken()):
        row = (text, scored(teacher.encode(text), vocab_size=1000), deepseek_student().encode(text))
        assert not same_tokenizer(teacher.vocab, deepseek_student().vocab, [row], end_ids=[teacher.end_id])
        common = {i: t for i, t in teacher.vocab.items() if t.bytes in deepseek_student().vocab.id_of}
        seen = {-i - 1: t for i, t in common.items()}
        ids = row[1].token_ids.tolist()
        if all(i in common for i in ids):  # every token is the student's, but the text is cut in other places
            tokens = row[1]._replace(token_ids=-row[1].token_ids - 1)
            cut_alike = [teacher.vocab[i].bytes for i in ids] == [
                deepseek_student().vocab.spelled[i] for i in row[2][:-1]
            ]
            assert same_tokenizer(seen, deepseek_student().vocab, [(text, tokens, row[2])], end_ids=[]) is cut_alike


# --- the self-check


def training_set(teacher: TeacherVocab, student: StudentTokenizer) -> tuple[list[SoftLabels], list[list[int]]]:
    texts = list(TEXTS.values()) * 3
    return [align(teacher, student, text) for text in texts], [student.encode(text.strip()) for text in texts]


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_shifted_labels_are_noticed(teacher: str, student: Callable[[], StudentTokenizer]) -> None:
    labels, targets = training_set(TEACHERS[teacher](), student())
    check_not_shifted(labels, targets)
    for step in (1, -1):
        shifted = [
            label._replace(ids=np.roll(label.ids, step, 0), logprobs=np.roll(label.logprobs, step, 0))
            for label in labels
        ]
        with pytest.raises(AlignmentError, match=r"the real token is among its soft labels in \d+ of \d+ rows"):
            check_not_shifted(shifted, targets)


def test_labels_of_another_length_are_refused() -> None:
    labels, targets = training_set(tekken(), deepseek_student())
    with pytest.raises(AlignmentError, match="align again"):
        check_not_shifted([labels[0]], [targets[0][:-1]])


# --- the vocabulary as an endpoint shows it without bytes


@pytest.mark.parametrize("mark", ["\u0120", "\u2581", " "])
def test_a_vocabulary_that_is_shown_with_its_own_marks(mark: str) -> None:
    text = TEXTS["english"]
    ids = tekken().encode(text)
    vocab = {i: VocabToken((t.bytes or b"").decode("utf-8", "replace"), None) for i, t in tekken().vocab.items()}
    if mark == "\u0120":
        vocab = {i: VocabToken("".join(ALPHABET[b] for b in t.bytes or b""), None) for i, t in tekken().vocab.items()}
    if mark == "\u2581":
        vocab = {i: VocabToken(t.text.replace(" ", mark), None) for i, t in vocab.items()}
    tokens: TeacherTokens = scored(ids, vocab_size=1000)
    made = Aligner(vocab, deepseek_student().vocab, end_ids=[])
    found = made.align(text, tokens, deepseek_student().encode(text))
    whole = align(tekken(), deepseek_student(), text)
    labelled = (found.logprobs > -np.inf).any(1)
    assert labelled[:-1].mean() > 0.9 * (whole.logprobs > -np.inf).any(1)[:-1].mean()


def _alphabet() -> dict[int, str]:
    from blackbox_kd.align.spelling import byte_alphabet

    return {byte: char for char, byte in byte_alphabet().items()}


ALPHABET = _alphabet()
