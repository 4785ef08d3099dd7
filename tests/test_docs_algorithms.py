"""What docs/algorithms.md says of adding an algorithm is all that it takes, from outside the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blackbox_kd.corpus import query
from tests.pages import PAGES, blocks, install, marked

DOC = PAGES["docs/algorithms.md"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The module of the documentation as a package."""
    (block,) = blocks("toml", "docs/algorithms.md")
    return install(tmp_path / "site", "longest", marked("longest.py"), block.text)


def test_its_tables_are_those_of_the_benchmark() -> None:
    from algorithms import tables

    results = Path(__file__).parent.parent / "benchmarks" / "results" / "algorithms.json"
    assert tables(json.loads(results.read_text())["rows"]) in DOC


def test_it_takes_at_most_30_lines() -> None:
    assert sum(bool(line.strip()) for line in marked("longest.py").splitlines()) <= 30


def test_an_algorithm_from_outside_runs_the_whole_loop(project_file: Path, installed: Path) -> None:
    command = [sys.executable, "-m", "blackbox_kd", "run", "--config", str(project_file)]
    command += ["--onpolicy.algorithm", "{name: longest, share: 0.7}"]
    path = os.pathsep.join([str(installed), str(Path(__file__).parent.parent)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    corpus = project_file.parent / "run" / "corpus.duckdb"
    learnt = "select round, value from metrics where name = 'ce_count' and stage = 'onpolicy' order by all"
    assert {round_ for round_, value in query(corpus, learnt)[1] if value > 0} == {1, 2}
    asked = query(corpus, "select count(*) from requests where purpose = 'sample'")[1]
    assert asked == [(6 + 4,)]  # by `sample`, then two of three fresh prompts in each round


def test_an_option_that_it_does_not_have_is_refused(project_file: Path, installed: Path) -> None:
    command = [sys.executable, "-m", "blackbox_kd", "plan", "--config", str(project_file)]  # as every stage would
    command += ["--onpolicy.algorithm", "{name: longest, shar: 0.7}"]
    path = os.pathsep.join([str(installed), str(Path(__file__).parent.parent)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'onpolicy.algorithm.share'" in done.stderr
