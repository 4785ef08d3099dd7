"""The main job with the real teacher (llama.cpp's server) and the real student (SmolLM2), killed on its way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.config import find_file
from blackbox_kd.corpus import query
from tests import warm

SMALL = [
    "--prompts.limits", "{train: 10, heldout: 4, ood: 2, holdback: 2}",
    "--sample.max_prompts", "6",
    "--sft.trainer.num_train_epochs", "2",
    "--onpolicy.rounds", "1",
    "--onpolicy.prompts_per_round", "4",
    "--onpolicy.update.max_steps", "1",
    "--onpolicy.max_completion_length", "20",
    "--evaluate.max_completion_length", "20",
    "--evaluate.diversity_prompts", "2",
    "--evaluate.gate", "{everyday: 1}",
]  # fmt: skip


def command(folder: Path) -> list[str]:
    task = folder.parent / "everyday.jsonl"  # a question in ten of the shipped one
    task.write_text("\n".join(find_file("data/tasks/everyday.jsonl", "task").read_text().splitlines()[::10]))
    few = ["--evaluate.tasks", f"{{everyday: {task}}}"]
    return ["run", "--config", "quickstart", "--run_dir", str(folder), *SMALL, *few]


def rows(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    return query(folder / "corpus.duckdb", sql)[1]


def answers(folder: Path) -> int:
    if not (folder / "corpus.duckdb").exists():
        return 0
    return int(rows(folder, "select count(*) from completions")[0][0])


def servers() -> set[int]:
    """Processes that serve a local teacher."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"blackbox_kd.teachers.local_server" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_main_job_survives_a_kill_and_then_asks_nothing_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    others = servers()
    first = warm.start(*command(folder))
    deadline = time.monotonic() + 300
    while answers(folder) < 2:
        assert first.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.kill()
    first.join()
    deadline = time.monotonic() + 10
    while servers() - others:
        assert time.monotonic() < deadline, "the teacher outlived the run"
        time.sleep(0.1)
    kept = answers(folder)

    again = [sys.executable, "-m", "blackbox_kd", *command(folder)]
    second = subprocess.run(again, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "round-1" in second.stdout
    # 6 train answers, 6 fixed prompts x 2, 2 of 4 afresh: each is there once, and at most 4 were in flight at the kill
    assert rows(folder, "select count(*), count(distinct request_key) from completions where author = 'teacher'") == [
        (20, 20)
    ]
    ((billed, unknown),) = rows(
        folder, "select count(*) filter (billed), count(*) filter (billed is null) from attempts"
    )
    assert billed == 20
    assert unknown <= 4
    assert kept >= 2

    summary = json.loads((folder / "summary.json").read_text())
    heldout = {c["name"]: c["metrics"] for c in summary["checkpoints"] if c["split"] == "heldout"}
    assert list(heldout) == ["base", "sft", "round-1"]
    assert heldout["sft"]["teacher_nll"]["value"] < heldout["base"]["teacher_nll"]["value"]
    assert heldout["round-1"]["teacher_nll"]["value"] != heldout["sft"]["teacher_nll"]["value"]

    third = warm.start(*command(folder), said=tmp_path / "stderr")
    third.join()
    said = (tmp_path / "stderr").read_text()
    assert third.exitcode == 0, said
    assert "the teacher was asked nothing" in said
    assert "starting the local teacher" not in said
    assert json.loads((folder / "summary.json").read_text()) == summary


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_the_adapter_loads_as_its_card_says(tmp_path: Path) -> None:
    import torch

    from blackbox_kd.sections import StudentConfig
    from blackbox_kd.student.load import model_source
    from blackbox_kd.student.student import Student
    from tests.conftest import GGUF

    student = Student(StudentConfig(model=GGUF, device="cpu"))
    student.save(tmp_path)

    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_source(GGUF), dtype=torch.float32)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == model_source(GGUF)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([student.renderer.prompt([{"role": "user", "content": "Hello"}])])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, student.model(ids).logits)
    assert student.tokenizer.decode(ids[0]).endswith("<|im_start|>assistant\n")
