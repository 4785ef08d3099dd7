"""The notebooks run on finished runs, from the first cell to the last, and their pictures show something."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.pages import ROOT

PICTURES = {"01_query_the_corpus": 1, "02_read_a_run": 7, "03_compare_algorithms": 4}


@pytest.fixture
def folder(finished_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(finished_runs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    with plt.rc_context():
        yield tmp_path
    plt.close("all")


def ink(figure: Figure) -> float:
    """Share of its pixels that are not white."""
    figure.canvas.draw()
    return float((np.asarray(figure.canvas.buffer_rgba())[..., :3] < 250).any(-1).mean())  # type: ignore[attr-defined]


def test_every_notebook_has_its_number_of_pictures_here() -> None:
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == PICTURES.keys()


@pytest.mark.parametrize("name", PICTURES)
def test_every_cell_runs_and_every_picture_shows_something(name: str, folder: Path) -> None:
    state: dict[str, Any] = {}
    pictures = 0
    for number, cell in enumerate(json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]):
        assert not cell.get("outputs"), "commit notebooks without outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}:{number}", "exec"), state)
        for figure in map(plt.figure, plt.get_fignums()):
            assert all(ax.has_data() or ax.texts for ax in figure.axes), f"{name}:{number} has empty axes"
            assert ink(figure) > 0.01, f"{name}:{number}"
            pictures += 1
        plt.close("all")
    assert pictures == PICTURES[name]
    with pytest.raises(Exception, match="closed"):  # a run could not write
        state["con"].execute("SELECT 1")
