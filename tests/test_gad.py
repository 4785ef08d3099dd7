"""`gad`: what the discriminator learns from, when it is not believed, and that a restart goes on with the same one."""

from __future__ import annotations

import asyncio
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.base import Outcome
from blackbox_kd.algorithms.gad import GadConfig, Group, Judged, accuracy, at_chance, length_correlation, tidy
from blackbox_kd.config import DiscriminatorConfig, StudentConfig
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.student.discriminator import Discriminator, Pair
from blackbox_kd.student.render import Renderer
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Rollout
from tests.conftest import RUN_ID
from tests.rollouts import renderer, rollout, tools

__all__ = ["renderer"]  # a fixture

QUICK = {"warmup_steps": 12, "steps": 2, "learning_rate": 1e-2, "batch_size": 4, "r": 4}
GROUP = ["--onpolicy.algorithm", "{name: gad, num_generations: 3, discriminator: {warmup_steps: 2, steps: 1, r: 4}}"]


@pytest.fixture
def student(tiny_model: Path) -> StudentConfig:
    return StudentConfig(model=str(tiny_model), device="cpu", max_length=128)


def texts(renderer: Renderer, *answers: str) -> list[list[int]]:
    prompt = renderer.prompt([{"role": "user", "content": "Say 1"}])
    return [[*prompt, *renderer.completion(answer)] for answer in answers]


def test_it_learns_to_prefer_the_teachers_text(student: StudentConfig, renderer: Renderer) -> None:
    config = DiscriminatorConfig(**QUICK)
    discriminator = Discriminator(config, student, renderer, seed=1)
    pairs = [Pair(*texts(renderer, f"one {i}", f"two {i}")) for i in range(8)]
    state = torch.get_rng_state()
    first = discriminator.train(pairs, steps=2, seed=1)
    last = discriminator.train(pairs, steps=30, seed=2)
    assert bool((torch.get_rng_state() == state).all())
    assert last < first
    good, bad = discriminator.score(texts(renderer, "one 9", "two 9"))
    assert good > bad


def test_the_loss_is_bradley_terry(student: StudentConfig, renderer: Renderer) -> None:
    config = DiscriminatorConfig(**{**QUICK, "learning_rate": 1e-12})
    discriminator = Discriminator(config, student, renderer, seed=1)
    pairs = [Pair(*texts(renderer, "one", "two")), Pair(*texts(renderer, "yes no", "three"))]
    scores = [discriminator.score([pair.teacher, pair.student]) for pair in pairs]
    expected = sum(math.log1p(math.exp(-(t - s))) for t, s in scores) / 2
    assert discriminator.train(pairs, steps=1, seed=1) == pytest.approx(expected, abs=1e-5)


def test_batches_and_order_do_not_change_a_score(student: StudentConfig, renderer: Renderer) -> None:
    discriminator = Discriminator(DiscriminatorConfig(batch_size=2), student, renderer, seed=1)
    rows = texts(renderer, "one", "two three four five six", "seven eight")
    together = discriminator.score(rows)
    assert [discriminator.score([row])[0] for row in rows] == pytest.approx(together, abs=1e-5)
    assert discriminator.score(rows[::-1])[::-1] == pytest.approx(together, abs=1e-5)


def test_its_state_is_all_of_it(student: StudentConfig, renderer: Renderer) -> None:
    config = DiscriminatorConfig(**QUICK)
    pairs = [Pair(*texts(renderer, f"one {i}", f"two {i}")) for i in range(4)]
    here = Discriminator(config, student, renderer, seed=1)
    here.train(pairs, steps=3, seed=1)
    there = Discriminator(config, student, renderer, seed=1, state=here.state())
    for each in (here, there):
        each.train(pairs, steps=3, seed=2)
    rows = texts(renderer, "one", "two")
    assert here.score(rows) == there.score(rows)


def feedback(
    corpus: Corpus, renderer: Renderer, student: StudentConfig, rollouts: list[Rollout], reply: str, **more: object
) -> Outcome:
    async def ask() -> Outcome:
        async with Teacher(ScriptedTeacherConfig(reply=reply), corpus, RUN_ID) as teacher:
            config = GadConfig(num_generations=2, discriminator=DiscriminatorConfig(**(QUICK | more)))
            return await config.build(tools(teacher, renderer, student)).feedback(rollouts, 1)

    return asyncio.run(ask())


def pairs_of(renderer: Renderer, count: int) -> list[Rollout]:
    return [rollout(renderer, f"Say {i}", draft) for i in range(count) for draft in ("two", f"three {i}")]


def test_rewards_are_relative_within_a_prompt(corpus: Corpus, renderer: Renderer, student: StudentConfig) -> None:
    rollouts = pairs_of(renderer, 16)
    outcome = feedback(corpus, renderer, student, rollouts, "one", warmup_steps=60, heldout_fraction=0.5)
    assert outcome.metrics["discriminator_alarm"] == 0
    assert outcome.metrics["discriminator_accuracy"] > 0.9
    assert {said.kind for said in outcome.feedback} == {"discriminator"}
    rewards = {said.completion_id: said.value for said in outcome.feedback}
    for sample in outcome.samples:
        (advantage,) = {w for w in sample.weights["pg"] if w}
        other = next(r for r in rollouts if r.completion.completion_id == sample.sample_id)
        rival = next(r for r in rollouts if r.prompt == other.prompt and r is not other)
        mine, its = rewards[sample.sample_id], rewards[rival.completion.completion_id]
        assert mine is not None
        assert its is not None
        assert (advantage > 0) == (mine > its)


