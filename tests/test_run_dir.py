"""The run directory: one process, one identity, and checkpoints that exist wholly or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.errors import ConfigError
from blackbox_kd.run_dir import RunDir, flatten, round_of, write_atomically

SETTINGS: dict[str, Any] = {"student": {"model": "m", "lora": {"r": 16}}, "seed": 42}


@pytest.fixture
def run_dir(tmp_path: Path) -> Any:
    with RunDir(tmp_path / "run") as opened:
        yield opened


def commit(run: RunDir, name: str, settings: dict[str, Any] = SETTINGS) -> Path:
    with run.committing(name, settings) as folder:
        (folder / "weights").write_text(name)
    return run.checkpoint(name)


def in_another_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


OPEN = """
import sys, pathlib, blackbox_kd.run_dir as r, blackbox_kd.errors as e
try:
    print(r.RunDir(pathlib.Path(sys.argv[1])).run_id)
except e.ConfigError as error:
    print("refused:", error)
"""


def test_a_second_process_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        refused = in_another_process(OPEN, run.path).stdout
        assert (
            refused.strip() == f"refused: {run.path} is in use by another run; wait for it or choose another --run_dir"
        )
        run_id = run.run_id
    assert in_another_process(OPEN, tmp_path / "run").stdout.strip() == run_id


def test_a_second_open_in_this_process_is_refused_too(run_dir: RunDir) -> None:
    with pytest.raises(ConfigError, match="in use by another run"):
        RunDir(run_dir.path)


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    code = "import sys, time, pathlib, blackbox_kd.run_dir as r; d = r.RunDir(pathlib.Path(sys.argv[1])); "
    code += "print(d.run_id, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        run_id = other.stdout.readline().strip()
        os.kill(other.pid, signal.SIGKILL)
    with RunDir(tmp_path / "run") as run:
        assert run.run_id == run_id


def test_the_run_id_is_random_and_survives_restarts(tmp_path: Path) -> None:
    ids = []
    for name in ("a", "a", "b"):
        with RunDir(tmp_path / name) as run:
            ids.append(run.run_id)
    assert ids[0] == ids[1] != ids[2]
    assert uuid.UUID(ids[0]).version == 4


def test_a_path_that_cannot_be_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: cannot write in .*file"):
        RunDir(tmp_path / "file")


def test_a_checkpoint_appears_only_when_its_block_has_ended(run_dir: RunDir) -> None:
    with run_dir.committing("sft", SETTINGS) as folder:
        (folder / "weights").write_text("w")
        assert not run_dir.checkpoint("sft").exists()
        assert run_dir.checkpoints() == []
    assert (run_dir.checkpoint("sft") / "weights").read_text() == "w"
    assert run_dir.checkpoints() == ["sft"]
    assert not folder.exists()


def test_a_block_that_fails_leaves_no_checkpoint_and_the_next_try_starts_empty(run_dir: RunDir) -> None:
    with pytest.raises(KeyError), run_dir.committing("sft", SETTINGS) as folder:  # noqa: PT012
        (folder / "half").write_text("w")
        raise KeyError
    assert not run_dir.done("sft", SETTINGS)
    with run_dir.committing("sft", SETTINGS) as folder:
        assert list(folder.iterdir()) == []


def test_a_folder_that_was_killed_just_before_its_rename_is_not_a_checkpoint(run_dir: RunDir) -> None:
    commit(run_dir, "sft")
    commit(run_dir, "round-1").rename(run_dir.checkpoint(".round-1.partial"))
    (run_dir.checkpoint("my-copy")).mkdir()
    (run_dir.checkpoint("my-copy") / "settings.json").write_text("{}")
    assert run_dir.checkpoints() == ["sft"]
    assert not run_dir.done("round-1", SETTINGS)
    commit(run_dir, "round-1")
    assert run_dir.checkpoints() == ["sft", "round-1"]


def test_checkpoints_come_in_the_order_of_training(run_dir: RunDir) -> None:
    for name in ("round-10", "round-2", "sft", "round-1"):
        commit(run_dir, name)
    assert run_dir.checkpoints() == ["sft", "round-1", "round-2", "round-10"]
    assert [round_of(name) for name in ("base", "sft", "round-1", "round-12")] == [-1, 0, 1, 12]


def test_a_run_without_checkpoints_has_none(run_dir: RunDir) -> None:
    assert run_dir.checkpoints() == []
    assert not run_dir.done("sft", SETTINGS)


def test_a_checkpoint_of_the_same_settings_is_done(run_dir: RunDir) -> None:
    commit(run_dir, "sft")
    assert run_dir.done("sft", {"seed": 42, "student": {"lora": {"r": 16}, "model": "m"}})


def test_settings_that_json_writes_the_same_are_the_same(run_dir: RunDir) -> None:
    commit(run_dir, "sft", {"layers": (1, 2), "by": {3: "x"}})
    assert run_dir.done("sft", {"layers": [1, 2], "by": {"3": "x"}})


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"student": {"model": "m", "lora": {"r": 8}}, "seed": 42}, "student.lora.r 16, the config now says 8;"),
        ({"student": {"model": "m"}, "seed": 42}, "student.lora.r 16, the config now says None;"),
        (SETTINGS | {"sft": {"epochs": 2}}, "sft.epochs None, the config now says 2;"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(run_dir: RunDir, now: dict[str, Any], said: str) -> None:
    path = commit(run_dir, "sft")
    with pytest.raises(ConfigError) as caught:
        run_dir.done("sft", now)
    assert str(caught.value) == (
        f"{path} was made with {said} choose another --run_dir, or delete that folder and the later ones"
    )


def test_a_checkpoint_from_before_curation_is_refused_in_words(run_dir: RunDir) -> None:
    path = commit(run_dir, "sft")
    with pytest.raises(ConfigError) as caught:
        run_dir.done("sft", SETTINGS | {"curate": {"best_of_n": "off"}})
    assert str(caught.value) == (
        f"{path} was made before curation existed (the section curate); choose another --run_dir, or delete that "
        "folder and the later ones"
    )


def test_metrics_are_added_line_by_line_over_restarts(tmp_path: Path) -> None:
    for step in (1, 2):
        with RunDir(tmp_path / "run") as run:
            run.log([{"name": "loss", "step": step}, {"name": "länge", "step": step}])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [(json.loads(line)["name"], json.loads(line)["step"]) for line in lines] == [
        ("loss", 1), ("länge", 1), ("loss", 2), ("länge", 2),
    ]  # fmt: skip


def test_the_summary_is_replaced(run_dir: RunDir) -> None:
    run_dir.write_summary({"a": 1})
    path = run_dir.write_summary({"a": 2})
    assert path == run_dir.path / "summary.json"
    assert json.loads(path.read_text()) == {"a": 2}


def test_an_atomic_write_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", "old")
    write_atomically(tmp_path / "f", "neu ö")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text("utf-8") == "neu ö"


def test_nested_settings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
