"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) under a checkpoint.

The extra `lm-eval` brings it. It is handed the student's model as it is and asks with its chat template. What it finds
is not in the corpus: it is measured anew each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from blackbox_kd.errors import ConfigError
from blackbox_kd.sections import LmEvalConfig

if TYPE_CHECKING:  # with torch
    from blackbox_kd.student.student import Student

PREFERRED = ("acc_norm", "acc", "exact_match")
"""What counts as right: the first of these that a task has, else its own first metric."""


def check(config: LmEvalConfig | None) -> None:
    """Raises:
    ConfigError: it is asked for and not installed, or does not know a task.
    """
    if config is None:
        return
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate.lm_eval: it is not installed: pip install 'blackbox-kd[lm-eval]'")
    known = set(_manager(config.include_path).all_tasks)
    if unknown := [name for name in config.tasks if name not in known]:
        raise ConfigError(f"evaluate.lm_eval.tasks: there is no task {unknown[0]!r}; `lm-eval ls tasks` lists them")


def scores(student: Student, config: LmEvalConfig | None, batch_size: int) -> dict[str, list[float]]:
    """By task, one number for each question, in its order.

    Raises:
        ConfigError: see `by_question`.
    """
    if config is None:
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=student.model, tokenizer=student.tokenizer, batch_size=batch_size)
    found = {}
    for name in config.tasks:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=_manager(config.include_path),
            apply_chat_template=True,
            bootstrap_iters=0,
        )
        found[name] = [value for samples in results["samples"].values() for value in by_question(name, samples)]
    return found


def by_question(name: str, samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """The preferred metric of a task's samples, of the first way in which it reads an answer (`filter`).

    Raises:
        ConfigError: it is no number of one question, such as BLEU of a whole set.
    """
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metrics = first[0]["metrics"]
    metric = next(metric for metric in (*PREFERRED, *metrics) if metric in metrics)
    try:
        return [float(sample[metric]) for sample in first]
    except TypeError as error:
        raise ConfigError(f"evaluate.lm_eval.tasks: {name} has no number for each question ({metric})") from error


@lru_cache
def _manager(include_path: str | None) -> Any:
    """It reads thousands of files: once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)
