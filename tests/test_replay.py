"""Replayed teacher rows: as many as asked for, learnt as `sft` learns them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackbox_kd import sft
from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.forks import ForksConfig
from blackbox_kd.algorithms.relabel import RelabelConfig
from blackbox_kd.command import overrides
from blackbox_kd.config import load_config
from blackbox_kd.project import Project
from blackbox_kd.replay import Replay, losses
from blackbox_kd.sections import SftConfig, SoftLossConfig
from blackbox_kd.settings import Config
from blackbox_kd.student.student import Student
from blackbox_kd.types import TrainSample


def replayed(project_file: Path, *flags: str, targets: int = 6, round_: int = 1) -> list[TrainSample]:
    with Project(load_config(Config, str(project_file), overrides(flags))) as project:
        return Replay(project, Student(project.config.student).renderer).draw(targets, round_)


@pytest.fixture
def sampled(project_file: Path) -> Path:
    assert main(["sample", "--config", str(project_file)]) == 0
    return project_file


def test_they_are_the_share_of_the_update_and_others_in_each_round(sampled: Path) -> None:
    assert len(replayed(sampled)) == 2  # a quarter of 6 + 2
    assert replayed(sampled, "--onpolicy.replay", "0") == []
    drawn = [{s.sample_id for s in replayed(sampled, round_=r)} for r in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(map(frozenset, drawn))) > 1


def test_more_places_than_rows_is_said(sampled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(replayed(sampled, targets=60)) == 6
    assert "only 6 teacher rows for 20 places" in capsys.readouterr().err


def test_a_row_that_is_too_long_takes_no_place(sampled: Path) -> None:
    lengths = sorted(len(sample.input_ids) for sample in replayed(sampled, targets=60))
    longest = lengths[len(lengths) // 2]
    kept = replayed(sampled, "--student.max_length", str(longest), targets=60)
    assert [len(sample.input_ids) <= longest for sample in kept] == [True] * sum(n <= longest for n in lengths)


def test_their_labels_are_those_of_sft(sampled: Path) -> None:
    samples = {s.sample_id: s for s in replayed(sampled, targets=60)}
    with Project(load_config(Config, str(sampled))) as project:
        answers = sft.training_answers(project)
        rows, _ = sft.labelled(project, Student(project.config.student), answers)
    for (_, completion_id, _), row in zip(answers, rows, strict=True):
        mine, soft = samples[completion_id], row.soft
        assert soft is not None
        assert mine.soft is not None
        kept = np.isfinite(soft.logprobs).any(axis=1)
        assert mine.input_ids == row.rendered.input_ids
        assert (mine.soft.ids == soft.ids[kept]).all()
        assert (mine.soft.logprobs == soft.logprobs[kept]).all()
        assert sum(w > 0 for w in mine.weights["topk_kl"]) == kept.sum()


@pytest.mark.parametrize(
    "flags",
    [
        ["--sft.soft_labels", "false"],
        ["--sft.soft.tail", "renormalise"],  # of one candidate, which says nothing
        ["--onpolicy.algorithm", "{name: forks, beta: 0.5}", "--teacher.capabilities", "{top_logprobs_max: 5}"],
    ],
)
def test_they_are_learnt_by_their_text_where_soft_labels_are_off_or_another_loss(
    sampled: Path, flags: list[str]
) -> None:
    for sample in replayed(sampled, *flags):
        assert list(sample.weights) == ["ce"]
        assert sample.soft is None


def test_the_share_of_the_hard_label_is_that_of_sft(sampled: Path) -> None:
    for sample in replayed(sampled, "--sft.soft.alpha", "0.25"):
        ce, kl = (np.array(sample.weights[name]) for name in ("ce", "topk_kl"))
        assert set(ce[kl > 0]) == {0.25}
        assert set(kl[kl > 0]) == {0.75}
        assert set((ce + kl).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [(RelabelConfig(), {"beta": 0.5, "tail": "none"}), (ForksConfig(), {"beta": 0.0, "tail": "bucket"})],
)
def test_the_algorithms_own_divergence_comes_first(algorithm: Any, expected: dict[str, Any]) -> None:
    assert losses(SftConfig(soft=SoftLossConfig(beta=0.5, tail="none")), algorithm)["topk_kl"] == expected


def test_a_loop_learns_them(sampled: Path) -> None:
    assert main(["sft", "--config", str(sampled)]) == 0
    assert main(["onpolicy", "--config", str(sampled), "--onpolicy.rounds", "1"]) == 0
    with Project(load_config(Config, str(sampled))) as project:
        logged = project.corpus.rows("SELECT max(value) FROM metrics WHERE name = 'topk_kl_count'")
    assert logged > [(0.0,)]
