"""Whether text and logprobs are of one distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from blackbox_kd.align import SoftLabels
from blackbox_kd.corpus import Corpus
from blackbox_kd.soft_labels import NARROW, Labelled, label, surprise_z
from blackbox_kd.student.render import Renderer
from blackbox_kd.types import TeacherTokens
from tests.records import CONTEXT, answered, completion, request, token

VOCAB, K, TOKENS = 50, 20, 400


def drawn(rng: np.random.Generator, narrow: float) -> TeacherTokens:
    """TOKENS draws from flat to peaked distributions, of tokens that have at least `narrow` of the likeliest's mass."""
    logits = rng.normal(size=(TOKENS, VOCAB)) * rng.uniform(0.5, 6, (TOKENS, 1))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    kept = np.where(p >= narrow * p.max(1, keepdims=True), p, 0)
    kept /= kept.sum(1, keepdims=True)
    ids = np.array([rng.choice(VOCAB, p=row) for row in kept])
    top = np.argsort(-p, 1)[:, :K]
    return TeacherTokens(ids, np.log(p[np.arange(TOKENS), ids]), top, np.log(np.take_along_axis(p, top, 1)))


def test_text_drawn_from_its_own_logprobs_has_a_standard_score() -> None:
    rng = np.random.default_rng(0)
    scores = [surprise_z([drawn(rng, 0.0)]) for _ in range(200)]
    assert abs(np.mean(scores)) < 0.25
    assert 0.8 < np.std(scores) < 1.2
    assert min(scores) > NARROW


@pytest.mark.parametrize("narrow", [0.05, 1.0], ids=["min_p", "greedy"])
def test_an_endpoint_that_cuts_its_tail_is_noticed(narrow: float) -> None:
    rng = np.random.default_rng(1)
    assert surprise_z([drawn(rng, narrow) for _ in range(8)]) < NARROW


def test_answers_without_alternatives_say_nothing() -> None:
    empty = TeacherTokens(np.array([1]), np.array([-1.0]), np.zeros((1, 0)), np.zeros((1, 0)))
    assert surprise_z([empty]) == 0.0
    assert surprise_z([]) == 0.0


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_tokenizer_that_changes_texts_has_no_soft_labels(
    lowercase: bool, tiny_model: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said in one line; the answers are still learnt and measured as text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    if lowercase:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    answer = completion(text="Yes", logprobs=[token("Yes", -0.5, ("Yes", -0.5), ("No", -1.5))])
    corpus.add_requests([request()])
    assert corpus.try_ingest([answered(answer)])
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id])
    found = label(corpus, renderer, answer.model, f"m@{CONTEXT}", [(answer.completion_id, "Yes")])
    assert [each is None for each in found.labels] == [lowercase]
    assert (found.metrics() == {}) is lowercase
    said = capsys.readouterr().err
    assert said.count("no soft labels: the student's tokens spell") == said.count("\n") == lowercase


def test_masses_are_means_over_the_labelled_tokens_of_all_answers() -> None:
    def labels(*masses: float, tokens: int) -> SoftLabels:
        p = np.array([*masses, *[0.0] * (tokens - len(masses))])
        mean = sum(masses) / len(masses)
        with np.errstate(divide="ignore"):
            logprobs = np.log(p)[:, None].astype(np.float32)
        ids = np.zeros((tokens, 1), np.int32)
        return SoftLabels(ids, logprobs, len(masses) / tokens, 1.0, mean, 1 - mean, 0.0)

    found = Labelled([labels(0.5, tokens=4), None, labels(0.9, 0.9, 0.9, tokens=4)], same=False).metrics()
    assert found["coverage"] == 0.5
    assert (found["captured_mass"], found["ambiguous_mass"]) == pytest.approx((0.8, 0.2))
