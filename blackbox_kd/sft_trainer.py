"""TRL's SFTTrainer as stage `sft` uses it: options from the YAML, rows that are tokens already, progress and log."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl

from blackbox_kd.align import SoftLabels
from blackbox_kd.errors import AlignmentError, BlackboxKDError, ConfigError, TrainingError
from blackbox_kd.progress import Counter
from blackbox_kd.run_dir import write_atomically
from blackbox_kd.settings import Config
from blackbox_kd.student.load import pick_device
from blackbox_kd.student.render import Rendered
from blackbox_kd.student.reporting import integrations, log_below, logs_of, name_of
from blackbox_kd.student.student import Student
from blackbox_kd.student.trainer import DistillationTrainer, SoftCollator, TrlConfig, check_soft, dataset
from blackbox_kd.yardstick import Looks


class Row(NamedTuple):
    """One answer to learn."""

    rendered: Rendered
    soft: SoftLabels | None
    completion_id: str = ""
    """Whose text it is."""


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
        "learning_rate": 3e-4,  # TRL's own, 2e-5, is for a whole model; a LoRA hardly moves at it
        "report_to": config.report_to,
        "run_name": name_of(config.run_dir, "sft"),
        "logging_steps": 5,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # how long it has waited for a better dev loss
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
    # YAML reads a bare `no` as false
    given = {
        key: "no" if key.endswith("_strategy") and value is False else value
        for key, value in config.sft.trainer.items()
    }
    with _one_line():
        args = TrlConfig(**{**defaults, **given})
        if not args.optim_target_modules:  # those ask for the model
            DistillationTrainer.get_optimizer_cls_and_kwargs(args, torch.nn.Module())  # its package may not be there
    integrations(args.report_to)
    check_devices(args.n_gpu)
    return args


@contextmanager
def _one_line() -> Iterator[None]:
    """What TRL says of its options, as it stands in the user's file."""
    try:
        yield
    except BlackboxKDError:
        raise
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        said = " ".join(str(error).replace("SFTConfig.__init__() ", "").split())
        raise ConfigError(f"sft.trainer: {said}") from error


def check_devices(visible: int) -> None:
    """Raises:
    ConfigError: transformers would spread a batch over several GPUs, by a wrapper that our loss cannot look into.
    """
    if visible > 1:
        raise ConfigError(f"sft trains on one GPU, and {visible} are visible: set CUDA_VISIBLE_DEVICES to one of them")


def check_values(block: dict[str, Any]) -> None:
    """What TRL itself would only trip over in the middle of its work."""
    if "output_dir" in block:
        raise ConfigError("sft.trainer.output_dir: it is <run_dir>/trainer while it trains; set run_dir")
    for key in ("packing", "eval_packing"):
        if block.get(key):
            raise ConfigError(f"sft.trainer.{key}: rows are trained as they are rendered, each by itself; leave it out")
    defaults = {field.name: field.default for field in dataclasses.fields(TrlConfig)}
    for key, value in block.items():
        if isinstance(defaults.get(key), int | float) and isinstance(value, str):
            raise ConfigError(f"sft.trainer.{key}: should be a number, it is {value!r}")


def build_trainer(
    student: Student, config: Config, train: list[Row], dev: list[Row], work: Path
) -> DistillationTrainer:
    """TRL's trainer over rows that are tokens already.

    Raises:
        AlignmentError: TRL would train on other tokens or labels than those rendered here.
        ConfigError: see `trainer_config`.
    """
    datasets.disable_progress_bars()
    args = trainer_config(config, work, has_dev=bool(dev))
    watched = bool(dev) and args.metric_for_best_model and args.eval_strategy != "no"
    stopping = [EarlyStoppingCallback(config.sft.early_stopping_patience)] if watched else []
    if any(row.soft for row in (*train, *dev)):
        check_soft(args)
    with _one_line():
        trainer = DistillationTrainer(
            model=student.model,
            args=args,
            train_dataset=_dataset(train),
            eval_dataset=_dataset(dev) if dev else None,
            processing_class=student.tokenizer,
            data_collator=None if args.padding_free else SoftCollator(student.renderer.end_id),
            callbacks=stopping,
            soft_loss=config.sft.soft,
        )
    log_below(trainer.callback_handler.callbacks, logs_of(config.run_dir, "sft"))  # `work` does not stay
    for talkative in (PrinterCallback, ProgressCallback):  # they print to stdout, which is for results
        trainer.remove_callback(talkative)
    check_rows(train, trainer.train_dataset)
    check_rows(dev, trainer.eval_dataset or ())
    return trainer


