"""What is nearly the same, and train prompts that stand in an evaluation split."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackbox_kd.errors import ConfigError
from blackbox_kd.leaks import Leaks, find_leaks
from blackbox_kd.near import NearIndex, jaccard, may_have_twins, normalised, shingles, templates, words
from blackbox_kd.prompts import SPLITS, PromptSet
from blackbox_kd.sections import PromptsConfig
from blackbox_kd.types import Split
from tests.records import prompt

Write = Callable[[str, list[dict[str, Any]]], Path]

ODD = [
    "",
    " ",
    "\x00",
    "\U0001f600\U0001f600",
    "\u0634\u0643\u0631\u0627 \u062c\u0632\u064a\u0644\u0627",
    "\u200f",
    "x" * 100_000,
    "a\x00b",
    "\u0301",
]
WORDS = [f"word{i}" for i in range(60)]
SENTENCE = "The harbour master asks every skipper to hand in the list of the crew before the evening bell rings"


def leaks(train: list[str], heldout: list[str], threshold: float = 0.8) -> Leaks:
    asked = [prompt(text) for text in train]
    return find_leaks(asked, [prompt(text, split="heldout") for text in heldout], threshold, len(train))


# --- words and shingles


def test_words_keep_signs_that_mean_something_and_split_scripts_without_blanks() -> None:
    assert words("What is 2+2?") == ["what", "is", "2", "+", "2", "?"]
    assert words("GPT\u4f60\u597d x") == ["gpt", "\u4f60", "\u597d", "x"]
    assert words("\U0001f600\U0001f680") == ["\U0001f600", "\U0001f680"]


@pytest.mark.parametrize("text", ODD)
def test_any_text_has_words_and_shingles_or_none(text: str) -> None:
    assert bool(shingles(text)) == bool(words(text)) == bool(text.split())


@given(st.text(), st.text())
def test_jaccard_is_symmetric_between_0_and_1_and_1_of_itself(one: str, other: str) -> None:
    a, b = shingles(one), shingles(other)
    assert jaccard(a, b) == jaccard(b, a)
    assert 0 <= jaccard(a, b) <= 1
    assert jaccard(a, a) == 1


@given(st.text())
def test_normalising_twice_changes_nothing_and_case_and_blanks_are_gone(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert normalised(f"  {text}\n") == once


def edited(rng: random.Random) -> list[str]:
    """A text that differs from SENTENCE in a few words."""
    said = SENTENCE.split() * 3
    for _ in range(rng.randint(0, 6)):
        said[rng.randrange(len(said))] = rng.choice(WORDS)
    return said


def test_the_index_finds_what_comparing_each_with_each_finds() -> None:
    rng = random.Random(0)
    texts = [shingles(" ".join(edited(rng))) for _ in range(120)]
    for threshold in (0.5, 0.8, 0.9, 1.0):
        index, found = NearIndex(threshold), set()
        for place, text in enumerate(texts):
            found |= {(place, other) for other, _ in index.near(text)}
            index.add(place, text)
        pairs = {(i, j) for i in range(len(texts)) for j in range(i) if jaccard(texts[i], texts[j]) >= threshold}
        assert found <= pairs
        assert len(found) >= 0.99 * len([pair for pair in pairs if pair[1] < 100])


@given(st.lists(st.sets(st.integers(0, 12), max_size=8), max_size=8), st.sampled_from([0.5, 0.8, 1.0]))
def test_no_text_with_a_twin_is_passed_over(texts: list[set[int]], threshold: float) -> None:
    may = may_have_twins([np.array(sorted(text), np.int64) for text in texts], threshold)
    for i, text in enumerate(texts):
        if text and any(jaccard(text, other) >= threshold for j, other in enumerate(texts) if i != j):
            assert may[i]


def test_a_template_is_what_half_of_the_texts_share_and_few_texts_have_none() -> None:
    assert templates([{"t", i} for i in range(10)], ["a"] * 10) == ({"t"}, {"t"})
    assert templates([{"t", i} for i in range(3)], ["a"] * 3) == (set(), set())
    assert templates([{"t" if i < 20 else i} for i in range(200)], ["a"] * 200) == (set(), set())
    assert templates([{"t" if i < 21 else i} for i in range(200)], ["a"] * 200) == (set(), {"t"})
    assert templates([{"t" if i < 10 else i} for i in range(24)], ["a"] * 24) == (set(), set())


def test_a_template_is_that_of_a_split_however_many_texts_the_others_have() -> None:
    texts = [{"t" if i < 8 else i} for i in range(1000)]
    assert templates(texts, ["heldout"] * 8 + ["holdback"] * 992) == ({"t"}, {"t"})


# --- leaks


def test_an_equal_prompt_is_found_whatever_its_case_blanks_and_last_mark() -> None:
    found = leaks(["say  HI!", "say ho", "other"], ["Say hi.", "Say hi there"])
    assert len(found) == 1
    assert found.example
    assert found.example.jaccard == 1
    assert "1 train prompts are in an evaluation split, too (1 in heldout), such as 'say HI!' (test)" in str(found)


def test_a_prompt_with_a_word_changed_is_near_and_one_with_another_question_is_not() -> None:
    near = SENTENCE.replace("evening", "morning")
    found = leaks([near, " ".join(reversed(SENTENCE.split()))], [SENTENCE])
    assert len(found) == 1
    assert found.example
    assert 0.8 <= found.example.jaccard < 1
    assert "is nearly (Jaccard 0.8" in str(found)
    assert not leaks([near], [SENTENCE], threshold=1.0)
    assert not leaks(["How much is ten minus five?"], ["How much is ten minus four?"])
    assert not leaks(["What is 2 * 2?"], ["What is 2 + 2?"])


def test_a_long_instruction_that_all_prompts_share_makes_no_leak() -> None:
    heldout = [f"{SENTENCE}. {SENTENCE}. Question: what does {WORDS[i]} do to {WORDS[i + 1]}?" for i in range(20)]
    train = [f"{SENTENCE}. {SENTENCE}. Question: what does {WORDS[i]} do to {WORDS[i + 1]}?" for i in range(30, 50)]
    assert not leaks(train, heldout)
    assert len(leaks([*train, heldout[3]], heldout)) == 1
    bare = [f"Question: what does {WORDS[i]} do to {WORDS[i + 1]}?" for i in range(30, 50)]
    assert not leaks(bare, heldout)


@pytest.mark.parametrize(("paraphrases", "others"), [(4, 20), (12, 60), (30, 170)])
def test_a_near_copy_is_found_however_many_evaluation_prompts_are_paraphrases_of_it(
    paraphrases: int, others: int
) -> None:
    rng = random.Random(0)
    heldout = [f"{SENTENCE} of {WORDS[i]}" for i in range(paraphrases)]
    heldout += [" ".join(rng.choices(WORDS, k=20)) for _ in range(others)]
    assert len(leaks([f"{SENTENCE} of harvest", " ".join(rng.choices(WORDS, k=20))], heldout)) == 1


def test_several_long_instructions_make_no_leak_where_each_question_says_enough() -> None:
    instructions = [" ".join(f"{word}{i}" for word in SENTENCE.split() * 3) for i in range(5)]
    rng = random.Random(0)

    def questions(number: int) -> list[str]:
        return [f"{instructions[i % 5]}: {' '.join(rng.sample(WORDS, 10))}" for i in range(number)]

    heldout = questions(100)
    assert not leaks(questions(20), heldout)
    assert len(leaks([*questions(5), heldout[7].removesuffix(heldout[7].split()[-1])], heldout)) == 1


def test_a_word_asked_about_in_one_instruction_makes_no_leak() -> None:
    heldout = [f"{SENTENCE}: {word}" for word in WORDS[:20]]
    assert not leaks([f"{SENTENCE}: {word}" for word in WORDS[30:]], heldout)
    assert len(leaks([f"{SENTENCE}: {word}" for word in WORDS[15:30]], heldout)) == 5


@pytest.mark.parametrize("text", [text for text in ODD if text.strip()], ids=repr)
def test_odd_prompts_leak_to_themselves_and_to_no_other(text: str) -> None:
    short = text[:40]
    found = leaks([short, "a question of its own"], [short, SENTENCE])
    assert len(found) == 1


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1), max_size=6), st.lists(st.text(min_size=1), max_size=6))
def test_every_equal_text_is_found_and_no_order_matters(train: list[str], heldout: list[str]) -> None:
    found = leaks(train, heldout)
    same = {prompt(text).prompt_id for text in train if normalised(text) in {normalised(other) for other in heldout}}
    assert same <= found.prompt_ids
    assert found.prompt_ids == leaks(train[::-1], heldout[::-1]).prompt_ids


def test_the_shipped_prompts_have_no_leak_and_are_far_from_one() -> None:
    prompts = PromptSet(PromptsConfig(path="data/action_items"))
    apart = [p for split in SPLITS if split != "train" for p in prompts[split]]
    assert not find_leaks(prompts.stream("train"), apart, 0.8, None)
    assert not find_leaks(prompts.stream("train"), apart, 0.6, None)


# --- what becomes of them


@pytest.fixture
def leaky(write_jsonl: Write) -> str:
    rows = [{"prompt": text} for text in ("one question", "Two questions", SENTENCE, "three questions")]
    write_jsonl("data/train.jsonl", rows)
    write_jsonl("data/heldout.jsonl", [{"prompt": "two  questions."}, {"prompt": "another"}])
    path = write_jsonl("data/ood.jsonl", [{"prompt": SENTENCE.replace("evening", "morning")}])
    return str(path.parent)


def test_a_leak_stops_with_its_count_its_split_an_example_and_what_to_do(leaky: str) -> None:
    prompts = PromptSet(PromptsConfig(path=leaky))
    with pytest.raises(ConfigError) as stopped:
        prompts.refuse_leaks()
    said = str(stopped.value)
    assert "2 train prompts are in an evaluation split, too (1 in heldout, 1 in ood)" in said
    assert "'Two questions' (train.jsonl), which is the same as 'two questions.' (heldout.jsonl)" in said
    assert "prompts.leaks to drop" in said
    assert "\n" not in said


def test_leaking_train_prompts_are_left_out_everywhere_and_the_next_ones_come_in(
    leaky: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: dict[Split, int] = {"train": 2}
    prompts = PromptSet(PromptsConfig(path=leaky, leaks="drop", limits=limits))
    assert [p.text for p in prompts.stream("train")] == ["one question", "three questions"]
    assert prompts.count("train") == len(prompts["train"]) == 2
    assert "these train prompts are left out" in capsys.readouterr().err
    prompts.refuse_leaks()


def test_prompts_that_all_leak_leave_nothing_to_train_on(write_jsonl: Write) -> None:
    write_jsonl("data/train.jsonl", [{"prompt": "Hi"}])
    path = write_jsonl("data/heldout.jsonl", [{"prompt": "hi"}])
    with pytest.raises(ConfigError, match="every train prompt is in an evaluation split"):
        PromptSet(PromptsConfig(path=str(path.parent), leaks="drop"))


@pytest.mark.parametrize(
    "changes", [{"leaks": "allow"}, {"limits": {"heldout": 0, "ood": 0}}, {"limits": {"train": 1}}]
)
def test_nothing_is_refused_where_nobody_is_to_look_or_the_prompts_are_not_used(leaky: str, changes: Any) -> None:
    PromptSet(PromptsConfig(path=leaky, **changes)).refuse_leaks()


def test_the_threshold_of_near_ones_can_be_set(leaky: str) -> None:
    assert len(PromptSet(PromptsConfig(path=leaky, leak_jaccard=1.0)).leaks) == 1


def test_a_conversation_is_compared_as_a_whole(write_jsonl: Write) -> None:
    turns = [{"role": "user", "content": "Name a town"}, {"role": "assistant", "content": "Rome"}]
    write_jsonl("data/train.jsonl", [{"messages": [*turns, {"role": "user", "content": "Go on"}]}])
    other = [{"role": "user", "content": "Count to three"}, {"role": "assistant", "content": "1"}]
    path = write_jsonl("data/heldout.jsonl", [{"messages": [*other, {"role": "user", "content": "Go on"}]}])
    assert not PromptSet(PromptsConfig(path=str(path.parent))).leaks
