"""Two processes share the update: what they learn is what one alone would have, and only the first does the rest."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blackbox_kd.__main__ import main
from blackbox_kd.corpus import query
from tests import warm

PREFERENCE = ["--onpolicy.algorithm", "{name: preference, rejected: fresh}"]
GAD = ["--onpolicy.algorithm", "{name: gad, num_generations: 2, discriminator: {warmup_steps: 2, steps: 1}}"]
LONELY = ["--onpolicy.update.batch_size", "1"]
"""Every step has one sample, so the second rank has none."""


def launch(project: Path, run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "blackbox_kd.onpolicy", "--config", str(project)]
    command += ["--run_dir", str(run), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def as_the_launcher_would(project: Path, run: Path, *flags: str) -> tuple[list[int | None], str]:
    """Both ranks, without the imports of three processes: exit codes, and what was said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    command, said = ["onpolicy", "--config", str(project), "--run_dir", str(run), *flags], project.parent / "stderr"
    ranks = [
        warm.start(*command, said=said, environment=told | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)
    ]
    for rank in ranks:
        rank.join(timeout=300)
    return [rank.exitcode for rank in ranks], said.read_text()


def metrics(run: Path) -> dict[tuple[object, ...], float]:
    rows = query(run / "corpus.duckdb", "select round, step, name, value from metrics where stage = 'onpolicy'")[1]
    return {tuple(row[:3]): float(row[3]) for row in rows}


def test_two_processes_learn_what_one_does(trained: Path) -> None:
    one, two = trained.parent / "run", trained.parent / "two"
    shutil.copytree(one, two)
    assert main(["onpolicy", "--config", str(trained)]) == 0
    done = launch(trained, two)
    assert done.returncode == 0, done.stderr
    assert_alike(one, two)


@pytest.mark.parametrize("flags", [PREFERENCE, GAD, LONELY], ids=["preference", "gad", "one sample a step"])
def test_so_they_do_with(flags: list[str], trained: Path) -> None:
    one, two = trained.parent / "run", trained.parent / "two"
    shutil.copytree(one, two)
    assert main(["onpolicy", "--config", str(trained), *flags]) == 0
    codes, said = as_the_launcher_would(trained, two, *flags)
    assert codes == [0, 0], said
    assert_alike(one, two)


def assert_alike(one: Path, two: Path) -> None:
    for round_ in ("round-1", "round-2"):
        ours, theirs = (load_file(run / "checkpoints" / round_ / "adapter_model.safetensors") for run in (one, two))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)
    alone, shared = metrics(one), metrics(two)
    assert alone.keys() == shared.keys()
    assert [shared[key] for key in alone] == pytest.approx(list(alone.values()), rel=1e-3, abs=1e-4)
    asked = "select count(*), count(distinct request_key) from attempts"
    assert query(one / "corpus.duckdb", asked) == query(two / "corpus.duckdb", asked)  # rank 1 asked nobody


SILENT = ["--teacher.reply", "' '"]


def test_the_others_end_with_the_first(trained: Path) -> None:
    done = launch(trained, trained.parent / "run", *SILENT)
    assert done.returncode != 0
    assert "3 of 3 replies could not be used" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 1  # the launcher's own


def test_they_end_where_no_launcher_ends_them(trained: Path) -> None:
    codes, said = as_the_launcher_would(trained, trained.parent / "run", *SILENT)
    assert codes == [3, 0]
    assert "3 of 3 replies could not be used" in said
    assert "Traceback" not in said


def test_a_stage_for_one_process_says_so(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sft", "--config", str(trained)]) == 2
    assert "sft runs in one process" in capsys.readouterr().err
