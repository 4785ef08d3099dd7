"""The update: what is learnt, in which order, and that micro-batches and restarts do not change it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blackbox_kd.algorithms.base import ce_sample
from blackbox_kd.config import StudentConfig, UpdateConfig
from blackbox_kd.errors import AlignmentError, TrainingError
from blackbox_kd.student.student import Student
from blackbox_kd.student.update import Updater, batches
from blackbox_kd.types import TrainSample


@pytest.fixture
def student(tiny_model: Path) -> Student:
    return Student(StudentConfig(model=str(tiny_model), device="cpu"), seed=1)


def samples(student: Student, count: int = 8) -> list[TrainSample]:
    return [
        ce_sample(f"{i}", student.renderer.render([{"role": "user", "content": f"Say {i}"}], "one " * (1 + i % 4)))
        for i in range(count)
    ]


def adapter(student: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in student.model.parameters() if p.requires_grad])


def test_it_learns_an_overfit_batch(student: Student) -> None:
    updater = Updater(student, UpdateConfig(learning_rate=5e-2, num_epochs=40))
    metrics = updater.run(samples(student, 1), seed=0)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[0]["ce_nll"] == pytest.approx(metrics[0]["loss"])


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_do_not_change_the_step(tiny_model: Path, micro_batch_size: int) -> None:
    results = []
    for size in (8, micro_batch_size):
        student = Student(StudentConfig(model=str(tiny_model), device="cpu"), seed=1)
        config = UpdateConfig(learning_rate=1e-2, micro_batch_size=size, max_steps=2)
        metrics = Updater(student, config).run(samples(student), seed=0)
        results.append((metrics[-1]["loss"], adapter(student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


def test_the_optimiser_lives_on_over_a_restart(tiny_model: Path, tmp_path: Path) -> None:
    config = UpdateConfig(learning_rate=1e-2)
    student = Student(StudentConfig(model=str(tiny_model), device="cpu"), seed=1)
    updater = Updater(student, config)
    updater.run(samples(student), seed=1)
    student.save(tmp_path / "a")
    updater.save(tmp_path / "optimizer.pt")
    updater.run(samples(student), seed=2)

    again = Student(student.config, adapter=tmp_path / "a")
    resumed = Updater(again, config, tmp_path / "optimizer.pt")
    resumed.run(samples(again), seed=2)
    torch.testing.assert_close(adapter(again), adapter(student), rtol=0, atol=0)

    afresh = Student(student.config, adapter=tmp_path / "a")
    Updater(afresh, config).run(samples(afresh), seed=2)
    assert not torch.equal(adapter(afresh), adapter(student))


def test_every_row_is_used_once_an_epoch_in_a_repeatable_order(student: Student) -> None:
    rows = samples(student, 10)
    first = batches(rows, 4, 3, seed=5)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(s.sample_id for batch in first for s in batch) == sorted(s.sample_id for s in rows)
    shuffled = batches(list(reversed(rows)), 4, 3, seed=5)
    assert [[s.sample_id for s in b] for b in first] == [[s.sample_id for s in b] for b in shuffled]
    assert len(batches(rows, 4, 7, seed=5)) == 7


def test_the_base_model_stays_as_it_is(student: Student) -> None:
    before = {n: p.detach().clone() for n, p in student.model.named_parameters() if not p.requires_grad}
    Updater(student, UpdateConfig(learning_rate=1e-2)).run(samples(student), seed=0)
    after = dict(student.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_called_after_each_step_sees_the_student_of_that_step(student: Student) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    updater = Updater(student, UpdateConfig(learning_rate=1e-2, batch_size=4, max_steps=3))
    updater.run(samples(student), 0, lambda step: seen.append((step, adapter(student))))
    assert [step for step, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], adapter(student))
    assert not torch.equal(seen[0][1], seen[1][1])


def test_nothing_to_learn_is_an_error(student: Student) -> None:
    empty = TrainSample(sample_id="x", input_ids=[1, 2], weights={"ce": [0.0, 0.0]})
    for rows in ([], [empty]):
        with pytest.raises(TrainingError, match="would change nothing"):
            Updater(student, UpdateConfig()).run(rows, seed=0)


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"ce": [0.0, 1.0, 1.0]}, "3 ce weights for 2 tokens"), ({"nope": [0.0, 1.0]}, "no loss component 'nope'"),
     ({"ce": [1.0, 1.0]}, "nothing predicts it")],
)  # fmt: skip
def test_streams_that_do_not_fit_are_an_error(student: Student, weights: dict[str, list[float]], said: str) -> None:
    with pytest.raises(AlignmentError, match=said):
        Updater(student, UpdateConfig()).run([TrainSample(sample_id="x", input_ids=[1, 2], weights=weights)], seed=0)


def test_a_loss_that_is_not_a_number_stops(student: Student) -> None:
    with torch.no_grad():
        next(p for n, p in student.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(TrainingError, match="lower onpolicy"):
        Updater(student, UpdateConfig()).run(samples(student), seed=0)
