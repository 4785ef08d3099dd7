"""Stage `sft`: sequence-level distillation. A LoRA student learns the teacher's answers, with TRL's SFTTrainer.

    blackbox-kd sft --config quickstart --sft.trainer.learning_rate 2e-4

Reads   the teacher's whole answers of purpose `sample` (view `sft`).    Writes   checkpoints/sft, metrics.
A part of the train prompts is kept aside (`sft.dev_fraction`); training stops when their NLL stops falling.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each trainer that is built; nobody asked for it

import datasets
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from blackbox_kd.errors import AlignmentError, ConfigError, TrainingError
from blackbox_kd.model_card import write_card
from blackbox_kd.progress import Counter, counting, say
from blackbox_kd.project import Config, Project, stage_main
from blackbox_kd.student.load import pick_device
from blackbox_kd.student.render import Rendered
from blackbox_kd.student.student import Student
from blackbox_kd.types import Prompt


async def run(project: Project) -> dict[str, Any]:
    """The best checkpoint by dev NLL; done at once where it exists already."""
    config, run_dir = project.config, project.run_dir
    rows = training_rows(project)
    settings = project.settings_of("sft")
    if run_dir.done("sft", settings):
        say(f"sft: {run_dir.checkpoint('sft')} is there already")
        return {"checkpoint": str(run_dir.checkpoint("sft"))}
    student = Student(config.student, seed=config.seed)
    train, dev = split_dev(rows, config.sft.dev_fraction)
    train_rows, dev_rows = render(student, train), render(student, dev)
    if not train_rows:
        raise TrainingError(
            f"none of {len(rows)} rows is left to train on: lower sft.dev_fraction, raise student.max_length"
        )
    say(f"sft: {len(train_rows)} train and {len(dev_rows)} dev rows")
    work = run_dir.path / "trainer"
    keep_if_same(work, settings)
    trainer = build_trainer(student, config, train_rows, dev_rows, work)
    with counting("sft", trainer_steps(trainer)) as progress:
        trainer.add_callback(_Progress(progress))
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    with run_dir.committing("sft", settings) as folder:
        student.save(folder)
        write_card(folder, project, "sft", f"SFT on {len(train_rows)} teacher answers", student.config.model)
    project.log("sft", metric_rows(trainer.state.log_history))
    shutil.rmtree(work)
    say(f"sft: {trainer.state.global_step} steps, best dev NLL {trainer.state.best_metric}")
    return {"checkpoint": str(run_dir.checkpoint("sft")), "steps": trainer.state.global_step}


def training_rows(project: Project) -> list[tuple[Prompt, str]]:
    """(prompt, answer) of the questions that `sample` asks under this config.

    Raises:
        TrainingError: there are none.
    """
    rows = project.training_rows()
    if not rows:
        raise TrainingError(
            f"no answers of {project.config.teacher.model} to these prompts in {project.corpus.path}: "
            "run `sample` first"
        )
    return [(prompt, text) for prompt, _, text in rows]


def keep_if_same(work: Path, settings: dict[str, Any]) -> None:
    """Leave the trainer's checkpoints of a killed start in place, if it had these settings and they are whole."""
    note, text = work / "settings.json", json.dumps(settings, sort_keys=True)
    if not note.exists() or note.read_text("utf-8") != text:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        note.write_text(text, "utf-8")
    for folder in work.glob("checkpoint-*"):
        if not (folder / "trainer_state.json").exists():  # written last
            shutil.rmtree(folder)


def split_dev(rows: Sequence[tuple[Prompt, str]], fraction: float) -> tuple[list[Any], list[Any]]:
    """(train, dev): all answers to a prompt fall on the same side, by the prompt's hash."""
    ids = sorted({prompt.prompt_id for prompt, _ in rows})
    dev_ids = set(ids[: round(fraction * len(ids))])
    return (
        [row for row in rows if row[0].prompt_id not in dev_ids],
        [row for row in rows if row[0].prompt_id in dev_ids],
    )


def render(student: Student, rows: Sequence[tuple[Prompt, str]]) -> list[Rendered]:
    """Tokens and labels; rows longer than `student.max_length` are left out and counted."""
    rendered = [student.renderer.render(prompt.messages, text) for prompt, text in rows]
    fitting = [row for row in rendered if len(row.input_ids) <= student.config.max_length]
    if len(fitting) < len(rendered):
        say(f"{len(rendered) - len(fitting)} rows are longer than student.max_length; they are left out")
    return fitting