def go_on(trainer: DistillationTrainer, checkpoint: Path) -> None:
    """Before a training goes on from a checkpoint: what transformers would get wrong.

    It trains on where early stopping had ended it, and looks for its best checkpoint by the path of the first start.
    """
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text("utf-8"))
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = str(checkpoint.with_name(Path(best).name))
        write_atomically(file, json.dumps(state))
    if state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
        trainer.args.max_steps = state["global_step"]


def learnt_steps(trainer: DistillationTrainer) -> int:
    """Optimiser steps of the weights that are kept: those of the best checkpoint, where that is loaded at the end."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return int(best or trainer.state.global_step)


def report(trainer: DistillationTrainer, step: int, values: dict[str, float]) -> None:
    """Numbers that are not the trainer's own go to where `report_to` sends those."""
    control = TrainerControl()  # not the trainer's: that would forget that this step is to be logged
    trainer.callback_handler.on_log(trainer.args, trainer.state, control, values)


def check_rows(ours: Sequence[Row], theirs: Iterable[dict[str, Any]]) -> None:
    """Raises:
    AlignmentError: see `build_trainer`.
    """
    seen = [(list(example["input_ids"]), list(example["labels"])) for example in theirs]
    if seen != [(row.rendered.input_ids, row.rendered.labels) for row in ours]:
        raise AlignmentError("TRL changed the tokens or labels of a row; set sft.trainer back to defaults")


def trainer_steps(trainer: DistillationTrainer) -> int:
    """Optimiser steps, unless it stops early.

    Raises:
        TrainingError: none.
        ConfigError: options that make no batch.
    """
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    with _one_line():
        per_epoch = -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
    if (steps := int(per_epoch * args.num_train_epochs)) < 1:
        raise TrainingError(
            f"sft.trainer: no step to train (num_train_epochs {args.num_train_epochs}, {per_epoch} batches an epoch)"
        )
    return steps


def _dataset(rows: list[Row]) -> datasets.Dataset:
    return dataset([row.rendered for row in rows], [row.soft for row in rows])


class StepProgress(TrainerCallback):  # type: ignore[misc]
    """TRL's loop on our progress display."""

    def __init__(self, progress: Counter) -> None:
        self._progress, self._note = progress, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remember the newest loss."""
        for key, name in (("loss", "loss"), ("eval_loss", "dev loss")):
            if logs and key in logs:
                self._note = f"{name} {float(logs[key]):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more step; the last one is logged, wherever it falls between `logging_steps`."""
        self._progress.advance(state.global_step - self._progress.done, note=self._note)
        control.should_log = control.should_log or state.global_step >= state.max_steps


class FixedSetLooks(TrainerCallback):  # type: ignore[misc]
    """A look at the fixed set now and then: a loss can fall while the KL on rare tokens explodes."""

    def __init__(self, looks: Looks) -> None:
        self._looks = looks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimiser step."""
        self._looks.after(state.global_step, "sft", checkpoint="sft")


LOGGED = {
    "loss": ("train", "loss"), "nll": ("train", "nll"), "topk_kl": ("train", "topk_kl"),
    "grad_norm": ("train", "grad_norm"), "eval_loss": ("dev", "loss"), "eval_nll": ("dev", "nll"),
    "eval_topk_kl": ("dev", "topk_kl"),
}  # fmt: skip
"""TRL's name -> split and metric; nats per supervised token."""


def metric_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's log as metric rows."""
    return [
        {"checkpoint": "sft", "step": entry["step"], "split": split, "name": name, "value": float(entry[key])}
        for entry in history
        for key, (split, name) in LOGGED.items()
        if key in entry and math.isfinite(float(entry[key]))
    ]
