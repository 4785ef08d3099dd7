"""The yardstick: intervals, the fixed set, and metrics worked by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from blackbox_kd.command import overrides
from blackbox_kd.config import load_config
from blackbox_kd.errors import AlignmentError
from blackbox_kd.evaluate import chrf, table
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.yardstick import FixedSet, capture, interval


def test_an_interval_without_weights_is_about_the_mean() -> None:
    found = interval([1.0, 2.0, 6.0], 500)
    assert found.value == 3.0
    assert 1.0 <= found.lo < 3.0 < found.hi <= 6.0


def test_weights_make_a_ratio_of_sums() -> None:
    # 10 nats over 4 tokens and 2 nats over 2: 12 / 6, not the mean of 2.5 and 1
    assert interval([10.0, 2.0], 100, weights=[4.0, 2.0]).value == 2.0


def test_equal_rows_have_no_width() -> None:
    found = interval([0.5] * 5, 100)
    assert (found.lo, found.value, found.hi) == (0.5, 0.5, 0.5)


def test_an_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = interval(list(rng.normal(1.0, 1.0, 40)), 400)
        covered += found.lo <= 1.0 <= found.hi
    assert 0.88 <= covered / 200 <= 0.99  # 95% in theory, a little less for a percentile interval of 40 rows


def test_the_same_rows_give_the_same_interval() -> None:
    assert interval([1.0, 5.0, 2.0], 300) == interval([1.0, 5.0, 2.0], 300)


@pytest.mark.parametrize(("sums", "weights"), [([], None), ([1.0, 2.0], [1.0])])
def test_rows_that_do_not_match_up_are_an_error(sums: list[float], weights: list[float] | None) -> None:
    with pytest.raises(AlignmentError):
        interval(sums, 100, weights=weights)


def test_chrf_is_100_for_the_same_text_and_0_for_another() -> None:
    assert chrf("Tom to call.", "Tom to call.") == pytest.approx(100)
    assert chrf("xyz", "Tom to call.") == 0
    assert 20 < chrf("Tom to call", "Tim to call.") < 95


def fixed_set(path: Path, *flags: str) -> tuple[FixedSet, int]:
    async def go(project: Project) -> FixedSet:
        async with project.teacher:
            return await capture(project)

    with Project(load_config(Config, str(path), overrides(flags))) as project:
        fixed = asyncio.run(go(project))
        return fixed, project.teacher.engine.asked


def test_the_fixed_set_is_asked_for_once_and_keeps_its_id(project_file: Path) -> None:
    first, asked = fixed_set(project_file)
    assert asked == 14  # (4 heldout + 3 ood) prompts, greedy and sampled
    assert len(first.answers) == 7
    again, asked = fixed_set(project_file)
    assert asked == 0
    assert again.set_id == first.set_id


def test_other_answers_are_another_set(project_file: Path, tmp_path: Path) -> None:
    first, _ = fixed_set(project_file)
    other, _ = fixed_set(project_file, "--teacher.reply", "three", "--run_dir", str(tmp_path / "other"))
    assert other.set_id != first.set_id


def test_a_prompt_without_whole_answers_is_left_out_and_said(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed, _ = fixed_set(project_file, "--teacher.reply", "\"{% if 'ood 1' in text %} {% else %}yes{% endif %}\"")
    assert len(fixed.answers) == 6
    assert "1 of 7 prompts without two whole answers are left out" in capsys.readouterr().err


def test_a_table_has_a_line_for_each_checkpoint() -> None:
    metric = {"value": 1.234, "lo": 1.0, "hi": 2.0}
    rows = [{"name": n, "split": "heldout", "metrics": {"teacher_nll": metric}} for n in ("base", "sft")]
    lines = table({"checkpoints": rows}, "heldout")
    assert len(lines) == 3
    assert "teacher_nll" in lines[0]
    assert lines[1].split() == ["base", "1.23", "[1,", "2]"]
    assert table({"checkpoints": rows}, "ood") == []