def trainer_config(config: Config, work: Path, *, has_dev: bool) -> TrlConfig:
    """The user's `sft.trainer` block over what the device needs (TRL's own defaults fail on a CPU).

    Raises:
        ConfigError: a key that trl.SFTConfig does not know, or a value that it refuses.
    """
    check_values(config.sft.trainer)
    on_cpu = pick_device(config.student).type == "cpu"
    defaults: dict[str, Any] = {
        "output_dir": str(work),
        "seed": config.seed,
        "max_length": config.student.max_length,
        "report_to": "none",
        "logging_steps": 5,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "disable_tqdm": True,
    }
    if on_cpu:
        defaults |= {"bf16": False, "use_cpu": True, "dataloader_pin_memory": False}
    if "gradient_checkpointing" not in config.sft.trainer:
        defaults["activation_checkpointing"] = not on_cpu
    if has_dev:
        defaults |= {
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    try:
        return TrlConfig(**{**defaults, **config.sft.trainer})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sft.trainer: {str(error).replace('SFTConfig.__init__() ', '')}") from error


def check_values(block: dict[str, Any]) -> None:
    """What TRL itself would only trip over in the middle of its work."""
    if "output_dir" in block:
        raise ConfigError("sft.trainer.output_dir: it is <run_dir>/trainer while it trains; set run_dir")
    defaults = {field.name: field.default for field in dataclasses.fields(TrlConfig)}
    for key, value in block.items():
        if isinstance(defaults.get(key), int | float) and isinstance(value, str):
            raise ConfigError(f"sft.trainer.{key}: should be a number, it is {value!r}")


def build_trainer(
    student: Student, config: Config, train: list[Rendered], dev: list[Rendered], work: Path
) -> SFTTrainer:
    """TRL's trainer over rows that are tokens already.

    Raises:
        AlignmentError: TRL would train on other tokens or labels than those rendered here.
    """
    datasets.disable_progress_bars()
    stopping = [EarlyStoppingCallback(config.sft.early_stopping_patience)] if dev else []
    trainer = SFTTrainer(
        model=student.model,
        args=trainer_config(config, work, has_dev=bool(dev)),
        train_dataset=_dataset(train),
        eval_dataset=_dataset(dev) if dev else None,
        processing_class=student.tokenizer,
        callbacks=stopping,
    )
    for talkative in (PrinterCallback, ProgressCallback):  # they print to stdout, which is for results
        trainer.remove_callback(talkative)
    for ours, theirs in zip(train, trainer.train_dataset, strict=True):
        if list(theirs["labels"]) != ours.labels or list(theirs["input_ids"]) != ours.input_ids:
            raise AlignmentError("TRL changed the tokens or labels of a training row; set sft.trainer back to defaults")
    return trainer


def trainer_steps(trainer: SFTTrainer) -> int:
    """Optimiser steps, unless it stops early."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    per_epoch = -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
    return int(per_epoch * args.num_train_epochs)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """TRL's loop on our progress display."""

    def __init__(self, progress: Counter) -> None:
        self._progress, self._note = progress, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remember the newest loss."""
        for key, name in (("loss", "loss"), ("eval_loss", "dev NLL")):
            if logs and key in logs:
                self._note = f"{name} {float(logs[key]):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more step."""
        self._progress.advance(state.global_step - self._progress.done, note=self._note)


def _dataset(rows: list[Rendered]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )


def metric_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's log as metric rows: `loss` on train and `nll` on dev, in nats per supervised token."""
    rows = []
    for entry in history:
        for key, split, name in (
            ("loss", "train", "loss"),
            ("eval_loss", "dev", "nll"),
            ("grad_norm", "train", "grad_norm"),
        ):
            if key in entry and torch.isfinite(torch.tensor(float(entry[key]))):
                rows.append({"checkpoint": "sft", "step": entry["step"], "split": split, "name": name,
                             "value": float(entry[key])})  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("sft", __doc__, run, argv)


if __name__ == "__main__":
    sys.exit(main())
