"""How checkpoints are ranked by the true KL and by its bound."""

from __future__ import annotations

import pytest
from true_kl import swaps

TOKENS = [2.0] * 8


def sums(true_kl: list[float], tail_kl: list[float]) -> dict[str, list[float]]:
    return {"true_kl": true_kl, "tail_kl": tail_kl, "tokens": TOKENS}


def test_checkpoints_in_one_order_are_not_swapped() -> None:
    near, far = sums([1.0] * 8, [0.9] * 8), sums([2.0] * 8, [1.5] * 8)
    assert swaps([("a", near), ("b", far), ("the same as a", near)]) == []


def test_a_swap_counts_where_every_answer_tells_the_checkpoints_apart() -> None:
    (pair,) = swaps([("a", sums([1.0] * 8, [0.9] * 8)), ("b", sums([1.2] * 8, [0.8] * 8))])
    assert pair["pair"] == ["a", "b"]
    assert pair["true_kl_difference"] == pytest.approx([-0.1] * 3)
    assert pair["told_apart"]


def test_a_swap_of_what_cannot_be_told_apart_is_listed_only() -> None:
    noisy = [0.0, 2.0] * 4  # mean 1.0, beside 1.01 everywhere
    (pair,) = swaps([("a", sums(noisy, [0.9] * 8)), ("b", sums([1.01] * 8, [0.8] * 8))])
    value, lo, hi = pair["true_kl_difference"]
    assert lo < value < 0 < hi
    assert not pair["told_apart"]


def test_other_answers_do_not_rank() -> None:
    with pytest.raises(ValueError, match="different answers"):
        swaps([("a", sums([1.0] * 8, [1.0] * 8)), ("b", sums([1.0] * 8, [1.0] * 8) | {"tokens": [3.0] * 8})])
