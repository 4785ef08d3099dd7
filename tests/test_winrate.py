"""Win rates: both orders, ties kept, what cannot be read left out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import pytest

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.history import judged
from blackbox_kd.judging import better_format, read_better
from blackbox_kd.settings import JudgedConfig
from blackbox_kd.types import Interval, Prompt
from blackbox_kd.winrate import WinRate, most_questions
from blackbox_kd.yardstick import Metrics
from tests.judges import judge, shown

Says = Callable[[str], str]

PROMPTS = [
    Prompt(messages=[{"role": "user", "content": f"Say {i}"}], split=split, source="test")
    for i, split in enumerate(["heldout", "heldout", "heldout", "ood"])
]  # fmt: skip
TEACHER = {prompt.prompt_id: "a good answer" for prompt in PROMPTS}


def better(word: str) -> str:
    return json.dumps({"better": word})


def longest(text: str) -> str:
    first, second = map(len, shown(text))
    return better("tie" if first == second else "answer_1" if first > second else "answer_2")


def measured(corpus: Corpus, says: Says, *checkpoints: Sequence[str]) -> tuple[list[Metrics], int]:
    """Metrics of each checkpoint, which gives these answers, and how often the judge was asked."""

    async def go() -> tuple[list[Metrics], int]:
        async with judge(corpus, says) as asked:
            wins = WinRate(JudgedConfig(bootstrap_samples=100), asked, TEACHER)
            found = [
                await wins.measure(list(zip(PROMPTS, texts, strict=False)), round_)
                for round_, texts in enumerate(checkpoints)
            ]
            return found, asked.engine.asked

    return asyncio.run(go())


def value(metrics: Metrics, name: str, split: str = "heldout") -> float:
    found: Interval = metrics[split][name]  # type: ignore[index]
    assert found.lo <= found.value <= found.hi
    return found.value


def test_a_win_counts_1_a_tie_a_half_and_a_loss_nothing(corpus: Corpus) -> None:
    texts = ["a very good answer", "some 13 chars", "short", "no"]
    (found,), asked = measured(corpus, longest, texts)
    assert value(found, "win_rate_vs_teacher") == pytest.approx((1 + 0.5 + 0) / 3)
    assert value(found, "win_rate_vs_teacher", "ood") == 0
    assert value(found, "judge_failed") == 0
    assert asked == 8  # both orders
    assert "win_rate_vs_previous" not in found["heldout"]


@pytest.mark.parametrize("place", ["answer_1", "answer_2"])
def test_a_judge_that_prefers_a_place_finds_no_winner(corpus: Corpus, place: str) -> None:
    (found,), _ = measured(corpus, lambda text: better(place), ["long answer here", "x", "y", "z"])
    assert value(found, "win_rate_vs_teacher") == 0.5
    assert value(found, "win_rate_vs_teacher", "ood") == 0.5


def test_a_win_in_one_order_and_a_tie_in_the_other_is_in_between(corpus: Corpus) -> None:
    def says(text: str) -> str:
        return better("answer_1" if shown(text)[0] == "ours" else "tie")

    (found,), _ = measured(corpus, says, ["ours"] * 3)
    assert value(found, "win_rate_vs_teacher") == 0.75


def test_both_orders_show_the_same_two_answers(corpus: Corpus) -> None:
    seen = list[list[str]]()

    def says(text: str) -> str:
        seen.append(shown(text))
        return better("tie")

    measured(corpus, says, ["ours"])
    assert sorted(seen) == [["a good answer", "ours"], ["ours", "a good answer"]]


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(corpus: Corpus) -> None:
    (found,), asked = measured(corpus, longest, ["a good answer"] * 4)
    assert value(found, "win_rate_vs_teacher") == 0.5
    assert asked == 0


def test_a_checkpoint_is_compared_with_the_one_before_it(corpus: Corpus) -> None:
    found, asked = measured(corpus, longest, ["aa", "bb", "cc"], ["aaa", "bb", "c"])
    assert value(found[1], "win_rate_vs_previous") == pytest.approx((1 + 0.5 + 0) / 3)
    assert asked == 6 + 4 + 4  # of the second checkpoint's answers "bb" is known beside the teacher's, and equal before


def test_a_reply_that_cannot_be_read_is_left_out_and_counted(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(text: str) -> str:
        return "I like the first one" if shown(text)[0] == "no verdict" else better("answer_1")

    (found,), _ = measured(corpus, says, ["no verdict", "x", "y"])
    assert value(found, "win_rate_vs_teacher") == 0.5  # of the other two
    assert value(found, "judge_failed") == pytest.approx(1 / 3)
    assert "1 of 3 comparisons without two clear verdicts are left out" in capsys.readouterr().err


def test_without_one_clear_verdict_there_is_no_win_rate(corpus: Corpus) -> None:
    (found,), _ = measured(corpus, lambda text: "?", ["x", "y", "z"])
    assert set(found["heldout"]) == {"judge_failed"}
    assert value(found, "judge_failed") == 1


def test_asked_again_it_is_read_from_the_corpus(corpus: Corpus) -> None:
    first, asked = measured(corpus, longest, ["aa", "bb", "cc"])
    assert asked == 6
    assert measured(corpus, longest, ["aa", "bb", "cc"]) == (first, 0)
    assert judged(corpus.path, "judge", "win_rate", list(TEACHER)) == 6
    assert corpus.rows("SELECT DISTINCT purpose FROM requests") == [("win_rate",)]


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ('{"better": "answer_1"}', 1.0),
        ('Sure: {"better": "answer_2"}.', 0.0),
        ('{"better": "tie"}', 0.5),
        ('{"better": "answer_3"}', None),
        ('{"better": "Answer_1"}', None),
        ('{"better": 1}', None),
        ('{"better": "tie", "why": "equal"}', None),
        ('{"better": "tie", "better": "answer_1"}', None),
        ("answer_1", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_to_the_letter(reply: str, points: float | None) -> None:
    assert read_better(reply) == points


def test_the_form_of_a_reply_allows_what_is_read() -> None:
    words = better_format()["json_schema"]["schema"]["properties"]["better"]["enum"]
    assert {read_better(better(word)) for word in words} == {0.0, 0.5, 1.0}


def test_the_most_questions_are_both_orders_beside_teacher_and_previous() -> None:
    assert most_questions(prompts=4, checkpoints=1) == 8
    assert most_questions(prompts=4, checkpoints=3) == 2 * 4 * 5
    assert most_questions(prompts=4, checkpoints=0) == 0
