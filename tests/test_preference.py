"""`preference`: who is chosen and rejected, what it costs, and that the reference is where the stage started."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.base import Outcome
from blackbox_kd.algorithms.preference import PreferenceConfig
from blackbox_kd.config import load_config
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.project import Project
from blackbox_kd.sections import SampleConfig
from blackbox_kd.settings import Config
from blackbox_kd.student.render import IGNORE, Rendered, Renderer
from blackbox_kd.student.student import Student
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.trainee import referenced
from blackbox_kd.types import Rollout, TrainSample
from tests.conftest import RUN_ID
from tests.rollouts import renderer, rollout, tools

__all__ = ["renderer"]  # a fixture


def feedback(
    corpus: Corpus,
    renderer: Renderer,
    rollouts: list[Rollout],
    reply: str,
    dropped: frozenset[str] = frozenset(),
    **config: Any,
) -> Outcome:
    async def ask() -> Outcome:
        async with Teacher(ScriptedTeacherConfig(reply=reply), corpus, RUN_ID, sample=SampleConfig()) as teacher:
            given = tools(teacher, renderer)._replace(dropped=dropped)
            return await PreferenceConfig(**config).build(given).feedback(rollouts, 1)

    return asyncio.run(ask())


def test_the_teachers_answer_is_chosen_over_the_sample(corpus: Corpus, renderer: Renderer) -> None:
    one = rollout(renderer, "Say 1", "wun")
    outcome = feedback(corpus, renderer, [one], "one", anchor=0.5)
    chosen, rejected = outcome.samples
    assert chosen.pair_id == rejected.pair_id == one.completion.completion_id
    learnt = [i for i, w in zip(chosen.input_ids, chosen.weights["pair"], strict=True) if w == 1]
    assert renderer.decode(learnt) == "one"
    assert set(chosen.weights["ce"]) == {0.0, 0.5}
    refused = [i for i, w in zip(rejected.input_ids, rejected.weights["pair"], strict=True) if w == -1]
    assert refused == one.completion_ids
    assert "ce" not in rejected.weights
    (said,) = outcome.feedback
    assert said.kind == "preference"
    assert said.completion_id == one.completion.completion_id


def test_an_equal_answer_makes_no_pair_and_is_no_failure(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = [rollout(renderer, "Say 1", " one\n"), rollout(renderer, "Say 2", "two")]
    outcome = feedback(corpus, renderer, rollouts, "one")
    assert (len(outcome.samples), outcome.failed, outcome.metrics) == (
        2,
        0,
        {"equal_answers": 0.5},
    )


def test_an_answer_that_curation_dropped_is_not_chosen(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = [rollout(renderer, "Say 1", "wun"), rollout(renderer, "Say 2", "two")]
    first, second = feedback(corpus, renderer, rollouts, "one").feedback
    dropped = frozenset({first.target_completion_id or ""})
    outcome = feedback(corpus, renderer, rollouts, "one", dropped)
    assert [said.target_completion_id for said in outcome.feedback] == [second.target_completion_id]
    assert (len(outcome.samples), outcome.failed, outcome.dropped) == (2, 0, 1)


def test_an_empty_answer_is_a_failure(corpus: Corpus, renderer: Renderer) -> None:
    outcome = feedback(corpus, renderer, [rollout(renderer, "Say 1", "wun")], " ")
    assert (outcome.samples, outcome.failed) == ([], 1)


@pytest.mark.parametrize("rejected", ["snapshot", "fresh"])
def test_the_stage_runs_on_answers_that_are_paid_for(trained: Path, rejected: str) -> None:
    flags = ["--onpolicy.algorithm", f"{{name: preference, rejected: {rejected}}}"]
    assert main(["onpolicy", "--config", str(trained), *flags]) == 0
    corpus = trained.parent / "run" / "corpus.duckdb"
    asked = query(corpus, "select purpose, count(*) from requests where purpose <> 'rollout' group by all")[1]
    assert asked == [("sample", 6)]
    policies = query(corpus, "select distinct policy like 'base:%' from completions where author = 'student'")[1]
    assert policies == [(rejected == "snapshot",)]
    sides = query(corpus, "select distinct chosen from pairs where kind = 'preference'")[1]
    assert all(text.startswith("one") for (text,) in sides)
    (accuracy,) = query(corpus, "select count(*) from metrics where name = 'pair_accuracy'")[1][0]
    assert accuracy > 0


def test_the_reference_is_the_checkpoint_that_the_stage_started_from(trained: Path) -> None:
    with Project(load_config(Config, str(trained))) as project:
        sft = project.run_dir.checkpoint("sft")
        student = Student(project.config.student, adapter=sft)
        ids, size = student.renderer.prompt([{"role": "user", "content": "Say 1"}]), 3
        sample = TrainSample(
            sample_id="a", input_ids=[*ids, 5, 6, 7], weights={"pair": [*[0.0] * len(ids), 1.0, 0.0, 1.0]}, pair_id="p"
        )
        row = Rendered(sample.input_ids, [*[IGNORE] * len(ids), 5, IGNORE, 7])
        before = student.logprobs([row], batch_size=1)[0]
        with torch.no_grad():
            for name, parameter in student.model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        after = student.logprobs([row], batch_size=1)[0]
        trained = [p.requires_grad for p in student.model.parameters()]
        policy = student.policy
        (found,) = referenced(student, [sample], sft, 1)
        assert [v for v in found.logprobs["ref"] if v] == pytest.approx(before, abs=1e-5)
        assert after != pytest.approx(before, abs=1e-3)
        assert student.logprobs([row], batch_size=1)[0] == after
        assert [p.requires_grad for p in student.model.parameters()] == trained
        assert student.policy == policy
        assert len(found.logprobs["ref"]) == len(ids) + size
