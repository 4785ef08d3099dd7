"""`gad`: what the discriminator learns from, when it is not believed, and that a restart goes on with the same one."""

from __future__ import annotations

import asyncio
import math
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM
from trl import RewardConfig, RewardTrainer

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.base import Outcome
from blackbox_kd.algorithms.gad import GadConfig, Group, Judged, accuracy, at_chance, tidy
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.sections import DiscriminatorConfig, StudentConfig
from blackbox_kd.student.discriminator import Discriminator, Pair
from blackbox_kd.student.render import Renderer
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Rollout
from tests.conftest import RUN_ID
from tests.rollouts import renderer, rollout, tools

__all__ = ["renderer"]  # a fixture

QUICK = {"warmup_steps": 12, "steps": 2, "learning_rate": 1e-2, "batch_size": 4, "r": 4}
STRONG = "{warmup_steps: 60, steps: 20, learning_rate: 3e-3, heldout_fraction: 0.4}"
FLAGS = ["--sample.max_prompts", "12", "--onpolicy.prompts_per_round", "12",
         "--onpolicy.algorithm", f"{{name: gad, num_generations: 3, discriminator: {STRONG}}}"]  # fmt: skip


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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_step_is_that_of_trls_reward_trainer(student: StudentConfig, renderer: Renderer, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    pairs = [Pair(*texts(renderer, f"one {i} " * i, f"two {i}")) for i in range(4)]
    ours, theirs = (Discriminator(DiscriminatorConfig(**QUICK), student, renderer, seed=1) for _ in range(2))
    losses = [ours.train(pairs, steps=1, seed=seed) for seed in (1, 2)]
    trainer = RewardTrainer(
        model=theirs.model,
        args=RewardConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=QUICK["learning_rate"],
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", use_cpu=True, bf16=False,
            report_to="none", activation_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"chosen_ids": [pair.teacher for pair in pairs], "rejected_ids": [pair.student for pair in pairs]}
        ),
        processing_class=renderer.tokenizer,
    )  # fmt: skip
    trainer.train()
    assert losses == pytest.approx([entry["loss"] for entry in trainer.state.log_history[:2]], abs=1e-4)
    theirs.model.eval()
    rows = texts(renderer, "one", "two 3", "yes")
    assert ours.score(rows) == pytest.approx(theirs.score(rows), abs=1e-4)


def test_a_named_encoder_reads_the_same_text_in_its_own_tokens(
    student: StudentConfig, renderer: Renderer, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "encoder", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = len(renderer.tokenizer)
    BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "encoder"
    )
    config = DiscriminatorConfig(**QUICK, model=str(tmp_path / "encoder"))
    discriminator = Discriminator(config, student.model_copy(update={"max_length": 64}), renderer, seed=1)
    pairs = [Pair(*texts(renderer, f"one {i}", f"two {i}")) for i in range(8)]
    discriminator.train(pairs, steps=30, seed=1)
    good, bad, long = discriminator.score(texts(renderer, "one 9", "two 9", "seven " * 100))
    assert good > bad
    assert math.isfinite(long)
    again = Discriminator(config, student, renderer, seed=1, state=discriminator.state())
    assert again.score([pairs[0].teacher]) == discriminator.score([pairs[0].teacher])


def test_in_bfloat16_the_head_still_takes_small_steps(student: StudentConfig, renderer: Renderer) -> None:
    half = student.model_copy(update={"dtype": "bfloat16"})
    discriminator = Discriminator(DiscriminatorConfig(**{**QUICK, "learning_rate": 1e-6}), half, renderer, seed=1)
    before = {name: p.detach().clone() for name, p in discriminator.model.named_parameters() if p.requires_grad}
    discriminator.train([Pair(*texts(renderer, "one", "two"))], steps=1, seed=1)
    after = {name: p for name, p in discriminator.model.named_parameters() if p.requires_grad}
    moved = {name for name in before if bool((before[name] != after[name]).any())}
    assert any("score" in name for name in moved)
    assert any("lora_B" in name for name in moved)


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
    corpus: Corpus,
    renderer: Renderer,
    student: StudentConfig,
    rollouts: list[Rollout],
    reply: str,
    dropped: frozenset[str] = frozenset(),
    **more: object,
) -> Outcome:
    async def ask() -> Outcome:
        async with Teacher(ScriptedTeacherConfig(reply=reply), corpus, RUN_ID) as teacher:
            config = GadConfig(num_generations=2, discriminator=DiscriminatorConfig(**(QUICK | more)))
            given = tools(teacher, renderer, student)._replace(dropped=dropped)
            return await config.build(given).feedback(rollouts, 1)

    return asyncio.run(ask())


