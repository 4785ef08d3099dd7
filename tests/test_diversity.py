"""Diversity on texts worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from blackbox_kd import health
from blackbox_kd.diversity import distinct, repetition, spread
from blackbox_kd.types import TopK


def test_distinct_counts_over_the_whole_set() -> None:
    # a b a | a c: words a b a a c, 3 of 5 differ; pairs ab ba ac, all differ
    assert distinct(["a b a", "a c"], 1).value == pytest.approx(3 / 5)
    assert distinct(["a b a", "a c"], 2).value == 1.0


def test_distinct_is_that_of_the_training_loop() -> None:
    texts = ["the cat sat on the mat", "the cat ran", "", "a mat"]
    for n in (1, 2):
        assert distinct(texts, n).value == health.distinct(texts, n)


def test_the_interval_of_distinct_is_the_jackknife_by_hand() -> None:
    texts = ["a b", "a c", "d e f"]
    found = distinct(texts, 1)
    without = [health.distinct(texts[:i] + texts[i + 1 :], 1) for i in range(3)]  # 1, 1, 3/4
    error = 1.959964 * np.sqrt(2 / 3 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert found.value == pytest.approx(6 / 7)
    assert found.lo == pytest.approx(6 / 7 - error)
    assert found.hi == 1.0  # 6/7 + 0.32, and no more than 1


def test_a_collapse_is_seen_and_has_no_width() -> None:
    found = distinct(["yes yes"] * 10, 1)
    assert (found.value, found.hi - found.lo < 0.02) == (1 / 20, True)


def test_one_text_and_no_text_have_an_interval() -> None:
    assert distinct(["a b"], 1) == distinct(["a b", ""], 1)
    assert (distinct([""], 2).value, distinct([""], 2).lo) == (1.0, 1.0)


def test_repetition_is_the_share_of_4_grams_that_stood_there_before() -> None:
    # a b c d a b c d: abcd bcda cdab dabc abcd, 4 of 5 differ
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b c d e f") == 0
    assert repetition("a b") == 0


def top(*rows: list[float]) -> TopK:
    return TopK(np.arange(2 * len(rows)).reshape(len(rows), 2), np.log(np.array(rows)))


def test_entropy_is_a_mean_over_tokens_not_over_answers() -> None:
    sure, even = [1.0 - 1e-12, 1e-12], [0.5, 0.5]
    found = spread([("a", top(even, even, even)), ("b", top(sure))], 100)["entropy"]
    assert found.value == pytest.approx(3 / 4 * np.log(2), abs=1e-6)
    assert found.lo <= found.value <= found.hi


def test_the_rest_beyond_the_top_is_one_outcome() -> None:
    found = spread([("a", top([0.5, 0.25]))], 100)["entropy"]
    assert found.value == pytest.approx(1.5 * np.log(2))  # 1/2, 1/4 and a rest of 1/4


def test_without_alternatives_there_is_no_entropy() -> None:
    assert set(spread([("a", None)], 100)) == {"distinct_1", "distinct_2", "repetition"}