def test_a_discriminator_at_chance_rewards_nothing(
    corpus: Corpus, renderer: Renderer, student: StudentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [rollout(renderer, f"Say {i}", "one") for i in range(8)]  # nothing to tell apart
    outcome = feedback(corpus, renderer, student, same, "one")
    assert outcome.metrics["discriminator_alarm"] == 1
    assert outcome.metrics["equal_answers"] == 1
    assert {name for sample in outcome.samples for name in sample.weights} == {"ce"}
    assert "may be guessing" in capsys.readouterr().err


def test_a_prompt_without_a_whole_answer_is_a_failure(
    corpus: Corpus, renderer: Renderer, student: StudentConfig
) -> None:
    reply = "{% if '3' in text %} {% else %}one{% endif %}"
    outcome = feedback(corpus, renderer, student, pairs_of(renderer, 5), reply)
    assert (outcome.asked, outcome.failed) == (10, 2)


def judged(renderer: Renderer, teacher: float, rewards: list[float], lengths: list[int], *, same: int = -1) -> Judged:
    one = rollout(renderer, "Say 1", "x")
    answer = Completion(request_key=one.prompt.prompt_id, prompt_id=one.prompt.prompt_id, author="teacher", model="t",
                        text="y", finish_reason="stop")  # fmt: skip
    group = Group(answer, "y", [one] * len(rewards), heldout=True)
    return Judged(group, teacher, rewards, 10, lengths, [i == same for i in range(len(rewards))])


def test_accuracy_counts_ties_half_leaves_equal_texts_out_and_can_compare_like_with_like(renderer: Renderer) -> None:
    groups = [judged(renderer, 1.0, [0.0, 1.0, 2.0, 9.0], [10, 12, 13, 10], same=3)]
    assert accuracy(groups) == (1 + 0.5 + 0) / 3
    assert accuracy(groups, alike=True) == (1 + 0.5) / 2  # 13 is more than a fifth longer than 10
    assert accuracy([judged(renderer, 1.0, [1.0], [10], same=0)]) is None


def test_chance_allows_for_how_few_prompts_there_were() -> None:
    assert at_chance(None, 0)
    assert at_chance(0.54, 10_000)
    assert not at_chance(0.56, 10_000)
    assert at_chance(0.7, 4)  # 0.5 + 0.5 / sqrt(4) = 0.75
    assert not at_chance(0.8, 4)


def test_length_correlation_is_that_within_groups(renderer: Renderer) -> None:
    rising = [judged(renderer, 0, [0.0, 1.0], [1, 2]), judged(renderer, 0, [-9.0, -8.0], [101, 102])]
    assert length_correlation(rising) == pytest.approx(1.0)
    assert length_correlation([judged(renderer, 0, [0.0, 1.0], [3, 3])]) == 0.0


def test_whitespace_is_no_sign_of_the_teacher() -> None:
    assert tidy(" a  \nb\t\n\n") == "a\nb"


@pytest.fixture
def trained(project_file: Path) -> Path:
    for stage in ("sample", "sft"):
        assert main([stage, "--config", str(project_file)]) == 0
    return project_file


def test_the_stage_asks_nobody_and_a_restart_ends_with_the_same_adapter(trained: Path) -> None:
    again = trained.parent / "again"
    shutil.copytree(trained.parent / "run", again)
    command = ["onpolicy", "--config", str(trained), *GROUP]
    assert main(command) == 0
    for rounds in ("1", "2"):
        assert main([*command, "--run_dir", str(again), "--onpolicy.rounds", rounds]) == 0
    one, other = (
        load_file(run / "checkpoints/round-2/adapter_model.safetensors") for run in (trained.parent / "run", again)
    )
    assert all(bool((one[name] == other[name]).all()) for name in one)
    corpus = trained.parent / "run" / "corpus.duckdb"
    asked = query(corpus, "select purpose, count(*) from requests where purpose <> 'rollout' group by all")[1]
    assert asked == [("sample", 6)]
    drawn = query(corpus, "select count(*), count(distinct prompt_id) from completions where author = 'student'")[1]
    assert drawn == [(2 * 3 * 3, 6)]
    assert query(corpus, "select count(*) from metrics where name = 'discriminator_alarm'")[1] == [(2,)]


def test_three_rounds_of_certainty_are_an_alarm(corpus: Corpus, renderer: Renderer, student: StudentConfig) -> None:
    teacher = Teacher(ScriptedTeacherConfig(), corpus, RUN_ID)
    algorithm = GadConfig().build(tools(teacher, renderer, student))
    sure = [judged(renderer, 1.0, [0.0], [10])] * 30
    assert [algorithm._alarm(sure, r) for r in (1, 2, 3, 4)] == [None, None, "sure", "sure"]
    assert algorithm._alarm([judged(renderer, 1.0, [0.0], [10])] * 9 + [judged(renderer, 0.0, [1.0], [10])], 5) is None
