"""What the student writes is a row, and is read back token by token."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import AlignmentError
from blackbox_kd.rollout import Writer
from blackbox_kd.sections import StudentConfig
from blackbox_kd.student.student import Student
from blackbox_kd.types import Completion, Prompt, SamplingParams
from tests.conftest import RUN_ID
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def student(tiny_model: Path) -> Student:
    return Student(StudentConfig(model=str(tiny_model), device="cpu", max_length=64))


@pytest.fixture
def writer(student: Student, corpus: Corpus, prompts: list[Prompt]) -> Writer:
    corpus.add_prompts(prompts)
    sampling = SamplingParams(max_completion_length=8)
    return Writer(
        student=student,
        sampling=sampling,
        purpose="rollout",
        round=1,
        seed=7,
        batch_size=4,
        corpus=corpus,
        run_id=RUN_ID,
    )


def test_what_was_written_is_read_back(writer: Writer, prompts: list[Prompt]) -> None:
    first = writer.rollouts(prompts)
    again = writer.rollouts(prompts)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in first]
    assert [r.completion.completion_id for r in again] == [r.completion.completion_id for r in first]
    for one, other in zip(first, again, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=6e-4)  # stored to 1e-3 nats
    assert writer.corpus.rows("select count(*) from completions") == [(len(prompts),)]


def test_logprobs_are_of_the_drawn_tokens(writer: Writer, prompts: list[Prompt]) -> None:
    rollout = writer.rollouts(prompts[:1])[0]
    row = writer.student.renderer.join(rollout.prompt_ids, rollout.completion_ids)
    assert rollout.logprobs == writer.student.logprobs([row], batch_size=1)[0]
    assert len(rollout.logprobs) == len(rollout.completion_ids) == rollout.completion.usage.completion_tokens


@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"sampling": SamplingParams(temperature=0.5, max_completion_length=8)}],
    ids=["another seed", "another temperature"],
)
def test_another_setting_is_another_sample(writer: Writer, prompts: list[Prompt], other: dict[str, object]) -> None:
    writer.answers(prompts)
    replace(writer, **other).answers(prompts)  # type: ignore[arg-type]
    assert writer.corpus.rows("select count(*) from completions") == [(2 * len(prompts),)]


def test_another_policy_writes_anew(writer: Writer, prompts: list[Prompt]) -> None:
    writer.answers(prompts)
    policy = writer.student.policy
    writer.student.policy = "another"
    try:
        writer.answers(prompts)
    finally:
        writer.student.policy = policy
    found = writer.corpus.rows("select policy, count(*) from completions group by all order by all")
    assert found == [("another", len(prompts)), (policy, len(prompts))]


def test_another_model_of_the_same_name_writes_anew(corpus: Corpus, prompts: list[Prompt], tmp_path: Path) -> None:
    corpus.add_prompts(prompts)
    for seed in (0, 1, 0):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        student = Student(StudentConfig(model=str(make_tiny(tmp_path / "model", seed=seed)), device="cpu"))
        sampling = SamplingParams(max_completion_length=4)
        Writer(
            student=student, sampling=sampling, purpose="rollout", round=1, seed=7, batch_size=4, corpus=corpus,
            run_id=RUN_ID,
        ).answers(prompts)  # fmt: skip
    found = corpus.rows("select count(*), count(distinct policy), count(distinct model) from completions")
    assert found == [(2 * len(prompts), 2, 1)]


def test_finish_reason_tells_whether_it_ended(writer: Writer, prompts: list[Prompt]) -> None:
    end = writer.student.renderer.end_id
    for rollout in replace(writer, sampling=SamplingParams(max_completion_length=32)).rollouts(prompts):
        ended = rollout.completion_ids[-1] == end
        assert rollout.completion.finish_reason == ("stop" if ended else "length")
        assert "<|im_end|>" not in rollout.completion.text


def test_a_prompt_that_does_not_fit_is_left_out(writer: Writer, prompts: list[Prompt]) -> None:
    long = Prompt(messages=[{"role": "user", "content": "x " * 100}], split="train", source="t")
    assert [p for p, _ in writer.answers([*prompts, long])] == prompts


def test_tokens_that_do_not_spell_the_text_stop(
    writer: Writer, prompts: list[Prompt], corpus: Corpus, write_jsonl: Callable[..., Path]
) -> None:
    completion = writer.rollouts(prompts[:1])[0].completion
    tokens = completion.logprobs
    assert tokens is not None
    swapped: Completion = msgspec.structs.replace(completion, logprobs=[*tokens[1:], tokens[0]])
    with pytest.raises(AlignmentError, match="do not spell its text"):
        writer._ids(swapped)
