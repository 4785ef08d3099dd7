"""Soft labels through TRL's trainer: what reaches the loss, its value by hand, accumulation, and what it teaches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blackbox_kd import sft
from blackbox_kd.__main__ import main
from blackbox_kd.command import overrides
from blackbox_kd.config import load_config
from blackbox_kd.corpus import query
from blackbox_kd.errors import AlignmentError, ConfigError
from blackbox_kd.sections import StudentConfig
from blackbox_kd.settings import Config
from blackbox_kd.sft_trainer import Row, build_trainer, check_devices, go_on, metric_rows, trainer_config
from blackbox_kd.student.render import IGNORE
from blackbox_kd.student.student import Student
from blackbox_kd.student.trainer import TEACHER_COLUMNS, DistillationTrainer, SoftCollator, dataset
from blackbox_kd.types import SamplingParams
from tests.soft import (
    TEXTS,
    kl_with_bucket,
    logprobs_of,
    own_labels,
    rendered,
    row_of,
    soft_labels,
    targets,
    teacher_of,
)

SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}


@pytest.fixture
def student(tiny_model: Path) -> Student:
    return fresh(tiny_model)


def fresh(tiny_model: Path, *, seed: int = 0, std: float = 0.05) -> Student:
    """An adapter that is not the identity, so that gradients reach all of it."""
    made = Student(StudentConfig(model=str(tiny_model), device="cpu"), seed=1)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std, generator=drawn)
    return made


Build = Callable[..., DistillationTrainer]


def test_a_lora_learns_faster_than_trl_would_let_it_unless_it_is_told(project_file: Path, tmp_path: Path) -> None:
    config = load_config(Config, str(project_file), overrides(["--sft.trainer", "{num_train_epochs: 2}"]))
    assert trainer_config(config, tmp_path, has_dev=False).learning_rate == 3e-4
    config = load_config(Config, str(project_file), overrides(["--sft.trainer.learning_rate", "2e-5"]))
    assert trainer_config(config, tmp_path, has_dev=False).learning_rate == 2e-5


def test_several_gpus_are_a_mistake_that_is_said_before_anything_is_paid() -> None:
    check_devices(0)
    check_devices(1)
    with pytest.raises(ConfigError, match="2 are visible: set CUDA_VISIBLE_DEVICES"):
        check_devices(2)


def test_an_optimiser_without_its_package_is_a_mistake_of_the_file(project_file: Path, tmp_path: Path) -> None:
    for optim in ("adamw_bnb_8bit", "lomo"):
        config = load_config(Config, str(project_file), overrides(["--sft.trainer.optim", optim]))
        with pytest.raises(ConfigError, match=r"sft\.trainer: You need to install `(bitsandbytes|lomo_optim)`"):
            trainer_config(config, tmp_path, has_dev=False)


@pytest.fixture
def build(project_file: Path, tmp_path: Path) -> Build:
    """sft's own trainer on these rows, with a `sft.trainer` block and `sft.soft` keys of the test."""

    def make(
        student: Student,
        train: Sequence[Row],
        dev: Sequence[Row] = (),
        block: dict[str, Any] | None = None,
        **soft: Any,
    ) -> DistillationTrainer:
        flags = [part for key, value in (block or {}).items() for part in (f"--sft.trainer.{key}", str(value))]
        flags += [part for key, value in soft.items() for part in (f"--sft.soft.{key}", str(value))]
        config = load_config(Config, str(project_file), overrides(flags))
        return build_trainer(student, config, list(train), list(dev), tmp_path / "trainer")

    return make


def adapter(student: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in student.model.parameters() if p.requires_grad])


def mixed(student: Student) -> list[Row]:
    """Eight rows: whole, half and no labels, of different lengths."""
    rows = [row_of(student, text, without=[0] if i % 2 else []) for i, text in enumerate(TEXTS)]
    rows[2] = Row(rows[2].rendered, None)
    assert len({len(row.rendered.labels) for row in rows}) > 3
    return rows


def batches(trainer: DistillationTrainer) -> list[dict[str, torch.Tensor]]:
    """As the loss gets them."""
    return [dict(batch) for batch in trainer.get_train_dataloader()]


