"""What is taken from lm-eval; it is not installed here, so that its own part is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.errors import ConfigError
from blackbox_kd.harness import by_question, check


def sample(doc_id: int, filter_: str = "none", **metrics: Any) -> dict[str, Any]:
    """As lm-eval 0.4.13 logs it, less what is not read."""
    return {"doc_id": doc_id, "filter": filter_, "metrics": list(metrics), **metrics}


def test_acc_norm_comes_before_acc() -> None:
    assert by_question("t", [sample(0, acc=0.0, acc_norm=1.0), sample(1, acc=1.0, acc_norm=0.0)]) == [1.0, 0.0]


def test_a_metric_of_its_own_is_taken_where_there_is_no_better_known_one() -> None:
    assert by_question("t", [sample(0, mc2=0.25)]) == [0.25]


def test_an_answer_that_is_read_in_several_ways_counts_once() -> None:
    samples = [sample(i, way, exact_match=float(way == "strict")) for way in ("strict", "flexible") for i in (0, 1)]
    assert by_question("t", samples) == [1.0, 1.0]


def test_a_metric_of_a_whole_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="t has no number for each question"):
        by_question("t", [sample(0, bleu=("a", "b"))])


def test_without_the_package_its_extra_is_named_before_anything_is_loaded(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--evaluate.lm_eval.tasks", "[arc_easy]", "--student.model", "no/such/model"]
    assert main(["evaluate", "--config", str(project_file), *flags]) == 2
    assert "pip install 'blackbox-kd[lm-eval]'" in capsys.readouterr().err


def test_nothing_is_needed_where_nothing_is_asked() -> None:
    check(None)
