"""What docs/evaluation.md shows is understood as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from blackbox_kd.checkers import CHECKERS, checker_of
from blackbox_kd.config import validate
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.settings import JudgedConfig

DOC = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text("utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_its_rows_show_every_checker() -> None:
    (rows,) = fences("json")
    found = [checker_of(json.loads(line), "docs/evaluation.md") for line in rows.splitlines()]
    assert [type(checker) for checker in found] == list(CHECKERS.values())
    for name in CHECKERS:
        assert f"\n| `{name}` | " in DOC


@pytest.mark.parametrize("section", fences("yaml"))
def test_its_sections_are_valid(section: str) -> None:
    found = yaml.safe_load(section)["evaluate"]
    if set(found) == {"gate"}:  # of the task in the section before
        found["tasks"] = yaml.safe_load(fences("yaml")[0])["evaluate"]["tasks"]
    validate(JudgedConfig, found, "docs/evaluation.md")


def test_its_query_runs(tmp_path: Path) -> None:
    (statement,) = fences("sql")
    columns, _ = query(Corpus(tmp_path / "c.duckdb").path, statement.rstrip().rstrip(";"))
    assert columns == ["checkpoint", "name", "value"]
