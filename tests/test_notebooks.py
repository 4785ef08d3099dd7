"""The notebooks run on a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.__main__ import main

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_cell_runs(notebook: Path, project_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project_file.parent)
    assert main(["sample", "--config", str(project_file), "--run_dir", "runs/quickstart"]) == 0
    state: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs"), "commit notebooks without outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), state)
    assert NOTEBOOKS
