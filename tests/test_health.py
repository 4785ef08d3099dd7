"""Health of a round: bounds that hold, and shares that are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from blackbox_kd.health import SMALLEST, by_depth, ends, entropy, least_kl
from blackbox_kd.types import TopK


def top(p: np.ndarray, k: int) -> TopK:
    ids = np.argsort(-p, 1)[:, :k]
    return TopK(ids, np.log(np.take_along_axis(p, ids, 1)))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    found: np.ndarray = (p * np.log(p / q)).sum(1)
    return found


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_the_kl_that_two_top_k_allow_is_never_above_the_true_one(sharpness: float) -> None:
    rng = np.random.default_rng(3)
    p, q = (np.exp(sharpness * rng.normal(size=(300, 30))) for _ in range(2))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    true = kl(p, q)
    for k in (1, 5, 20):
        bound = least_kl(top(p, k), top(q, k))
        assert (bound <= true + 1e-9).all()
        assert (bound >= -SMALLEST).all()
    assert least_kl(top(p, 30), top(q, 30)) == pytest.approx(true)
    assert least_kl(top(p, 5), top(q, 30)) == pytest.approx(bucketed(p, q, 5))  # as the loss that is trained
    assert least_kl(top(p, 20), top(p, 20)) == pytest.approx(0, abs=SMALLEST)


def test_entropy_is_exact_also_for_a_student_that_is_sure() -> None:
    """In float32, as a student hands it over: warnings are errors."""
    p = np.array([[1.0, 0.0], [0.5, 0.25]], np.float32)
    with np.errstate(divide="ignore"):
        found = entropy(TopK(np.zeros((2, 2), int), np.log(p)))
    assert found == pytest.approx([0.0, -0.5 * np.log(0.5) - 0.5 * np.log(0.25)])


def bucketed(p: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-p, 1)
    p, q = np.take_along_axis(p, order, 1), np.take_along_axis(q, order, 1)
    return kl(*(np.concatenate([x[:, :k], x[:, k:].sum(1, keepdims=True)], 1) for x in (p, q)))


def test_nothing_in_common_is_far_apart() -> None:
    """Teacher sure of token 1, student of token 2: no more than the student's hidden 1% can be on 1."""
    one, other = (TopK(np.array([[i]]), np.log([[0.99]])) for i in (1, 2))
    assert least_kl(one, other)[0] == pytest.approx(0.99 * np.log(0.99 / 0.01) + 0.01 * np.log(0.01 / 0.99))


def test_thirds_that_are_empty_are_left_out() -> None:
    assert by_depth("x", [1.0, 2.0, 4.0], [0.0, 0.3, 0.99]) == {"x_first": 1.5, "x_last": 4.0}


def test_how_a_loss_began_and_ended_is_no_single_batch() -> None:
    assert ends([9.0, 7.0, 3.0, 3.0, 3.0, 3.0, 1.0, 3.0]) == (8.0, 2.0)
    assert ends([4.0, 2.0]) == (4.0, 2.0)
    assert ends([4.0]) == (4.0, 4.0)
