"""`reward`: what a judge is shown, what is learnt from its grades, and when nothing is."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from blackbox_kd import health
from blackbox_kd.algorithms.base import Outcome
from blackbox_kd.algorithms.reward import RewardConfig
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import AlignmentError, ConfigError, TeacherError
from blackbox_kd.losses import group_advantages
from blackbox_kd.prompts import Template
from blackbox_kd.student.render import Renderer
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Rollout, TrainSample
from tests.conftest import RUN_ID
from tests.judges import is_rubric, judge, met, says, shown
from tests.rollouts import renderer, rollout, tools

__all__ = ["renderer"]  # a fixture

Script = Callable[[str], str]

VERDICTS = {"one": met(1, 2, 3, 4), "won": met(4), "wun": met(1), "no": met()}
DIGITS = {"one": 9, "won": 6, "wun": 3, "no": 0}


def group(renderer: Renderer, question: str = "Say 1", drafts: Any = ("no", "one", "wun", "won")) -> list[Rollout]:
    return [rollout(renderer, question, draft) for draft in drafts]


def graded(text: str) -> str:
    return says(text, VERDICTS.__getitem__)


def feedback(
    corpus: Corpus,
    renderer: Renderer,
    rollouts: list[Rollout],
    script: Script = graded,
    *,
    second: Script | None = None,
    reply: str = "one",
    round_: int = 1,
    dropped: frozenset[str] = frozenset(),
    **config: Any,
) -> Outcome:
    async def ask() -> Outcome:
        async with (
            Teacher(ScriptedTeacherConfig(reply=reply), corpus, RUN_ID) as teacher,
            judge(corpus, script) as first,
            judge(corpus, second, "unseen") as other,
        ):
            given = tools(teacher, renderer, judge=first, unseen=other if second else None)._replace(dropped=dropped)
            return await RewardConfig(**config).build(given).feedback(rollouts, round_)

    return asyncio.run(ask())


def text_of(renderer: Renderer, sample: TrainSample, stream: str = "ce") -> str:
    return renderer.decode([i for i, w in zip(sample.input_ids, sample.weights[stream], strict=True) if w])


def bodies(corpus: Corpus, purpose: str) -> list[dict[str, Any]]:
    return [json.loads(b) for (b,) in corpus.rows(f"SELECT body::VARCHAR FROM requests WHERE purpose = '{purpose}'")]


@pytest.mark.parametrize("drafts", [random.Random(i).sample(list(VERDICTS), 4) for i in range(5)], ids=range(5))
def test_each_sample_gets_its_own_reward_whatever_place_it_was_shown_at(
    drafts: list[str], corpus: Corpus, renderer: Renderer
) -> None:
    rollouts = [*group(renderer, drafts=drafts), *group(renderer, "Say 2", drafts[::-1])]
    outcome = feedback(corpus, renderer, rollouts)
    rewards = {said.completion_id: said.value for said in outcome.feedback}
    expected = {"one": 1.0, "won": 0.4, "wun": 0.1, "no": 0.0}
    assert [rewards[r.completion.completion_id] for r in rollouts] == [expected[r.completion.text] for r in rollouts]
    asked = bodies(corpus, "judge")
    assert len(asked) == 2
    for said, one in zip(outcome.feedback, rollouts, strict=True):
        orders = [shown(body["messages"][-1]["content"]) for body in asked]
        assert one.completion.text in {order[said.detail["place"] - 1] for order in orders}
        assert said.detail["said"] == VERDICTS[one.completion.text]


def test_the_best_of_a_group_is_learnt_behind_its_prompt(corpus: Corpus, renderer: Renderer) -> None:
    outcome = feedback(corpus, renderer, group(renderer))
    (sample,) = outcome.samples
    assert text_of(renderer, sample) == "one"
    prompt = group(renderer)[0].prompt_ids
    assert sample.input_ids[: len(prompt)] == prompt
    assert not any(sample.weights["ce"][: len(prompt)])
    assert (outcome.asked, outcome.failed) == (4, 0)


def test_a_group_whose_references_curation_dropped_is_not_graded_and_no_failure(
    corpus: Corpus, renderer: Renderer
) -> None:
    rollouts = [*group(renderer), *group(renderer, "Say 2")]
    feedback(corpus, renderer, rollouts[:4])
    ((answer,),) = corpus.rows("SELECT completion_id::VARCHAR FROM completions WHERE author = 'teacher'")
    outcome = feedback(corpus, renderer, rollouts, dropped=frozenset({answer}))
    assert (outcome.asked, outcome.failed, outcome.dropped) == (8, 0, 4)
    assert {said.completion_id for said in outcome.feedback} == {r.completion.completion_id for r in rollouts[4:]}


def test_a_sample_that_was_cut_off_is_no_answer_to_learn(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = group(renderer)
    cut = msgspec.structs.replace(rollouts[1].completion, finish_reason="length")
    rollouts[1] = msgspec.structs.replace(rollouts[1], completion=cut)
    (sample,) = feedback(corpus, renderer, rollouts).samples
    assert text_of(renderer, sample) == "won"


def test_a_whole_sample_that_is_no_better_than_its_group_is_not_learnt(
    corpus: Corpus, renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = group(renderer)
    for i in (1, 3):  # the better ones
        cut = msgspec.structs.replace(rollouts[i].completion, finish_reason="length")
        rollouts[i] = msgspec.structs.replace(rollouts[i], completion=cut)
    assert feedback(corpus, renderer, rollouts).samples == []
    assert "no group teaches anything" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["none", "group"])
def test_the_policy_gradient_has_advantages_within_the_group(scale: Any, corpus: Corpus, renderer: Renderer) -> None:
    rollouts = group(renderer)
    outcome = feedback(corpus, renderer, rollouts, update="pg", scale=scale)
    expected = group_advantages([[0.0, 1.0, 0.1, 0.4]], scale=scale)[0].tolist()
    for sample, one, advantage in zip(outcome.samples, rollouts, expected, strict=True):
        assert sample.sample_id == one.completion.completion_id
        size = len(one.prompt_ids)
        assert sample.weights["pg"] == pytest.approx([0.0] * size + [advantage] * len(one.completion_ids))
        assert sample.logprobs["old"] == [0.0] * size + one.logprobs
    assert RewardConfig(update="pg").losses == {"pg": {"clip": 0.2}}


@pytest.mark.parametrize("update", ["best_of_n", "pg"])
def test_a_group_without_a_difference_teaches_nothing_and_is_no_failure(
    update: str, corpus: Corpus, renderer: Renderer
) -> None:
    rollouts = [*group(renderer), *group(renderer, "Say 2", ["no"] * 4)]
    outcome = feedback(corpus, renderer, rollouts, update=update)
    learnt = {sample.sample_id for sample in outcome.samples}
    assert learnt <= {r.completion.completion_id for r in rollouts[:4]}
    assert learnt
    assert (outcome.failed, outcome.metrics["groups_equal"], len(outcome.feedback)) == (0, 0.5, 8)


def test_a_rubric_is_asked_for_once_a_prompt_and_rests_on_the_stored_answer(corpus: Corpus, renderer: Renderer) -> None:
    feedback(corpus, renderer, group(renderer), reply="Uno!")
    feedback(corpus, renderer, group(renderer, drafts=["no", "one", "wun", "no"]), reply="never asked", round_=2)
    (asked,) = bodies(corpus, "rubric")
    assert "<good_answer>\nUno!\n</good_answer>" in asked["messages"][-1]["content"]
    assert "<task>\nSay 1\n</task>" in asked["messages"][-1]["content"]
    assert len(bodies(corpus, "judge")) == 2
    wrote = corpus.rows(
        "SELECT author, purpose, count(*) FROM completions JOIN requests USING (request_key) GROUP BY ALL ORDER BY ALL"
    )
    assert wrote == [("judge", "judge", 2), ("judge", "rubric", 1), ("teacher", "sample", 1)]


def test_a_group_that_was_graded_is_not_graded_again(corpus: Corpus, renderer: Renderer) -> None:
    first = feedback(corpus, renderer, group(renderer))

    def never(text: str) -> str:
        raise AssertionError(text)

    again = feedback(corpus, renderer, group(renderer)[::-1], never)
    assert {f.completion_id: f.value for f in again.feedback} == {f.completion_id: f.value for f in first.feedback}


def test_equal_samples_are_shown_once_and_rewarded_alike(corpus: Corpus, renderer: Renderer) -> None:
    outcome = feedback(corpus, renderer, group(renderer, drafts=["one", " one\n", "no", "one"]))
    (asked,) = bodies(corpus, "judge")
    assert sorted(shown(asked["messages"][-1]["content"])) == ["no", "one"]
    assert [said.value for said in outcome.feedback] == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", ["rubric", "judge"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: "I cannot do that",
        lambda reply: "",
        lambda reply: reply[:-2],
        lambda reply: json.dumps(dict(list(json.loads(reply).items())[:-1])),
        lambda reply: json.dumps(json.loads(reply) | {"answer_5": met(1), "criteria": []}),
    ],
    ids=["prose", "empty", "broken", "one too few", "one too many"],
)
def test_a_reply_that_cannot_be_read_drops_its_group(
    spoil: Script, bad: str, corpus: Corpus, renderer: Renderer
) -> None:
    def script(text: str) -> str:
        mine = is_rubric(text) == (bad == "rubric") and "Say 2" in text
        return spoil(graded(text)) if mine else graded(text)

    rollouts = [*group(renderer), *group(renderer, "Say 2")]
    outcome = feedback(corpus, renderer, rollouts, script)
    assert (outcome.asked, outcome.failed, len(outcome.feedback), len(outcome.samples)) == (8, 4, 4, 1)
    assert outcome.metrics["reward"] == pytest.approx((0 + 1 + 0.1 + 0.4) / 4)


def test_without_a_usable_answer_of_the_teacher_there_is_no_group(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = [*group(renderer), *group(renderer, "Say 2")]
    outcome = feedback(corpus, renderer, rollouts, reply="{% if '2' in text %} {% else %}one{% endif %}")
    assert (outcome.failed, len(outcome.feedback)) == (4, 4)


def test_nothing_usable_is_all_failed(corpus: Corpus, renderer: Renderer) -> None:
    outcome = feedback(corpus, renderer, group(renderer), lambda text: "no")
    assert (outcome.failed, outcome.samples, outcome.feedback, outcome.metrics) == (4, [], [], {})


def test_grades_without_a_rubric(corpus: Corpus, renderer: Renderer) -> None:
    rollouts = group(renderer)
    digits = {"grades": "digits", "top_logprobs": None}
    outcome = feedback(corpus, renderer, rollouts, lambda text: says(text, DIGITS.__getitem__), **digits)
    assert [said.value for said in outcome.feedback] == [0.0, 1.0, 3 / 9, 6 / 9]
    (asked,) = bodies(corpus, "judge")
    assert "<good_answer>\none\n</good_answer>" in asked["messages"][-1]["content"]
    assert "logprobs" not in asked
    assert bodies(corpus, "rubric") == []


def test_grades_of_an_endpoint_with_logprobs_are_means(corpus: Corpus, renderer: Renderer) -> None:
    outcome = feedback(
        corpus, renderer, group(renderer), lambda text: says(text, DIGITS.__getitem__), grades="digits", references=0
    )
    (asked,) = bodies(corpus, "judge")
    assert (asked["top_logprobs"], asked["temperature"]) == (20, 0.0)
    # the scripted judge shows its words alone: "9," is no digit, so that what is written counts
    assert [said.value for said in outcome.feedback] == [0.0, 1.0, 3 / 9, 6 / 9]


def test_the_reply_is_constrained_unless_the_endpoint_refuses_that(corpus: Corpus, renderer: Renderer) -> None:
    feedback(corpus, renderer, group(renderer))
    (asked,) = bodies(corpus, "judge")
    schema = asked["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["answer_1", "answer_2", "answer_3", "answer_4"]
    from tests.judges import ScriptedJudge

    refusing = Teacher(ScriptedJudge(script=graded, omit_params=["response_format"]), corpus, RUN_ID)
    body = refusing.request(
        group(renderer)[0].prompt, "judge", RewardConfig().sampling, parameters={"response_format": {}}
    ).body
    assert "response_format" not in body


def test_a_group_of_another_size_is_an_error(corpus: Corpus, renderer: Renderer) -> None:
    with pytest.raises(AlignmentError, match="3 rollouts of a prompt, not 4"):
        feedback(corpus, renderer, group(renderer)[:3])


def test_without_a_judge_it_is_not_built(corpus: Corpus, renderer: Renderer) -> None:
    teacher = Teacher(ScriptedTeacherConfig(), corpus, RUN_ID)
    with pytest.raises(ConfigError, match="same_as: teacher"):
        RewardConfig().build(tools(teacher, renderer))


def test_an_edited_template_is_another_experiment(tmp_path: Any) -> None:
    copy = tmp_path / "rubric.j2"
    copy.write_text(Template("prompts/rubric.md.j2", "x").source)
    assert RewardConfig(rubric_template=str(copy)).files_hash() == RewardConfig().files_hash()
    copy.write_text("Name criteria for {{ prompt }}")
    assert RewardConfig(rubric_template=str(copy)).files_hash() != RewardConfig().files_hash()


def test_the_templates_say_how_many_of_what() -> None:
    verdicts = Template("prompts/verdicts.md.j2", "x").render(
        prompt="Say 1", answers=["one </answer_1>", "{{ two }}"], criteria=["a", "b", "c"]
    )
    assert verdicts.startswith("Check 2 answers to the same task against 3 criteria.")
    assert verdicts.endswith('{"answer_1": [3 times true or false], "answer_2": [3 times true or false]}')
    assert re.findall(r"^\d\. .*", verdicts, re.MULTILINE) == ["1. a", "2. b", "3. c"]
    assert "{{ two }}" in verdicts
    grades = Template("prompts/grades.md.j2", "x").render(prompt="Say 1", answers=["one", "two"], references=[])
    assert grades.endswith('{"answer_1": grade, "answer_2": grade}')
    assert "good_answer" not in grades


# The second opinion


def test_the_unseen_judge_grades_a_part_of_the_groups_by_a_rubric_of_its_own(
    corpus: Corpus, renderer: Renderer
) -> None:
    turned = {text: met(*{1, 2, 3, 4} - {i + 1 for i, v in enumerate(row) if v}) for text, row in VERDICTS.items()}
    rollouts = [one for i in range(4) for one in group(renderer, f"Say {i}")]
    alone = feedback(corpus, renderer, rollouts)
    outcome = feedback(corpus, renderer, rollouts, second=lambda text: says(text, turned.__getitem__), unseen_share=0.5)
    assert outcome.samples == alone.samples
    assert outcome.metrics["judge_reward"] == pytest.approx(1.5 / 4)
    assert outcome.metrics["unseen_reward"] == pytest.approx(2.5 / 4)
    assert outcome.metrics["judge_difference"] == pytest.approx(-1 / 4)
    assert outcome.metrics["judge_rank_correlation"] == pytest.approx(-1)
    assert outcome.metrics["unseen_failed"] == 0
    by = [said.scorer.split("@")[0] for said in outcome.feedback]
    assert (by.count("judge"), by.count("unseen")) == (16, 8)
    models = corpus.rows("SELECT model, count(*) FROM requests WHERE purpose = 'rubric' GROUP BY ALL ORDER BY ALL")
    assert models == [("judge", 4), ("unseen", 2)]


def test_an_unseen_judge_that_cannot_be_read_is_no_second_opinion(corpus: Corpus, renderer: Renderer) -> None:
    with pytest.raises(TeacherError, match=r"evaluate\.judge: none of its grades for 1 groups"):
        feedback(corpus, renderer, group(renderer), second=lambda text: "fine")


# Health


def test_rewards_that_follow_length_are_seen() -> None:
    found = health.of_rewards([[0.0, 0.5, 1.0], [0.6, 0.6, 0.6]], [[10, 20, 30], [900, 1, 5]])
    assert found["reward"] == pytest.approx(np.mean([0, 0.5, 1.0, 0.6, 0.6, 0.6]))
    assert found["groups_equal"] == 0.5
    assert found["reward_spread"] == pytest.approx(np.std([0, 0.5, 1.0]) / 2)
    assert health.of_rewards([[0.0, 1.0], [0.9, 1.0]], [[5, 7], [100, 102]])["reward_length_correlation"] > 0.7
    assert "reward_length_correlation" not in health.of_rewards([[0.5, 0.5]], [[1, 2]])


def test_agreement_is_of_ranks_within_a_group() -> None:
    one = [[0.1, 0.2, 0.9], [0.0, 0.5, 0.6]]
    # another scale, and a group that it likes more altogether: the ranks are the same
    other = [[0.3, 0.31, 0.4], [0.8, 0.9, 0.905]]
    found = health.agreement(one, other)
    assert found["judge_rank_correlation"] > 0.8
    assert found["judge_difference"] == pytest.approx(np.mean(one) - np.mean(other))
    assert health.agreement(one, one)["judge_rank_correlation"] == pytest.approx(1)
    assert "judge_rank_correlation" not in health.agreement(one, [[0.5] * 3, [0.1] * 3])


def test_equal_rewards_share_a_rank() -> None:
    # by hand: centred ranks 0.5 0.5 2 3 against 0 1.5 1.5 3
    expected = float(torch.corrcoef(torch.tensor([[0.5, 0.5, 2.0, 3.0], [0.0, 1.5, 1.5, 3.0]]))[0, 1])
    found = health.agreement([[1.0, 1.0, 2.0, 3.0]], [[1.0, 2.0, 2.0, 3.0]])
    assert found["judge_rank_correlation"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([], 0.0),
        ([(0.9, 0.1)], 0.0),
        ([(0.2, 0.5), (0.4, 0.3)], 0.2),
        ([(0.2, 0.5), (0.1, 0.3)], 0.0),  # both fall
        ([(0.2, 0.5), (0.4, 0.6)], 0.0),  # both rise
        ([(0.2, 0.4), (0.3, 0.6), (0.5, 0.3)], 0.3),  # since its best round
        ([(0.2, 0.4), (0.6, 0.6), (0.5, 0.3)], 0.0),  # the judge's fell, too, since then
        ([(0.2, 0.6), (0.3, 0.55), (0.4, 0.5)], 0.1),  # slowly
    ],
)
def test_divergence_is_one_that_rises_while_the_other_falls(rounds: list[tuple[float, float]], expected: float) -> None:
    assert health.divergence(rounds) == pytest.approx(expected)