def loss_of(trainer: DistillationTrainer, batch: dict[str, torch.Tensor], tokens: int | None = None) -> float:
    """As a part of an optimiser step with so many tokens; None: the batch is the step."""
    count = None if tokens is None else torch.tensor(tokens)
    return float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count).detach())


# --- what reaches the loss


def test_every_label_reaches_the_loss_beside_its_token(student: Student, build: Build) -> None:
    rows = mixed(student)
    trainer = build(student, rows, block={"per_device_train_batch_size": 4})
    soft_of = {tuple(row.rendered.input_ids): row.soft for row in rows}
    seen = 0
    for batch in batches(trainer):
        for b, mask in enumerate(batch["attention_mask"]):
            length = int(mask.sum())
            soft = soft_of[tuple(batch["input_ids"][b, :length].tolist())]
            kept = batch["labels"][b] != IGNORE
            ids, logprobs = (batch[name][b].numpy() for name in TEACHER_COLUMNS)
            assert not np.isfinite(logprobs[~kept]).any()  # prompt and padding have none
            if soft is None:
                assert not np.isfinite(logprobs).any()
            else:
                np.testing.assert_array_equal(ids[kept], soft.ids)
                np.testing.assert_array_equal(logprobs[kept], soft.logprobs)
            seen += 1
    assert seen == len(rows)


def test_sets_of_different_width_share_a_batch(student: Student, build: Build) -> None:
    rows = [row_of(student, "one two", k=2), row_of(student, "three four", k=5)]
    (batch,) = batches(build(student, rows))
    filled = batch["teacher_logprobs"].isfinite().sum(-1)
    assert sorted(int(row.max()) for row in filled) == [2, 5]


def test_without_soft_labels_there_are_no_columns(student: Student, build: Build) -> None:
    rows = [Row(rendered(student, text), None) for text in TEXTS]
    assert not set(TEACHER_COLUMNS) & set(build(student, rows).train_dataset.column_names)


def test_as_many_labels_as_tokens(student: Student) -> None:
    row = row_of(student, "one two three")
    assert row.soft
    cut = soft_labels(row.soft.ids[:-1], row.soft.logprobs[:-1])
    with pytest.raises(AlignmentError, match="3 soft labels for 4 supervised tokens"):
        dataset([row.rendered], [cut])


def test_a_row_that_was_cut_is_refused_by_the_collator(student: Student) -> None:
    rows = [row_of(student, text) for text in ("one two three", "one")]
    long, short = dataset([row.rendered for row in rows], [row.soft for row in rows])
    cut = {**long, "input_ids": long["input_ids"][:-1], "labels": long["labels"][:-1]}
    for batch in ([cut, short], [short, {**short, "labels": long["labels"]}]):  # 12 for 3 tokens, 6 for 4 tokens
        with pytest.raises(AlignmentError, match=r"sft\.trainer back to defaults"):
            SoftCollator(student.renderer.end_id)(batch)


@pytest.mark.parametrize("which", ["shifted", "of another row"])
@pytest.mark.parametrize("where", ["train", "dev"])
def test_labels_of_other_tokens_are_refused_before_training(
    which: str, where: str, student: Student, build: Build
) -> None:
    good = [row_of(student, text) for text in TEXTS]
    wrong = []
    for row in good:
        assert row.soft
        size = len(row.soft.ids)
        if which == "shifted":
            moved = row.soft._replace(ids=np.roll(row.soft.ids, 1, 0), logprobs=np.roll(row.soft.logprobs, 1, 0))
        else:
            foreign = teacher_of(rendered(student, "eight " * size))
            moved = soft_labels(foreign.ids[:size], foreign.logprobs[:size])
        wrong.append(Row(row.rendered, moved))
    with pytest.raises(AlignmentError, match="shifted or belong to other texts") as caught:
        build(student, *((wrong, good) if where == "train" else (good, wrong)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("padding_free", True), ("label_smoothing_factor", 0.1), ("loss_type", "dft")]
)
def test_what_soft_labels_do_not_go_with_is_a_mistake(key: str, value: Any, student: Student, build: Build) -> None:
    with pytest.raises(ConfigError, match=rf"sft\.trainer\.{key} is .*set sft.soft_labels to false"):
        build(student, mixed(student), block={key: value})


