"""`report_to: tensorboard` leaves event files of both trainings, read back by TensorBoard itself."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from blackbox_kd.__main__ import main
from blackbox_kd.config import load_config
from blackbox_kd.corpus import query
from blackbox_kd.errors import ConfigError
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.student.reporting import Report, integrations


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value), in the order of the steps."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: sorted((e.step, e.value) for e in read.Scalars(tag)) for tag in read.Tags()["scalars"]}


def test_both_trainings_are_reported_step_by_step_as_the_corpus_has_them(project_file: Path) -> None:
    run_dir = project_file.parent / "run"
    flags = ["--config", str(project_file), "--report_to", "tensorboard", "--evaluate.every_steps", "2"]
    flags += ["--sft.trainer.logging_steps", "1", "--onpolicy.rounds"]
    assert main(["sample", *flags, "1"]) == 0
    assert main(["sft", *flags, "1"]) == 0
    assert main(["onpolicy", *flags, "1"]) == 0
    assert main(["onpolicy", *flags, "2"]) == 0  # goes on, and so do its steps
    sft, onpolicy = (scalars(run_dir / "runs" / stage) for stage in ("sft", "onpolicy"))
    corpus = run_dir / "corpus.duckdb"

    def logged(stage: str, name: str) -> list[float]:
        rows = f"select value from metrics where stage = '{stage}' and name = '{name}' and split = 'train' and step > 0"
        return [value for (value,) in query(corpus, f"{rows} order by round, step")[1]]

    assert [value for _, value in sft["train/loss"]] == pytest.approx(logged("sft", "loss"))
    steps = logged("onpolicy", "loss")
    assert onpolicy["train/loss"] == [(i, pytest.approx(value)) for i, value in enumerate(steps, 1)]
    assert len(steps) == 4
    assert [step for step, _ in onpolicy["train/rollout_length"]] == [2, 4]


def test_an_unknown_name_and_a_missing_package_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="report_to: tensorbord is not supported, only"):
        integrations("tensorbord")
    with pytest.raises(ConfigError, match=r"report_to: ClearMLCallback requires 'clearml'"):
        Report("clearml", tmp_path, "sft", None)


class KeepsItsRun(TrainerCallback):
    """As trackio does: its run is a context variable."""

    run: ContextVar[list[str]] = ContextVar("run")
    ended: ClassVar[list[list[str]]] = []

    def on_train_begin(self, *told: Any, **more: Any) -> None:
        self.run.set([])

    def on_log(self, *told: Any, logs: dict[str, float], **more: Any) -> None:
        self.run.get().extend(logs)

    def on_train_end(self, *told: Any, **more: Any) -> None:
        self.ended.append(self.run.get())


def test_one_that_keeps_its_run_in_a_context_finds_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "keeps", KeepsItsRun)
    report = copy_context().run(Report, "keeps", tmp_path, "onpolicy", None)  # each job of the lane has a context
    copy_context().run(report.log, 1, {"loss": 1.0})
    copy_context().run(report.close)
    assert KeepsItsRun.ended == [["loss"]]


def test_nobody_is_told_where_nobody_listens(tmp_path: Path) -> None:
    for nobody in ("none", ["none"], []):
        report = Report(nobody, tmp_path, "onpolicy", None)
        report.log(1, {"loss": 1.0})
        report.close()
    assert not list(tmp_path.iterdir())


def test_who_watches_does_not_make_another_experiment(project_file: Path) -> None:
    settings = []
    for report_to in ("none", "tensorboard"):
        overrides = [("sft.trainer.report_to", report_to), ("report_to", report_to)]
        with Project(load_config(Config, str(project_file), overrides)) as project:
            settings.append([project.settings_of(name) for name in ("sft", "round-1")])
    assert settings[0] == settings[1]
