"""`report_to`, as users of TRL and transformers know it, for what is trained without their Trainer.

The integrations are transformers' own (tensorboard, wandb, trackio, mlflow, ...), with their names, environment
variables and defaults; they are told what its Trainer would tell them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from blackbox_kd.errors import ConfigError


def integrations(report_to: str | Sequence[str]) -> list[TrainerCallback]:
    """One callback for each name; none for `none`.

    Raises:
        ConfigError: a name that transformers does not know, or whose package is not installed.
    """
    names = report_to if isinstance(report_to, str) or len(report_to) != 1 else report_to[0]
    try:
        return [made() for made in get_reporting_integration_callbacks(names)]
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to: {' '.join(str(error).split())}") from error


def log_below(callbacks: Sequence[TrainerCallback], folder: Path) -> None:
    """TensorBoard writes into `folder`, unless TENSORBOARD_LOGGING_DIR says otherwise."""
    for callback in callbacks:
        if getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(folder)


class Report:
    """One training's numbers, on their way to the integrations."""

    def __init__(self, report_to: str | Sequence[str], run_dir: Path, stage: str, model: Any) -> None:
        """Raises:
        ConfigError: see `integrations`.
        """
        self._callbacks, self._model = integrations(report_to), model
        self._state, self._control = TrainerState(), TrainerControl()
        self._context = copy_context()
        """In which they are told: some keep their run in a context variable, and each job of the lane has its own."""
        if self._callbacks:
            log_below(self._callbacks, logs_of(run_dir, stage))
            self._args = TrainingArguments(output_dir=str(run_dir), run_name=name_of(run_dir, stage))
            self._tell("on_train_begin")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at an optimiser step; a name that begins with `eval_` stands apart."""
        self._state.global_step = step
        self._tell("on_log", logs=dict(values))

    def close(self) -> None:
        """Nothing more will come."""
        self._tell("on_train_end")
        self._callbacks = []

    def _tell(self, event: str, **values: Any) -> None:
        for callback in self._callbacks:
            tell = getattr(callback, event)
            self._context.run(tell, self._args, self._state, self._control, model=self._model, **values)


def name_of(run_dir: Path, stage: str) -> str:
    """What a service calls this training."""
    return f"{run_dir.name}-{stage}"


def logs_of(run_dir: Path, stage: str) -> Path:
    """Event files; `tensorboard --logdir RUN_DIR` finds them."""
    return run_dir / "runs" / stage