@pytest.mark.parametrize("key", ["packing", "eval_packing"])
@pytest.mark.parametrize("soft", [True, False])
def test_packing_is_a_mistake(key: str, soft: bool, student: Student, build: Build) -> None:
    rows = mixed(student) if soft else [Row(row.rendered, None) for row in mixed(student)]
    with pytest.raises(ConfigError, match=rf"sft\.trainer\.{key}: rows are trained as they are rendered"):
        build(student, rows, block={key: True})


@pytest.mark.parametrize("max_length", [15, 20])  # 15: some rows lose their whole answer, and TRL drops them
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("where", ["train", "dev"])
def test_rows_that_trl_would_cut_are_refused(
    max_length: int, soft: bool, where: str, student: Student, build: Build
) -> None:
    long = [row_of(student, text) for text in (TEXTS[1], TEXTS[3])]
    rows = [Row(row.rendered, row.soft if soft else None) for row in long]
    short = [Row(rendered(student, "no", "a"), None)] * 2
    with pytest.raises(AlignmentError, match=r"TRL changed .* set sft\.trainer back to defaults"):
        build(student, *((rows, short) if where == "train" else (short, rows)), block={"max_length": max_length})


# --- the loss


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_loss_is_that_by_hand(alpha: float, student: Student, build: Build) -> None:
    rows = [
        row_of(student, "one two three", without=[0, 2]),
        row_of(student, "yes"),
        Row(rendered(student, "no"), None),
    ]
    trainer = build(student, rows, block={"per_device_train_batch_size": 4}, alpha=alpha)
    total = 0.0
    for row in rows:
        log_q = logprobs_of(student, row.rendered)
        for t, token in enumerate(targets(row.rendered)):
            nll = -float(log_q[t, token])
            if row.soft is None or not np.isfinite(row.soft.logprobs[t]).any():
                total += nll
            else:
                log_p = row.soft.logprobs[t].astype(float)
                total += alpha * nll + (1 - alpha) * kl_with_bucket(log_p, log_q[t, row.soft.ids[t]].tolist())
    tokens = sum(len(targets(row.rendered)) for row in rows)
    (batch,) = batches(trainer)
    assert loss_of(trainer, batch) == pytest.approx(total / tokens, rel=1e-5)
    # as a part of a step of 100 tokens
    assert loss_of(trainer, batch, 100) == pytest.approx(total / 100, rel=1e-5)


