"""The one renderer: what is learnt is the answer and its end token, nothing before and nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from blackbox_kd.errors import AlignmentError
from blackbox_kd.student.render import IGNORE, Renderer
from tests.tiny import TEMPLATE

QUESTION = [{"role": "user", "content": "Say 1"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, [tokenizer.eos_token_id])


def test_supervision_is_the_answer_and_the_end_token(renderer: Renderer, tokenizer: Any) -> None:
    row = renderer.render(QUESTION, "one two")
    learnt = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE]
    assert tokenizer.decode(learnt) == "one two<|im_end|>"
    whole = "<|im_start|>user\nSay 1<|im_end|>\n<|im_start|>assistant\none two<|im_end|>"
    assert tokenizer.decode(row.input_ids) == whole


def test_labels_are_the_inputs_where_they_count(renderer: Renderer) -> None:
    row = renderer.render(QUESTION, "yes")
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (IGNORE, i) for i, label in zip(row.input_ids, row.labels, strict=True))
    first = row.labels.index(next(x for x in row.labels if x != IGNORE))
    assert IGNORE not in row.labels[first:]


def test_training_and_generation_start_behind_the_same_prompt(renderer: Renderer) -> None:
    row = renderer.render(QUESTION, "yes")
    prompt = renderer.prompt(QUESTION)
    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [IGNORE] * len(prompt)


@given(text=st.text(max_size=40))
def test_any_text_survives(tiny_model: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id])
    assert renderer.decode(renderer.completion(text)) == text


def test_an_unfinished_completion_has_no_end(renderer: Renderer) -> None:
    ids = renderer.completion("one two")[:-1]
    assert renderer.end_id not in ids
    assert renderer.decode(ids) == "one two"


def test_a_template_whose_end_is_no_end_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(AlignmentError, match="none of the model's end tokens"):
        Renderer(tokenizer, [5])


def test_a_template_that_generates_behind_another_prompt_is_refused(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(AlignmentError, match="different prompts"):
        Renderer(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("form", ['strftime_now("%d %b %Y")', "strftime_now( '%d %b %Y' )"])
def test_a_template_that_tells_todays_date_says_the_same_tomorrow(tiny_model: Path, form: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ '<|im_start|>system\\nToday: ' + " + form + " + '<|im_end|>\\n' }}" + TEMPLATE
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id])
    assert "Today: 26 Jul 2024" in tokenizer.decode(renderer.prompt([{"role": "user", "content": "Hi"}]))


def test_a_tokenizer_without_template_is_refused(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(AlignmentError, match="no chat template"):
        Renderer(tokenizer, [tokenizer.eos_token_id])
