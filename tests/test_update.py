"""The update: what is learnt, in which order, and that micro-batches and restarts do not change it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from blackbox_kd.algorithms.base import ce_sample
from blackbox_kd.errors import AlignmentError, ConfigError, TrainingError
from blackbox_kd.sections import StudentConfig, UpdateConfig
from blackbox_kd.student.components import COMPONENTS
from blackbox_kd.student.samples import batches
from blackbox_kd.student.student import Student
from blackbox_kd.student.update import Updater
from blackbox_kd.types import TopK, TrainSample


@pytest.fixture
def student(tiny_model: Path) -> Student:
    return Student(StudentConfig(model=str(tiny_model), device="cpu"), seed=1)


def samples(student: Student, count: int = 8) -> list[TrainSample]:
    return [
        ce_sample(f"{i}", student.renderer.render([{"role": "user", "content": f"Say {i}"}], "one " * (1 + i % 4)))
        for i in range(count)
    ]


def streams(student: Student, name: str, count: int = 8) -> list[TrainSample]:
    """Samples that train one component; their other numbers are made up, and repeat."""
    rng = np.random.default_rng(3)
    found = []
    for i, sample in enumerate(samples(student, count)):
        kept = sample.weights["ce"]
        size = int(sum(kept))
        signs = {"pg": rng.normal(size=len(kept)), "pair": np.full(len(kept), -1.0 if i % 2 else 1.0)}
        ids = np.stack([rng.choice(320, 3, replace=False) for _ in range(size)])
        teacher = TopK(ids, np.log(rng.dirichlet(np.ones(4), size)[:, :3]))
        found.append(
            TrainSample(
                sample_id=sample.sample_id,
                input_ids=sample.input_ids,
                weights={name: (np.array(kept) * signs.get(name, 1.0)).tolist()},
                soft=teacher if name == "topk_kl" else None,
                logprobs={key: (-3 * np.array(kept)).tolist() for key in ("old", "ref")},
                pair_id=f"p{i // 2}" if name == "pair" else None,
            )
        )
    return found


def adapter(student: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in student.model.parameters() if p.requires_grad])


def test_it_learns_an_overfit_batch(student: Student) -> None:
    updater = Updater(student, UpdateConfig(learning_rate=5e-2, num_epochs=40))
    metrics = updater.run(samples(student, 1), seed=0)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[0]["ce_nll"] == pytest.approx(metrics[0]["loss"])


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("name", COMPONENTS)
def test_micro_batches_do_not_change_the_step(tiny_model: Path, name: str, micro_batch_size: int) -> None:
    results = []
    for size in (8, micro_batch_size):
        student = Student(StudentConfig(model=str(tiny_model), device="cpu"), seed=1)
        config = UpdateConfig(learning_rate=1e-2, micro_batch_size=size, max_steps=2)
        metrics = Updater(student, config).run(streams(student, name), seed=0)
        results.append((metrics[-1], adapter(student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_falls_on_what_it_learns(student: Student, name: str) -> None:
    metrics = Updater(student, UpdateConfig(learning_rate=1e-2, max_steps=12)).run(streams(student, name), seed=0)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1e-3


def test_a_learning_rate_that_nobody_has_set_is_refused(student: Student) -> None:
    with pytest.raises(ConfigError, match="learning_rate is null"):
        Updater(student, UpdateConfig())


def test_components_of_one_step_add_up_each_under_its_own_count(student: Student) -> None:
    mixed = [*streams(student, "ce", 2), *streams(student, "pair", 4)]
    mixed = [msgspec.structs.replace(s, sample_id=f"{i}") for i, s in enumerate(mixed)]
    (both,) = Updater(student, UpdateConfig(learning_rate=1e-9, max_steps=1, micro_batch_size=1)).run(mixed, seed=0)
    (ce,) = Updater(student, UpdateConfig(learning_rate=1e-9, max_steps=1)).run(mixed[:2], seed=0)
    (pair,) = Updater(student, UpdateConfig(learning_rate=1e-9, max_steps=1)).run(mixed[2:], seed=0)
    assert both["loss"] == pytest.approx(ce["loss"] + pair["loss"], rel=1e-3)
    assert (both["ce_count"], both["pair_count"]) == (ce["ce_count"], 2)


def test_a_metric_of_a_component_is_a_mean_over_its_own_tokens(student: Student) -> None:
    hard, soft = streams(student, "ce", 2), streams(student, "topk_kl", 2)
    soft = [msgspec.structs.replace(s, sample_id=f"soft {i}") for i, s in enumerate(soft)]
    config = UpdateConfig(learning_rate=1e-9, max_steps=1, batch_size=8)
    (alone,), (mixed,) = (Updater(student, config).run(samples, seed=0) for samples in (hard, [*hard, *soft]))
    assert mixed["ce_nll"] == pytest.approx(alone["ce_nll"], rel=1e-5)
    assert mixed["ce_count"] == alone["ce_count"]
    assert mixed["loss"] < mixed["ce_nll"] + mixed["topk_kl_kl"] - 1e-3  # each is divided by all that are taught


def test_a_token_weighs_the_same_with_a_hard_label_or_a_soft_one() -> None:
    """Two tokens by the text, three by soft labels, one of the other sample by both: six are taught."""
    one = TrainSample(
        sample_id="1", input_ids=[0] * 6, weights={"ce": [0, 1, 1, 0, 0, 0], "topk_kl": [0, 0, 0, 1, 1, 1]}
    )
    two = TrainSample(sample_id="2", input_ids=[0] * 2, weights={"ce": [0, 0.5], "topk_kl": [0, 0.5]})
    for name in ("ce", "topk_kl"):
        assert COMPONENTS[name].normalizer([one, two], name) == 6


def test_options_reach_their_component(student: Student) -> None:
    def loss(**options: float) -> float:
        updater = Updater(student, UpdateConfig(learning_rate=1e-9, max_steps=1), losses={"topk_kl": options})
        return updater.run(streams(student, "topk_kl"), seed=0)[0]["loss"]

    assert loss(beta=1.0) != pytest.approx(loss(beta=0.0), rel=1e-2)


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
    assert sorted(s.sample_id for batch in first for (s,) in batch) == sorted(s.sample_id for s in rows)
    renamed = [msgspec.structs.replace(row, sample_id=f"x{i % 3}{i}") for i, row in enumerate(rows)]
    again = batches(renamed, 4, 3, seed=5)  # ids of rollouts change with every bit of a policy, and the order must not
    assert [[s.input_ids for (s,) in b] for b in first] == [[s.input_ids for (s,) in b] for b in again]
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
            Updater(student, UpdateConfig(learning_rate=1e-3)).run(rows, seed=0)


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"ce": [0.0, 1.0, 1.0]}, "3 ce weights for 2 tokens"), ({"nope": [0.0, 1.0]}, "no loss component 'nope'"),
     ({"ce": [1.0, 1.0]}, "nothing predicts it"), ({"pg": [0.0, 1.0]}, "pg weights without the logprobs 'old'"),
     ({"pair": [0.0, 1.0]}, "pair weights without the logprobs 'ref'"),
     ({"topk_kl": [0.0, 1.0]}, "without as many soft targets .1 tokens, 0 targets")],
)  # fmt: skip
def test_streams_that_do_not_fit_are_an_error(student: Student, weights: dict[str, list[float]], said: str) -> None:
    with pytest.raises(AlignmentError, match=said):
        Updater(student, UpdateConfig(learning_rate=1e-3)).run(
            [TrainSample(sample_id="x", input_ids=[1, 2], weights=weights)], seed=0
        )


def test_a_pair_with_one_side_is_an_error(student: Student) -> None:
    with pytest.raises(AlignmentError, match="1 pairs without a chosen or a rejected answer, such as p1"):
        Updater(student, UpdateConfig(learning_rate=1e-3)).run(streams(student, "pair", 3), seed=0)


def test_a_loss_that_is_not_a_number_stops(student: Student) -> None:
    with torch.no_grad():
        next(p for n, p in student.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(TrainingError, match="lower onpolicy"):
        Updater(student, UpdateConfig(learning_rate=1e-3)).run(samples(student), seed=0)