def test_padding_changes_nothing(student: Student, build: Build) -> None:
    rows = mixed(student)
    trainer = build(student, rows)
    collate = trainer.data_collator
    examples = [dict(example) for example in trainer.train_dataset]
    n = sum(len(targets(row.rendered)) for row in rows)
    together = loss_of(trainer, collate(examples), n)
    assert together == pytest.approx(sum(loss_of(trainer, collate([each]), n) for each in examples), rel=1e-5)
    collate.pad_to_multiple_of = 64
    assert together == pytest.approx(loss_of(trainer, collate(examples), n), rel=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_rows_are_padded_to_a_multiple(soft: bool, student: Student, build: Build) -> None:
    rows = mixed(student) if soft else [Row(row.rendered, None) for row in mixed(student)]
    n = sum(len(targets(row.rendered)) for row in rows)
    found = []
    for block in ({}, {"pad_to_multiple_of": 64}):
        trainer = build(student, rows, block={"per_device_train_batch_size": 8} | block)
        (batch,) = batches(trainer)
        assert ({each.shape[1] for each in batch.values()} == {64}) is bool(block)
        found.append(loss_of(trainer, batch, n))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_one_batch_of_eight_is_eight_of_one(soft: bool, tiny_model: Path, build: Build) -> None:
    found = []
    for size, steps in ((8, 1), (1, 8)):
        student = fresh(tiny_model)
        rows = mixed(student) if soft else [Row(row.rendered, None) for row in mixed(student)]
        start = adapter(student)
        block = SGD | {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        build(student, rows, block=block).train()
        found.append(adapter(student))
        assert float((adapter(student) - start).abs().max()) > 1e-3
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_alpha_1_is_plain_sft(tiny_model: Path, build: Build) -> None:
    found = []
    for soft in (True, False):
        student = fresh(tiny_model)
        rows = mixed(student) if soft else [Row(row.rendered, None) for row in mixed(student)]
        block = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3}
        build(student, rows, block=block, **({"alpha": 1} if soft else {})).train()
        found.append(adapter(student))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_eval_loss_is_a_mean_over_tokens_not_over_batches(soft: bool, student: Student, build: Build) -> None:
    dev = [row_of(student, TEXTS[3]), row_of(student, "no")]
    if not soft:
        dev = [Row(row.rendered, None) for row in dev]
    trainer = build(student, mixed(student), dev, block={"per_device_eval_batch_size": 1})
    scores = student.score([row.rendered for row in dev], [row.soft for row in dev], batch_size=1)
    nll = np.concatenate([-each.logprobs for each in scores])
    loss = np.concatenate([each.tail_kl for each in scores]) if soft else nll
    of_batches = [float(each.mean()) for each in np.split(loss, [len(scores[0].logprobs)])]
    assert abs(np.mean(of_batches) - loss.mean()) > 0.01  # the two can be told apart
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(loss.mean(), rel=1e-4)
    assert found["eval_nll"] == pytest.approx(nll.mean(), rel=1e-4)
    logged = {row["name"]: row["value"] for row in metric_rows([{**found, "step": 1}])}
    assert logged["loss"] == found["eval_loss"]


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_a_dev_nll_is_only_what_is_one(loss_type: str, student: Student, build: Build) -> None:
    rows = [Row(row.rendered, None) for row in mixed(student)]
    found = build(student, rows, rows, block={"loss_type": loss_type}).evaluate()
    assert "eval_loss" in found
    assert ("eval_nll" in found) is (loss_type == "nll")


def router(student: Student) -> None:
    """The config of a mixture of experts."""
    student.model.config.output_router_logits = False
    student.model.config.router_aux_loss_coef = 0.001


def test_soft_labels_do_not_go_with_a_routers_loss(student: Student, build: Build) -> None:
    router(student)
    with pytest.raises(ConfigError, match=r"coefficient 0\.001\) does not go with soft labels"):
        build(student, mixed(student))
    build(student, [Row(row.rendered, None) for row in mixed(student)])
    build(student, mixed(student), block={"router_aux_loss_coef": 0})


def test_at_alpha_1_the_divergence_is_still_shown(student: Student, build: Build) -> None:
    rows, found = mixed(student), {}
    for alpha in (0, 1):
        metrics = build(student, rows, rows, alpha=alpha).evaluate()
        found[alpha] = metrics["eval_topk_kl"]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[1] > 0.01
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], rel=1e-5)


def test_a_lone_candidate_renormalised_leaves_the_hard_label(student: Student, build: Build) -> None:
    """Its divergence is 0 whatever the student does."""
    made = rendered(student, "one two three")
    ids, logprobs = (np.copy(each) for each in teacher_of(made)[:2])
    logprobs[[0, 2], 1:] = -np.inf
    rows = [Row(made, soft_labels(ids, logprobs))]
    log_q = logprobs_of(student, made)
    total = 0.0
    for t, token in enumerate(targets(made)):
        if t in (0, 2):
            total -= float(log_q[t, token])
        else:
            p, q = torch.tensor(logprobs[t]).double().log_softmax(0), log_q[t, ids[t]].log_softmax(0)
            total += float((p.exp() * (p - q)).sum())
    trainer = build(student, rows, tail="renormalise")
    (batch,) = batches(trainer)
    assert loss_of(trainer, batch) == pytest.approx(total / len(targets(made)), rel=1e-4)


