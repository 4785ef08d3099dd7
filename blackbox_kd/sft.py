"""Stage `sft`: sequence-level distillation. A LoRA student learns the teacher's answers, with TRL's SFTTrainer.

    blackbox-kd sft --config quickstart --sft.trainer.learning_rate 2e-4

Reads   the teacher's whole answers of purpose `sample` (view `sft`).    Writes   curation, checkpoints/sft, metrics.
A part of the train prompts is kept aside (`sft.dev_fraction`); training stops when their loss stops falling.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from transformers.trainer_utils import get_last_checkpoint

from blackbox_kd import curate
from blackbox_kd.command import stage_main
from blackbox_kd.errors import TrainingError
from blackbox_kd.hashing import content_id
from blackbox_kd.model_card import write_card
from blackbox_kd.progress import counting, say
from blackbox_kd.project import Project
from blackbox_kd.sft_trainer import (
    FixedSetLooks,
    Row,
    StepProgress,
    build_trainer,
    go_on,
    learnt_steps,
    metric_rows,
    report,
    trainer_steps,
)
from blackbox_kd.soft_labels import label, labelled_tokens
from blackbox_kd.student.student import Student
from blackbox_kd.types import Prompt, scorer
from blackbox_kd.yardstick import Looks

Answer: TypeAlias = tuple[Prompt, str, str]
"""Prompt, completion_id and text as it is trained on."""


async def run(project: Project) -> dict[str, Any]:
    """The best checkpoint by dev loss; done at once where it exists already."""
    config, run_dir = project.config, project.run_dir
    project.prompts.refuse_leaks()
    settings = project.settings_of("sft")
    if run_dir.done("sft", settings):
        say(f"sft: {run_dir.checkpoint('sft')} is there already")
        return {"checkpoint": str(run_dir.checkpoint("sft"))}
    await curate.apply(project)
    answers = training_answers(project)
    student = Student(config.student, seed=config.seed)
    rows, coverage = labelled(project, student, answers)
    train, dev = split_dev(list(zip(answers, rows, strict=True)), config.sft.dev_fraction)
    train_rows, dev_rows = fitting(student, train), fitting(student, dev)
    if not train_rows:
        raise TrainingError(
            f"none of {len(answers)} rows is left to train on: lower sft.dev_fraction, raise student.max_length"
        )
    say(f"sft: {len(train_rows)} train and {len(dev_rows)} dev rows")
    work = run_dir.path / "trainer"
    seen = [(row.completion_id, row.soft is not None) for row in rows]
    keep_if_same(work, settings | {"rows": content_id(seen)})
    trainer = build_trainer(student, config, train_rows, dev_rows, work)
    trainer.add_callback(FixedSetLooks(Looks(project, student, partial(report, trainer))))
    if half_way := get_last_checkpoint(str(work)):
        go_on(trainer, Path(half_way))
    else:
        project.begin("sft")
    with counting("sft", trainer_steps(trainer)) as progress:
        trainer.add_callback(StepProgress(progress))
        trainer.train(resume_from_checkpoint=half_way)
    with run_dir.committing("sft", settings) as folder:
        student.save(folder)
        data = {"teacher answers learnt": len(train_rows), "kept aside for the dev loss": len(dev_rows)}
        how = f"sequence-level stage, {learnt_steps(trainer)} optimiser steps"
        write_card(folder, project, "sft", how, data, [row.completion_id for row in train_rows])
        measured = [{"checkpoint": "sft", "name": name, "value": value} for name, value in coverage.items()]
        project.log("sft", [*metric_rows(trainer.state.log_history), *measured])
    shutil.rmtree(work)
    best = "" if trainer.state.best_metric is None else f", best dev loss {trainer.state.best_metric:.4f}"
    say(f"sft: {trainer.state.global_step} steps{best}")
    return {"checkpoint": str(run_dir.checkpoint("sft")), "steps": trainer.state.global_step, **coverage}


def training_answers(project: Project) -> list[Answer]:
    """(prompt, completion_id, text) of the questions that `sample` asks under this config.

    Raises:
        TrainingError: there are none.
    """
    rows = project.training_rows()
    if not rows:
        raise TrainingError(
            f"no answers of {project.config.teacher.model} to these prompts in {project.corpus.path}: "
            "run `sample` first"
        )
    return rows


def labelled(project: Project, student: Student, answers: Sequence[Answer]) -> tuple[list[Row], dict[str, float]]:
    """A row for each answer, with its soft labels where they are wanted and there; how much of it they cover."""
    ids = [completion_id for _, completion_id, _ in answers]
    rendered = [student.renderer.render(prompt.messages, text) for prompt, _, text in answers]
    if not project.config.sft.soft_labels:
        return [Row(each, None, i) for each, i in zip(rendered, ids, strict=True)], {}
    model = project.config.teacher.model
    by = scorer(model, project.teacher.context.context_hash)
    texts = [(completion_id, text) for _, completion_id, text in answers]
    found = label(project.corpus, student.renderer, model, by, texts)
    coverage = found.metrics()
    if coverage:
        with_labels = sum(labelled_tokens(each) > 0 for each in found.labels)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in coverage.items())
        tokenizer = "the teacher's tokenizer is the student's" if found.same else "across tokenizers"
        say(f"sft: {with_labels} of {len(answers)} answers have soft labels ({shown}; {tokenizer})")
    elif project.config.sample.top_logprobs:
        say(f"sft: no answer has top-logprobs by {by} that can be learnt: their text alone is")
    return [Row(*each) for each in zip(rendered, found.labels, ids, strict=True)], coverage


def keep_if_same(work: Path, settings: dict[str, Any]) -> None:
    """Leave the trainer's checkpoints of a killed start in place, if it had these settings and they are whole."""
    note, text = work / "settings.json", json.dumps(settings, sort_keys=True)
    if not note.exists() or note.read_text("utf-8") != text:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        note.write_text(text, "utf-8")
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))  # written last
        except (OSError, ValueError):
            shutil.rmtree(folder)


def split_dev(rows: Sequence[tuple[Answer, Row]], fraction: float) -> tuple[list[Row], list[Row]]:
    """(train, dev): all answers to a prompt fall on the same side, by the prompt's hash."""
    ids = sorted({prompt.prompt_id for (prompt, _, _), _ in rows})
    dev_ids = set(ids[: round(fraction * len(ids))])
    return (
        [row for (prompt, _, _), row in rows if prompt.prompt_id not in dev_ids],
        [row for (prompt, _, _), row in rows if prompt.prompt_id in dev_ids],
    )


def fitting(student: Student, rows: Sequence[Row]) -> list[Row]:
    """Rows that are not longer than `student.max_length`; the others are counted."""
    kept = [row for row in rows if len(row.rendered.input_ids) <= student.config.max_length]
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} rows are longer than student.max_length; they are left out")
    return kept


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("sft", __doc__, run, argv)


if __name__ == "__main__":
    sys.exit(main())