def test_an_answer_that_curation_dropped_is_no_text_of_the_teacher(
    corpus: Corpus, renderer: Renderer, student: StudentConfig
) -> None:
    rollouts = pairs_of(renderer, 8)
    feedback(corpus, renderer, student, rollouts, "one")
    (key,) = corpus.rows("SELECT completion_id::VARCHAR FROM completions WHERE author = 'teacher' ORDER BY ALL LIMIT 1")
    outcome = feedback(corpus, renderer, student, rollouts, "one", frozenset(key))
    assert len(outcome.feedback) == len(rollouts) - 2
    assert outcome.failed == 0


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


def test_whitespace_is_no_sign_of_the_teacher() -> None:
    assert tidy(" a  \nb\t\n\n") == "a\nb"


@pytest.fixture
def trained(project_file: Path) -> Path:
    for stage in ("sample", "sft"):
        assert main([stage, "--config", str(project_file), *FLAGS]) == 0
    return project_file


def same_checkpoint(one: Path, other: Path) -> bool:
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert (one / "discriminator.json").read_text() == (other / "discriminator.json").read_text()
    same_state = (one / "discriminator.pt").read_bytes() == (other / "discriminator.pt").read_bytes()
    return same_state and all(bool((mine[name] == theirs[name]).all()) for name in mine)


@pytest.mark.parametrize("staleness", ["0", "1"])
def test_a_restart_ends_with_the_same_discriminator_and_the_same_student(trained: Path, staleness: str) -> None:
    run, again = trained.parent / "run", trained.parent / "again"
    shutil.copytree(run, again)
    command = ["onpolicy", "--config", str(trained), *FLAGS, "--onpolicy.max_staleness", staleness]
    assert main(command) == 0
    assert main([*command, "--run_dir", str(again), "--onpolicy.rounds", "1"]) == 0
    assert main([*command, "--run_dir", str(again)]) == 0
    assert same_checkpoint(run / "checkpoints/round-2", again / "checkpoints/round-2")
    shutil.rmtree(again / "checkpoints/round-2")  # killed between feedback and commit
    assert main([*command, "--run_dir", str(again)]) == 0
    assert same_checkpoint(run / "checkpoints/round-2", again / "checkpoints/round-2")
    corpus = run / "corpus.duckdb"
    rewarded = query(corpus, "select distinct round from metrics where name = 'pg_ratio'")[1]
    assert (2,) in rewarded  # and not only the warm-up of a discriminator that is not believed yet
    asked = query(corpus, "select purpose, count(*) from requests where purpose <> 'rollout' group by all")[1]
    assert asked == [("sample", 12)]
    drawn = query(corpus, "select count(*), count(distinct prompt_id) from completions where author = 'student'")[1]
    assert drawn == [(2 * 12 * 3, 12)]


def test_three_rounds_of_certainty_are_an_alarm(corpus: Corpus, renderer: Renderer, student: StudentConfig) -> None:
    teacher = Teacher(ScriptedTeacherConfig(), corpus, RUN_ID)
    algorithm = GadConfig().build(tools(teacher, renderer, student))
    sure = [judged(renderer, 1.0, [0.0], [10])] * 30
    assert [algorithm._alarm(sure, r) for r in (1, 2, 3, 4)] == [None, None, "sure", "sure"]
    assert algorithm._alarm([judged(renderer, 1.0, [0.0], [10])] * 9 + [judged(renderer, 0.0, [1.0], [10])], 5) is None