def test_a_batch_without_any_label_is_learnt_from_its_text(student: Student, build: Build) -> None:
    rows = [row_of(student, "one"), Row(rendered(student, "two two two"), None)]
    trainer = build(student, rows, block={"per_device_train_batch_size": 1})
    losses = []
    for batch in batches(trainer):
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
    nll = -np.mean(student.logprobs([rows[1].rendered], batch_size=1)[0])
    assert min(abs(loss - nll) for loss in losses) < 1e-4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (1, 8), (3, 4)])
def test_training_logs_nats_per_token(size: int, steps: int, student: Student, build: Build) -> None:
    rows = mixed(student)
    before = student.score([r.rendered for r in rows], [r.soft for r in rows], batch_size=8)
    block = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
        "max_steps": 1,
        "logging_steps": 1,
    }
    trainer = build(student, rows, block=block)
    trainer.train()
    logged = {row["name"]: row["value"] for row in metric_rows(trainer.state.log_history)}
    tokens = sum(len(each.logprobs) for each in before)
    assert logged["nll"] == pytest.approx(-sum(each.logprobs.sum() for each in before) / tokens, rel=1e-3)
    assert logged["topk_kl"] == pytest.approx(sum(np.nansum(each.tail_kl) for each in before) / tokens, rel=1e-3)
    assert {"loss", "grad_norm"} <= set(logged)


def test_soft_labels_bring_the_student_nearer_to_the_teacher_than_text_does(tiny_model: Path, build: Build) -> None:
    """The teacher is the same base with another adapter; the text is its own, and both ways it is learnt by heart."""
    teacher = fresh(tiny_model, seed=1, std=0.3)
    prompt = teacher.renderer.prompt([{"role": "user", "content": "Say it"}])
    sampling = SamplingParams(max_completion_length=8)
    drawn = teacher.generate([prompt] * 16, sampling, batch_size=16, seed=0, description="t")
    texts = [teacher.renderer.join(prompt, ids) for ids in drawn]
    rows = [Row(text, own_labels(teacher, text, k=20)) for text in texts]
    end = {}
    for soft in (True, False):
        student = fresh(tiny_model)
        learnt = rows if soft else [Row(row.rendered, None) for row in rows]
        trainer = build(student, learnt, block={"max_steps": 40, "learning_rate": 1e-2})
        start = tail_kl(student, rows)
        trainer.train()
        end[soft] = tail_kl(student, rows)
    assert end[True] < 0.5 * start
    assert end[True] < 0.5 * end[False]


def tail_kl(student: Student, rows: Sequence[Row]) -> float:
    """Mean over the tokens."""
    scores = student.score([row.rendered for row in rows], [row.soft for row in rows], batch_size=16)
    return float(np.nanmean(np.concatenate([each.tail_kl for each in scores])))


# --- Student.score


def test_scores_are_those_of_the_model(student: Student) -> None:
    rows = [rendered(student, text) for text in TEXTS[:4]]
    soft = [teacher_of(rows[0]), None, teacher_of(rows[2], without=[0, 3]), own_labels(student, rows[3])]
    for row, labels, found in zip(rows, soft, student.score(rows, soft, batch_size=3), strict=True):
        log_q = logprobs_of(student, row)
        assert found.logprobs == pytest.approx([float(log_q[t, i]) for t, i in enumerate(targets(row))], abs=1e-5)
        for t, kl in enumerate(found.tail_kl):
            if labels is None or not np.isfinite(labels.logprobs[t]).any():
                assert np.isnan(kl)
            else:
                by_hand = kl_with_bucket(labels.logprobs[t].astype(float), log_q[t, labels.ids[t]].tolist())
                assert kl == pytest.approx(by_hand, abs=1e-5)
    assert student.score(rows[3:], soft[3:], batch_size=1)[0].tail_kl == pytest.approx(0.0, abs=1e-5)


def test_a_score_needs_a_label_for_each_token(student: Student) -> None:
    row = rendered(student, "one two")
    with pytest.raises(AlignmentError, match="2 soft labels for 3 supervised tokens"):
        student.score([row], [teacher_of(rendered(student, "one"))], batch_size=1)


