"""`relabel`: what is asked about a draft, and which tokens are learnt from the reply."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.algorithms import algorithms
from blackbox_kd.algorithms.auto import AutoConfig
from blackbox_kd.algorithms.base import Algorithm, Outcome
from blackbox_kd.algorithms.relabel import RelabelConfig, least_sure
from blackbox_kd.corpus import Corpus
from blackbox_kd.sections import SampleConfig, SoftLossConfig, StudentConfig
from blackbox_kd.student.render import IGNORE, Renderer
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Rollout
from tests.conftest import RUN_ID
from tests.judges import judge
from tests.rollouts import renderer, rollout, tools

__all__ = ["renderer"]  # a fixture


def feedback(
    corpus: Corpus, renderer: Renderer, rollouts: list[Rollout], reply: str, soft: bool = True, **config: Any
) -> Outcome:
    async def ask() -> Outcome:
        async with Teacher(ScriptedTeacherConfig(reply=reply), corpus, RUN_ID) as teacher:
            given = tools(teacher, renderer, soft=SoftLossConfig() if soft else None)
            algorithm: Algorithm = RelabelConfig(**config).build(given)
            return await algorithm.feedback(rollouts, 1)

    return asyncio.run(ask())


def test_a_rewrite_sees_question_and_draft_and_is_learnt_behind_the_students_prompt(
    corpus: Corpus, renderer: Renderer, tmp_path: Path
) -> None:
    template = tmp_path / "t.j2"
    template.write_text("Q={{ prompt }} D={{ draft }}")
    one = rollout(renderer, "Say 1", "wun")
    outcome = feedback(corpus, renderer, [one], "{{ text }} better", template=str(template))
    (sample,) = outcome.samples
    assert sample.input_ids[: len(one.prompt_ids)] == one.prompt_ids
    learnt = [i for i, w in zip(sample.input_ids, sample.weights["ce"], strict=True) if w]
    assert learnt[-1] == renderer.end_id
    assert renderer.decode(learnt) == "Q=Say 1 D=wun better"
    assert sample.weights["ce"][: len(one.prompt_ids)] == [0.0] * len(one.prompt_ids)
    (said,) = outcome.feedback
    assert (said.kind, said.completion_id) == ("rewrite", one.completion.completion_id)
    assert said.target_completion_id == sample.sample_id


def test_afresh_is_the_teachers_own_answer_and_never_sees_the_draft(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = [rollout(renderer, "Say 1", "SECRET")]
    outcome = feedback(corpus, renderer, rollouts, "{{ messages | string }}", mode="afresh", worst_fraction=1.0)
    (sample,) = outcome.samples
    text = renderer.decode([i for i, *w in zip(sample.input_ids, *sample.weights.values(), strict=True) if any(w)])
    assert "SECRET" not in text
    assert "Say 1" in text


@pytest.mark.parametrize(("config", "soft"), [({}, True), ({"soft": False}, False), ({"temperature": 0}, False)])
def test_afresh_learns_the_alternatives_of_its_own_distribution(
    corpus: Corpus, renderer: Renderer, config: dict[str, Any], soft: bool
) -> None:
    (sample,) = feedback(
        corpus, renderer, [rollout(renderer, "Say 1", "x")], "one two", mode="afresh", **config
    ).samples
    learnt = {name: [i for i, w in zip(sample.input_ids, ws, strict=True) if w] for name, ws in sample.weights.items()}
    assert sorted(i for ids in learnt.values() for i in ids) == sorted(renderer.completion("one two"))
    assert ("topk_kl" in learnt) == (sample.soft is not None) == soft
    if soft:
        assert len(sample.soft.ids) == len(learnt["topk_kl"])
        asked = corpus.rows("SELECT body->'top_logprobs' FROM requests WHERE purpose = 'relabel'")
        assert asked == [("20",)]


def test_a_rewrite_is_learnt_as_it_is_written(corpus: Corpus, renderer: Renderer) -> None:
    (sample,) = feedback(corpus, renderer, [rollout(renderer, "Say 1", "x")], "one two").samples
    assert list(sample.weights) == ["ce"]


@pytest.mark.parametrize(
    ("config", "soft"),
    [({}, SoftLossConfig()), ({"mode": "afresh"}, None), ({"mode": "afresh", "temperature": 0.5}, SoftLossConfig())],
)
def test_alternatives_that_nobody_asked_for_are_not_learnt(
    corpus: Corpus, renderer: Renderer, config: dict[str, Any], soft: SoftLossConfig | None
) -> None:
    shows = ScriptedTeacherConfig(reply="one two", extra_body={"logprobs": True, "top_logprobs": 5})

    async def ask() -> Outcome:
        async with Teacher(shows, corpus, RUN_ID) as teacher:
            algorithm = RelabelConfig(**config).build(tools(teacher, renderer, soft=soft))
            return await algorithm.feedback([rollout(renderer, "Say 1", "x")], 1)

    (sample,) = asyncio.run(ask()).samples
    assert list(sample.weights) == ["ce"]


def test_afresh_asks_where_the_student_is_least_sure(renderer: Renderer) -> None:
    rollouts = [rollout(renderer, f"Say {i}", "x", logprob=-i) for i in (1.0, 5.0, 2.0, 9.0)]
    assert [r.logprobs[0] for r in least_sure(rollouts, 0.5)] == [-9.0, -5.0]
    assert len(least_sure(rollouts[:1], 0.1)) == 1


def test_a_later_round_draws_anew(corpus: Corpus, renderer: Renderer) -> None:
    config = RelabelConfig(mode="afresh")
    teacher = Teacher(ScriptedTeacherConfig(), corpus, RUN_ID, sample=SampleConfig(n=2))
    algorithm = config.build(tools(teacher, renderer))
    one = rollout(renderer, "Say 1", "x")
    keys = {algorithm._request(one, round_).request_key for round_ in (1, 2)}
    sampled = {teacher.request(one.prompt, "sample", algorithm._sampling, sample_idx=i).request_key for i in (0, 1)}
    assert len(keys | sampled) == 4


def test_a_reply_that_cannot_be_used_drops_its_rollout(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = [rollout(renderer, text, "x") for text in ("empty", "full")]
    outcome = feedback(
        corpus,
        renderer,
        rollouts,
        "{% if 'full' in text %}fine{% else %}  {% endif %}",
        template="prompts/rewrite.md.j2",
    )
    assert (outcome.asked, outcome.failed, len(outcome.samples), len(outcome.feedback)) == (2, 1, 1, 1)


def test_the_same_draft_is_not_asked_about_twice(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = [rollout(renderer, "Say 1", "x")]
    first = feedback(corpus, renderer, rollouts, "yes", template="prompts/rewrite.md.j2")
    again = feedback(corpus, renderer, rollouts, "never asked", template="prompts/rewrite.md.j2")
    assert again.samples == first.samples
    assert corpus.spend(RUN_ID)["calls"] == 1


LEARNING = [config for config in algorithms() if config is not AutoConfig]  # which is one of the others


@pytest.mark.parametrize("config", LEARNING, ids=lambda c: str(c.model_fields["name"].default))
def test_every_algorithm_says_what_it_needs_and_costs_and_learns_something(
    config: type[Any], corpus: Corpus, renderer: Renderer, tiny_model: Path
) -> None:
    import importlib

    doc = importlib.import_module(config.__module__).__doc__
    for word in ("What it is:", "Needs:", "Costs:", "Loss:", "does not do"):
        assert word in doc
    group = config().rollouts_per_prompt
    rollouts = [rollout(renderer, f"Say {i}", "x" * draw) for i in range(4) for draw in range(1, group + 1)]

    async def ask() -> Outcome:
        async with Teacher(ScriptedTeacherConfig(), corpus, RUN_ID) as teacher, judge(corpus) as grader:
            student = StudentConfig(model=str(tiny_model), device="cpu", max_length=128)
            return await config().build(tools(teacher, renderer, student, judge=grader)).feedback(rollouts, 1)

    outcome = asyncio.run(ask())
    assert outcome.samples
    for sample in outcome.samples:
        assert any(any(stream) for stream in sample.weights.values())
        assert all(len(stream) == len(sample.input_ids) for stream in sample.weights.values())
    assert IGNORE not in [i for s in outcome.samples for i in s.input_ids]


def test_the_cheaper_rewrite_asks_about_the_worst_drafts_only(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = [rollout(renderer, f"Say {i}", "x", logprob=-float(i)) for i in range(1, 5)]
    template = {"template": "prompts/rewrite.md.j2"}
    outcome = feedback(corpus, renderer, rollouts, "fine", worst_fraction=0.5, **template)
    assert (outcome.asked, outcome.failed) == (2, 0)
    assert {said.completion_id for said in outcome.feedback} == {r.completion.completion_id for r in rollouts[2:]}
