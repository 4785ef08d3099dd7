"""The rules of curation: what each of them finds, and what it must not."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blackbox_kd.curation import Answer, CurateConfig, Verdict, judged, remaining
from blackbox_kd.curation.patterns import loop, pii, refusal
from blackbox_kd.types import Prompt
from tests.records import completion, prompt, request
from tests.test_leaks import ODD, SENTENCE, WORDS

LONG = " ".join(f"{word} is said to be of use in {i} ways" for i, word in enumerate(WORDS[:10]))


def answer(
    text: str, asked: str = "Q", *, draw: int = 0, tokens: int | None = 9, finish_reason: str = "stop"
) -> Answer:
    to = prompt(asked)
    return Answer(to, completion(request(to, sample_idx=draw), text=text, finish_reason=finish_reason), tokens)


def verdicts(answers: list[Answer], evaluation: tuple[Prompt, ...] = (), **config: Any) -> list[Verdict]:
    return judged(answers, evaluation, CurateConfig(**config))


def found(answers: list[Answer], evaluation: tuple[Prompt, ...] = (), **config: Any) -> list[tuple[int, str, str]]:
    """(place, reason, action) of each verdict."""
    place = {each.completion_id: i for i, each in enumerate(answers)}
    return [(place[v.completion_id], v.reason, v.action) for v in verdicts(answers, evaluation, **config)]


# --- what is never learnt


@pytest.mark.parametrize(
    ("finish_reason", "text", "reason"),
    [("length", "half an", "truncated"), ("content_filter", "", "refusal"), ("refusal", "I won't", "refusal"),
     ("tool_calls", "{}", "truncated"), ("stop", " \n", "degenerate"), ("stop", "", "degenerate")],
)  # fmt: skip
def test_what_has_no_end_or_no_text_is_dropped_whatever_the_config_says(
    finish_reason: str, text: str, reason: str
) -> None:
    off = dict.fromkeys(("refusal", "degenerate", "pii", "eval_overlap", "length_outlier", "near_duplicate"), "off")
    assert found([answer(text, finish_reason=finish_reason), answer("whole", "R")], **off) == [(0, reason, "drop")]


# --- refusals


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, but I can't assist with that.", "I\u2019m sorry, but I can\u2019t help with that request.",
     "  I cannot  comply with this.", "As an AI language model, I do not have opinions.", "SORRY, BUT I CANNOT DO THAT",
     "Unfortunately, I am unable to provide medical advice.", "I'm unable to assist with that."],
)  # fmt: skip
def test_a_refusal_is_known_by_how_it_begins(text: str) -> None:
    assert refusal(text, [])
    assert found([answer(text)]) == [(0, "refusal", "drop")]


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, I can't make it to the meeting on Monday.", "Sorry to hear that! Try again.",
     "As an AI engineer, you will train models.", "Dear team, I cannot support this plan.",
     "He said: I'm sorry, but I can't help with that.", "I can't believe it.", ""],
)  # fmt: skip
def test_an_answer_that_only_says_sorry_is_none(text: str) -> None:
    assert refusal(text, []) is None


def test_phrases_of_another_language_are_added() -> None:
    given = [answer("Dabei kann ich  leider nicht helfen."), answer("Ja.", "R")]
    assert found(given) == []
    assert found(given, refusal_phrases=["dabei kann ich LEIDER", ""]) == [(0, "refusal", "drop")]


# --- loops


@pytest.mark.parametrize(
    "text",
    ["no " * 40, "The answer is the same as before. " * 8, "It is so: " + "one two three " * 30, "ha" * 100,
     "\u54c8" * 60, "\U0001f600" * 30],
    ids=range(6),
)  # fmt: skip
def test_a_loop_is_found(text: str) -> None:
    assert loop(text)
    assert found([answer(text)]) == [(0, "degenerate", "drop")]


@pytest.mark.parametrize(
    "text",
    ["no no no", LONG, "| a | b | c |\n|" + "-" * 60 + "|\n| 1 | 2 | 3 |", "1" + "0" * 100, "x = [0, 0, 0, 0]", "",
     "- " + "\n- ".join(WORDS), "la la la la, she sang, and the whole room fell silent until the last note was gone"],
    ids=range(8),
)  # fmt: skip
def test_lists_tables_numbers_and_songs_are_no_loops(text: str) -> None:
    assert loop(text) is None


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), st.integers(16, 40))
def test_whatever_is_said_sixteen_times_in_a_row_is_a_loop(gram: list[str], times: int) -> None:
    assert loop(" ".join(gram * times))


@given(st.lists(st.sampled_from(WORDS), unique=True, max_size=60))
def test_different_words_are_no_loop(said: list[str]) -> None:
    assert loop(" ".join(said)) is None


# --- personal data


@pytest.mark.parametrize(
    ("text", "kinds"),
    [("Write to jane.doe+x@mail.example.com.", "mail"), ("+49 30 1234567", "phone"), ("(555) 123-4567", "phone"),
     ("call 555-123-4567 now", "phone"), ("030 1234567", "phone"), ("+1-202-555-0143", "phone"),
     ("key sk-proj-" + "a1B2" * 8, "key"), ("AKIAIOSFODNN7EXAMPLE", "key"), ("ghp_" + "a1" * 18, "key"),
     ("-----BEGIN RSA PRIVATE KEY-----", "key"), ("a@b.org or (555) 123-4567", "mail, phone")],
)  # fmt: skip
def test_personal_data_is_flagged_and_not_repeated(text: str, kinds: str) -> None:
    (verdict,) = verdicts([answer(text)])
    assert (verdict.reason, verdict.action, verdict.detail) == ("pii", "flag", kinds)


@pytest.mark.parametrize(
    "text",
    ["on 2024-01-15 at 10:30", "3.14159265358979", "1 000 000 000", "x @ y", "version 1.2.3.4", "task-force-skill",
     "sk-learn", "in 1998-2004", "ISBN 978-3-16-148410-0", "@user", "10.0.0.1"],
)  # fmt: skip
def test_dates_numbers_and_handles_are_no_personal_data(text: str) -> None:
    assert pii(text) is None


# --- overlap with evaluation prompts


def test_thirteen_words_of_an_evaluation_prompt_in_prompt_or_answer_are_an_overlap() -> None:
    held = prompt(f"Please note. {SENTENCE}", split="heldout")
    part = " ".join(SENTENCE.split()[2:15])
    given = [answer(f"They said: {part.upper()}"), answer("yes", f"Is it so that {part}?"),
             answer(" ".join(SENTENCE.split()[2:14]), "R")]  # fmt: skip
    assert found(given, (held,)) == [(0, "eval_overlap", "flag"), (1, "eval_overlap", "flag")]
    assert "heldout prompt" in verdicts(given, (held,))[0].detail
    assert len(found(given, (held,), overlap_ngram=12)) == 3


def test_a_short_evaluation_prompt_is_looked_for_as_a_whole_and_a_very_short_one_is_not() -> None:
    eight, seven = "one two three four five six seven eight", "this one has only just seven words"
    held = prompt(eight, split="ood"), prompt(seven, split="ood")
    given = [answer(f"So: {eight} nine"), answer(seven, "R"), answer(eight[:-6], "S")]
    assert found(given, held) == [(0, "eval_overlap", "flag")]


def test_an_instruction_that_evaluation_prompts_share_is_no_overlap() -> None:
    held = tuple(prompt(f"{SENTENCE}: {word}", split="heldout") for word in WORDS[:20])
    assert found([answer("yes", f"{SENTENCE}: something else")], held) == []


def test_what_a_rule_quotes_is_short_and_never_from_a_text_with_personal_data() -> None:
    mail = (
        "Write to zoe@example.com or to the harbour master, whoever of the two is there before the evening bell rings"
    )
    held = prompt(f"{SENTENCE} and again", split="heldout"), prompt(mail, split="ood")
    given = [answer(SENTENCE * 2, "A"), answer(mail, "B"), answer("mail zoe@example.com now " * 10, "C")]
    long, private = [each for each in verdicts(given, held) if each.reason == "eval_overlap"]
    (loop_,) = [each for each in verdicts(given) if each.reason == "degenerate"]
    assert long.detail == f"heldout prompt {held[0].prompt_id}: {SENTENCE.lower()[:40]!r}"
    assert private.detail == f"ood prompt {held[1].prompt_id}: 13 words"
    assert loop_.detail == "5 words 10 times"


def test_a_sentence_of_a_few_evaluation_prompts_is_an_overlap() -> None:
    shared = [f"{SENTENCE}: {word}" for word in WORDS[:4]]
    held = tuple(prompt(text, split="heldout") for text in [*shared, *WORDS[4:24]])
    assert found([answer("yes", f"{SENTENCE}: something else")], held) == [(0, "eval_overlap", "flag")]


# --- lengths


def test_a_length_far_from_the_others_is_an_outlier_on_either_side() -> None:
    many = [answer(f"text {i}", f"Q{i}", tokens=90 + i) for i in range(30)]
    odd = [answer("long", "L", tokens=4000), answer("short", "S", tokens=2), answer("unknown", "U", tokens=None)]
    assert found([*many, *odd]) == [(30, "length_outlier", "flag"), (31, "length_outlier", "flag")]
    assert found([*many, *odd], length_z=50) == []
    assert "4000 tokens, z " in verdicts([*many, *odd])[0].detail


def test_few_answers_or_answers_of_one_length_have_no_outlier() -> None:
    assert found([answer(f"t{i}", f"Q{i}", tokens=5 if i else 500) for i in range(19)]) == []
    assert found([answer(f"t{i}", f"Q{i}", tokens=5 if i else 500) for i in range(40)]) == []


# --- near-duplicates


def test_the_same_answer_to_the_same_question_in_other_letters_is_a_duplicate_of_the_first() -> None:
    given = [answer("Yes.", "Is it so?"), answer("yes", "is it  SO"), answer("Yes.", "Is it not so?")]
    assert found(given) == [(1, "near_duplicate", "drop")]
    assert verdicts(given)[0].detail == f"of {given[0].completion_id}, the same"


def test_a_long_answer_nearly_again_under_nearly_the_same_prompt_is_a_duplicate() -> None:
    asked = f"Explain this: {SENTENCE} {SENTENCE}"
    given = [answer(LONG, asked), answer(LONG.replace("use in 4", "use in 5"), asked + " now"),
             answer(LONG, "Why?"), answer(" ".join(reversed(LONG.split())), asked + " please")]  # fmt: skip
    assert found(given) == [(1, "near_duplicate", "drop")]
    assert "Jaccard 0.9" in verdicts(given)[0].detail
    assert found(given, jaccard=1.0) == []


def test_short_answers_under_a_long_shared_text_are_different_questions() -> None:
    article = " ".join(WORDS) * 3
    given = [answer("Yes.", f"{article} Is {word} in it?") for word in WORDS[:8]]
    assert found(given) == []


def test_draws_of_one_prompt_are_no_duplicates_of_each_other_but_all_are_of_another_prompts() -> None:
    draws = [answer(LONG, "Is it so?", draw=i) for i in range(3)]
    assert found(draws) == []
    again = [answer(LONG, "is it so", draw=i) for i in range(2)]
    assert found([*draws, *again]) == [(3, "near_duplicate", "drop"), (4, "near_duplicate", "drop")]


def test_a_twin_of_an_answer_that_was_dropped_is_kept_for_the_next_rule() -> None:
    bad = answer("x", "Is it so?", finish_reason="length")
    assert found([bad, answer("x", "is it so")]) == [(0, "truncated", "drop")]


# --- all together


@given(st.lists(st.tuples(st.sampled_from([*ODD, "a b c", LONG]), st.sampled_from(WORDS[:4])), max_size=8))
def test_judging_twice_says_the_same_once_for_each_answer_and_reason(said: list[tuple[str, str]]) -> None:
    given = [answer(text, asked, draw=i) for i, (text, asked) in enumerate(sorted(said, key=lambda each: each[1]))]
    first = verdicts(given)
    assert first == verdicts(given)
    assert len({(v.completion_id, v.reason) for v in first}) == len(first)
    kept = remaining(given, first)
    assert all(each.text for each in kept)
    assert not [v for v in verdicts(kept) if v.action == "drop"]


@pytest.mark.parametrize("text", ["a" * 2_000_000, "a.b" * 400_000, "1 2" * 300_000, "x@" * 500_000, "\x00" * 100_000])
def test_a_huge_text_takes_no_more_than_seconds(text: str) -> None:
    start = time.process_time()
    verdicts([answer(text)], (prompt(SENTENCE, split="heldout"),))
    assert time.process_time() - start < 20


def test_every_rule_can_be_turned_off_as_yaml_writes_it() -> None:
    assert CurateConfig.model_validate({"refusal": False, "pii": "off"}) == CurateConfig(refusal="off", pii="off")
    assert found([answer("I cannot comply.")], refusal="off") == []
    assert found([answer("I cannot comply.")], refusal="flag") == [(0, "refusal", "flag")]