@pytest.mark.parametrize("training", [True, False])
def test_a_score_leaves_mode_and_draws_as_they_were(training: bool, student: Student) -> None:
    row = rendered(student, "one two")
    student.model.train(training)
    before = torch.get_rng_state()
    student.score([row], [None], batch_size=1)
    assert student.model.training is training
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(AlignmentError):
        student.score([row], [teacher_of(rendered(student, "one"))], batch_size=1)
    assert student.model.training is training


@pytest.mark.parametrize(
    ("flag", "said"),
    [("assistant_only_loss=true", "sft.trainer: "), ("num_train_epochs=0", "sft.trainer: no step to train"),
     ("optim=grokadamw", "sft.trainer: Please install grokadamw"),
     ("eos_token=<foo>", "sft.trainer: "), ("label_smoothing_factor=0.1", "sft.trainer.label_smoothing_factor")],
)  # fmt: skip
def test_options_that_cannot_work_are_one_line(
    project_file: Path, capsys: pytest.CaptureFixture[str], flag: str, said: str
) -> None:
    key, _, value = flag.partition("=")
    assert main(["sample", "--config", str(project_file)]) == 0
    capsys.readouterr()
    assert main(["sft", "--config", str(project_file), f"--sft.trainer.{key}", value]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {said}")


def test_the_last_step_is_logged_wherever_it_falls(trained_run: Path) -> None:
    logged = "SELECT step FROM metrics WHERE stage = 'sft' AND split = 'train' AND name = 'loss'"
    assert query(trained_run / "corpus.duckdb", logged)[1] == [(4,)]  # of four, and logging_steps is 5


def test_a_bare_no_for_a_strategy_means_no(project_file: Path) -> None:
    assert main(["sample", "--config", str(project_file)]) == 0
    flags = ["--sft.trainer.save_strategy", "no", "--sft.dev_fraction", "0"]
    assert main(["sft", "--config", str(project_file), *flags]) == 0


def test_a_killed_sft_does_not_go_on_with_other_rows(tmp_path: Path) -> None:
    settings = {"seed": 1}
    sft.keep_if_same(tmp_path / "trainer", settings | {"rows": "a"})
    (tmp_path / "trainer" / "checkpoint-2").mkdir()
    (tmp_path / "trainer" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "trainer" / "checkpoint-4").mkdir()
    (tmp_path / "trainer" / "checkpoint-4" / "trainer_state.json").touch()  # the disk was full
    sft.keep_if_same(tmp_path / "trainer", settings | {"rows": "a"})
    assert (tmp_path / "trainer" / "checkpoint-2").exists()
    assert not (tmp_path / "trainer" / "checkpoint-4").exists()
    sft.keep_if_same(tmp_path / "trainer", settings | {"rows": "b"})
    assert not (tmp_path / "trainer" / "checkpoint-2").exists()


def test_a_training_that_early_stopping_ended_is_not_gone_on_with(
    student: Student, build: Build, tmp_path: Path
) -> None:
    trainer = build(student, mixed(student), block={"num_train_epochs": 9})
    checkpoint = tmp_path / "trainer" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    state = {"global_step": 4, "best_model_checkpoint": "elsewhere/trainer/checkpoint-2",
             "stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": True}}}}  # fmt: skip
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    go_on(trainer, checkpoint)
    assert trainer.args.max_steps == 4
    told = json.loads((checkpoint / "trainer_state.json").read_text())
    assert told["best_model_checkpoint"] == str(tmp_path / "trainer" / "checkpoint-2")


TELLS = """
import sys
from blackbox_kd.__main__ import main
from huggingface_hub.utils import _telemetry
sys.exit(main(["sft", "--config", sys.argv[1]]) or _telemetry._TELEMETRY_THREAD is not None)
"""


def test_nobody_is_told_of_a_training(project_file: Path) -> None:
    assert main(["sample", "--config", str(project_file)]) == 0
    here = {name: value for name, value in os.environ.items() if name not in ("CI", "HF_HUB_DISABLE_TELEMETRY")}
    online = here | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens on this port
    done = subprocess.run([sys.executable, "-c", TELLS, str(project_file)], env=online, check=False)
    assert done.returncode == 0
