"""The house's walls: imports point downwards, collecting needs no torch, and SQL stays in its room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "blackbox_kd"

# name of a module or package directly below blackbox_kd -> layer (DESIGN: 0 at the bottom, 5 on top)
LAYERS: dict[str, float] = {
    "errors": 0, "hashing": 0, "types": 0,
    "config": 1, "sections": 1, "run_dir": 1, "prompts": 1, "checkers": 1, "progress": 1, "near": 1, "leaks": 1,
    "curation": 1, "corpus": 1, "lane": 1,
    "teachers": 2.1, "judging": 2.1,
    "student": 2.2, "losses": 2.2, "align": 2.2,
    "algorithms": 3, "soft_labels": 3, "health": 3, "best_of_n": 3,
    "settings": 4, "project": 4, "command": 4,
    "model_card": 4, "vllm": 4, "rollout": 4, "sample": 4, "sft": 4, "onpolicy": 4, "evaluate": 4, "run": 4,
    "probe": 4, "export": 4, "sql": 4, "status": 4, "serve": 4, "plan": 4, "show": 4, "doctor": 4, "compact": 4,
    "curate": 4, "yardstick": 4, "replay": 4, "trainee": 4, "report": 4, "tasks": 4, "diversity": 4, "winrate": 4,
    "harness": 4, "questions": 4, "sft_trainer": 4,
    "__main__": 5,
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Rooms below blackbox_kd that a file imports from, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("blackbox_kd."):
            found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("blackbox_kd.")}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = LAYERS[room(path)]
    for other in imports(path) - {room(path)}:
        there = LAYERS[other]
        assert there <= here, f"{path.name} (layer {here}) imports {other} (layer {there})"
        assert not (int(here) == int(there) == 2 and here != there), f"{path.name}: 2a and 2b must not meet ({other})"


def test_every_room_has_a_layer() -> None:
    assert {room(p) for p in FILES} == set(LAYERS)


def test_only_the_corpus_imports_duckdb() -> None:
    users = {room(p) for p in FILES if "duckdb" in {n.split(".")[0] for n in raw_imports(p)}}
    assert users == {"corpus"}


def test_algorithms_do_not_know_an_http_client() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        assert not {n.split(".")[0] for n in raw_imports(path)} & {"openai", "httpx", "aiohttp", "torch"}, path


def raw_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


MODULES = [
    "sample", "curate", "probe", "project", "sql", "status", "export", "serve", "algorithms", "teachers.batch", "plan",
    "show", "report",
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_collecting_imports_no_torch(module: str) -> None:
    code = f"import sys, blackbox_kd.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stage_does_not_branch_on_a_name() -> None:
    for stage in ("sample", "sft", "onpolicy", "evaluate", "run"):
        source = (PACKAGE / f"{stage}.py").read_text()
        for name in ("relabel", "rewrite", "local", "openai", "scripted"):
            assert f'"{name}"' not in source, f"{stage}.py knows {name}"
            assert f"'{name}'" not in source, f"{stage}.py knows {name}"
