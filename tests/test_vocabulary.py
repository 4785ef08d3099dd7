"""The student's tokens in bytes, from the tokenizers of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blackbox_kd.align import StudentVocab
from blackbox_kd.errors import AlignmentError, ModelError
from blackbox_kd.student.vocabulary import student_vocab
from tests.vocabularies import StudentTokenizer, deepseek_student, mistral_student, smollm2


def joined(vocab: StudentVocab, ids: list[int]) -> bytes:
    return b"".join(vocab.spelled[i] or b"" for i in ids)


@settings(deadline=None)  # the first call loads the tokenizer
@given(text=st.text(max_size=40))
def test_byte_level_tokens_spell_any_text(text: str) -> None:
    student = deepseek_student()
    assert joined(student.vocab, student.encode(text)[:-1]) == text.encode() or "\uff5c" in text


@pytest.mark.slow
def test_the_students_of_the_quickstart_have_all_their_bytes() -> None:
    vocab = smollm2().vocab
    assert [i for i, piece in enumerate(vocab.spelled) if piece is None] == list(range(17))
    assert len(vocab.id_of) == len(vocab.spelled) - 17
    assert vocab.spelled[vocab.end_id] is None


def test_a_dummy_prefix_is_at_the_start_only() -> None:
    student: StudentTokenizer = mistral_student()
    vocab = student.vocab
    ids = student.encode("Hello Hello")
    assert joined(vocab, ids) == b" Hello Hello"
    assert vocab.starts(b"Hello Hello", ids)[0].tolist() == [0, 5, 11]
    assert vocab.starts(b"Hello Hello", ids)[1]
    hello = vocab.id_of[b" Hello"]
    assert ids[:2] == [hello, hello]
    assert vocab.first(b"Hello", dummy=True) == hello
    assert vocab.first(b" Hello") == hello
    assert vocab.spelled[vocab.first(b"Hello")] == b"Hello"


def test_candidates_that_cut_a_character() -> None:
    vocab = deepseek_student().vocab
    smile = "\U0001f642".encode()
    for raw in (smile[:2], smile[:3], b" " + smile[:3], smile[1:], b"ab\xff"):
        first = vocab.spelled[vocab.first(raw)]
        assert first
        assert raw.startswith(first)


def test_a_special_token_spells_nothing() -> None:
    vocab = deepseek_student().vocab
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert vocab.first(end.encode()) == -1
    with pytest.raises(AlignmentError, match="the student's tokens spell"):
        vocab.starts(f"a{end}".encode(), deepseek_student().encode(f"a{end}"))


def test_a_tiny_student(tiny_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    vocab = student_vocab(tokenizer, tokenizer.eos_token_id)
    ids = tokenizer("Say one", add_special_tokens=False)["input_ids"]
    assert joined(vocab, ids) == b"Say one"
    assert vocab.starts(b"Say one", [*ids, vocab.end_id])[0][-1] == 7


def with_bytes() -> PreTrainedTokenizerFast:
    """SentencePiece's marks, and no piece but a space and the bytes."""
    pieces = ["▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("marks", ["Ġ", "▁"])
def test_added_tokens_spell_their_text_unless_they_are_special(marks: str, tiny_model: Path) -> None:
    """As GPT-NeoX and Gemma have them for blanks, and others for tool calls."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model) if marks == "Ġ" else with_bytes()
    blanks = "  " if marks == "Ġ" else "▁▁"
    plain = {"\n\n": b"\n\n", "\u00e9": "\u00e9".encode(), "<tool>": b"<tool>", blanks: b"  "}
    tokenizer.add_tokens([AddedToken(text, special=False) for text in plain])
    tokenizer.add_tokens([AddedToken("<|mask|>", special=True)], special_tokens=True)
    vocab = student_vocab(tokenizer, 1)
    for text, raw in plain.items():
        assert vocab.spelled[tokenizer.convert_tokens_to_ids(text)] == raw
    assert vocab.spelled[tokenizer.convert_tokens_to_ids("<|mask|>")] is None
    text = "\n\na  <tool>\u00e9"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert set(tokenizer.convert_tokens_to_ids(list(plain))) <= set(ids)
    assert vocab.starts(text.encode(), ids)[0].tolist() == [0, 2, 3, 5, 11]


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    made = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="soft labels need a tokenizer that changes no text"):
        student_vocab(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]"), 2)
