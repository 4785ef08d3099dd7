"""Teacher texts as train samples: token by token as written, or by a soft label where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.base import ce_sample
from blackbox_kd.config import load_config
from blackbox_kd.errors import AlignmentError
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.student.render import Renderer
from blackbox_kd.student.student import Student
from blackbox_kd.trainee import replay
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


@pytest.mark.parametrize(("flag", "learnt"), [("true", {"ce", "topk_kl"}), ("false", {"ce"})])
def test_replayed_rows_are_learnt_as_by_sft(project_file: Path, flag: str, learnt: set[str]) -> None:
    flags = ["--config", str(project_file), "--sft.soft_labels", flag]
    assert main(["sample", *flags]) == 0
    with Project(load_config(Config, str(project_file), [("sft.soft_labels", flag)])) as project:
        student = Student(project.config.student)
        samples = replay(project, student, 9, 1)
        assert len(samples) == 3
        assert {name for sample in samples for name in sample.weights} <= learnt
        assert ("topk_kl" in learnt) == all(sample.soft is not None for sample in samples)
        texts = {completion_id: text for _, completion_id, text in project.training_rows()}
        for sample in samples:
            weights = np.sum(list(sample.weights.values()), axis=0)
            ids = [i for i, w in zip(sample.input_ids, weights, strict=True) if w]
            assert student.renderer.decode(ids) == texts[sample.sample_id]
