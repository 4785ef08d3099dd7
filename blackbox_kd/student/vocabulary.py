"""The student's tokens as bytes, from a tokenizer of transformers: what alignment needs to know of a student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blackbox_kd.align import StudentVocab
from blackbox_kd.align.spelling import from_alphabet, from_metaspace
from blackbox_kd.errors import ModelError

_CHECKS = ("Hello world", "  def f(x):\n\treturn x", "na\u00efve \u4e16\u754c \U0001f642", "1234.5", "\n\n- a")
_ANCHOR = "\n"
"""Text is tokenised behind it where the tokenizer puts a space before whatever comes first."""


def student_vocab(tokenizer: Any, end_id: int) -> StudentVocab:
    """Byte-level BPE and SentencePiece-style vocabularies. Special tokens spell nothing, other added ones their text.

    Args:
        tokenizer: a tokenizer of transformers.
        end_id: the token that ends an answer (`Renderer.end_id`).

    Raises:
        ModelError: the tokens do not spell the texts that are tokenised, as with lower-casing tokenizers.
    """
    vocab: dict[str, int] = tokenizer.get_vocab()
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    special = {int(i) for i in tokenizer.all_special_ids} | {i for i, token in added.items() if token.special}
    read = _reader(vocab)
    read_added = str.encode if read is from_alphabet else read  # added tokens are text; Gemma's have "▁" for spaces
    spelled: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for piece, token_id in vocab.items():
        if token_id not in special:
            spelled[token_id] = (read_added if token_id in added else read)(piece)

    def encode_first(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    anchor = encode_first(_ANCHOR)

    def encode(text: str) -> list[int]:
        ids = encode_first(_ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode_first(text)

    plain = _spells(spelled, encode_first("a")) == b"a"
    found = StudentVocab(spelled, encode_first if plain else encode, end_id, encode_first=encode_first)
    for text in _CHECKS:
        if (seen := _spells(spelled, encode_first(text))) not in (text.encode(), b" " + text.encode()):
            raise ModelError(
                f"the student's tokens spell {seen!r} for {text!r}: soft labels need a tokenizer that changes no text "
                "(byte-level BPE or SentencePiece)"
            )
    return found


def _reader(vocab: dict[str, int]) -> Callable[[str], bytes]:
    byte_level, metaspace = (sum(piece.startswith(mark) for piece in vocab) for mark in "Ġ▁")
    return from_alphabet if byte_level > metaspace else from_metaspace


def _spells(spelled: list[bytes | None], ids: list[int]) -> bytes:
    return b"".join(spelled[i] or b"" for i in ids)
