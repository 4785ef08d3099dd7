"""Teacher texts as train samples: token by token as written, or by a soft label where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from blackbox_kd.algorithms.base import ce_sample
from blackbox_kd.errors import AlignmentError
from blackbox_kd.student.render import Renderer
from tests.rollouts import renderer
from tests.soft import targets, teacher_of

__all__ = ["renderer"]  # a fixture
QUESTION = [{"role": "user", "content": "Say 1"}]


def test_a_token_is_learnt_by_its_soft_label_where_it_has_one(renderer: Renderer) -> None:
    row = renderer.render(QUESTION, "one two three")
    soft = teacher_of(row, without=[1])
    sample = ce_sample("id", row, soft)
    ce, topk_kl = (np.array(sample.weights[name]) for name in ("ce", "topk_kl"))
    supervised = np.array([i == label for i, label in zip(row.input_ids, row.labels, strict=True)])
    assert (ce + topk_kl == supervised).all()
    assert np.flatnonzero(ce).tolist() == [np.flatnonzero(supervised)[1]]
    assert sample.soft.ids[:, 0].tolist() == [i for n, i in enumerate(targets(row)) if n != 1]


def test_without_labels_it_is_the_text(renderer: Renderer) -> None:
    row = renderer.render(QUESTION, "one")
    bare = teacher_of(row, without=range(len(targets(row))))
    assert ce_sample("id", row, bare) == ce_sample("id", row)
    assert list(ce_sample("id", row).weights) == ["ce"]


def test_labels_of_another_text_are_refused(renderer: Renderer) -> None:
    labels = teacher_of(renderer.render(QUESTION, "one two three"))
    with pytest.raises(AlignmentError, match="soft labels for"):
        ce_sample("id", renderer.render(QUESTION, "one"), labels)
