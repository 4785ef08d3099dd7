"""`show`: a row as a person would want to read it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Answered
from blackbox_kd.types import Feedback
from tests.conftest import RUN_ID
from tests.records import CONTEXT, answered, attempt, completion, prompt, request, token, usage

DRAFT = "the student said so"


@pytest.fixture
def told(corpus: Corpus) -> Corpus:
    """A student's draft with its rewrite, a teacher's answer with logprobs, a dead letter, an open question."""
    question = prompt('Say "Grüß\nGott"')
    wrote = request(question, purpose="rollout", body={"model": "pupil"}, context_hash=None)
    draft = completion(wrote, author="student", text=DRAFT, policy="base", round=1)
    fixed = request(question, purpose="relabel", completion_id=draft.completion_id, sample_idx=5)
    rewrite = completion(
        fixed, text="Grüß Gott", served_model="m-2026", reasoning="It was rude.", usage=usage(20, 4, 8, 2)
    )
    sure = request(prompt("Count"))
    one = completion(
        sure, text="1, 2", logprobs=[token("1", -0.01, ("1", -0.01)), token("2", -3.5, ("3", -0.25), ("2", -3.5))]
    )
    dead, still = request(prompt("Forbidden")), request(prompt("Later"))
    corpus.add_prompts([question, *(prompt(text) for text in ("Count", "Forbidden", "Later"))])
    corpus.add_requests([wrote, fixed, sure, dead, still])
    corpus.add_completions([draft], scorer="pupil@base", run_id=RUN_ID)
    refused = attempt(dead, status=400, billed=False, error="HTTP 400: not this", attempted_at=1.8e9)
    corpus.try_ingest([answered(rewrite, cost_usd=0.002), answered(one), Answered(attempt=refused, dead_letter=True)])
    said = Feedback(
        completion_id=draft.completion_id, kind="rewrite", scorer="m@bare", target_completion_id=rewrite.completion_id
    )
    corpus.add_feedback([said], round_=1, run_id=RUN_ID)
    return corpus


def shown(corpus: Corpus, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["show", "--corpus", str(corpus.path), *flags]) == 0
    return capsys.readouterr().out


def rows(corpus: Corpus, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shown(corpus, capsys, "--json", *flags).splitlines()]


def id_of(corpus: Corpus, what: str, where: str) -> str:
    return str(
        corpus.rows(f"SELECT {what}::VARCHAR FROM completions JOIN requests USING (request_key) WHERE {where}")[0][0]
    )


def test_an_answer_with_the_draft_that_it_corrects(told: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(told, capsys, id_of(told, "completions.completion_id", "purpose = 'relabel'"))
    for part in ("relabel ", f"private context {CONTEXT}", f"      | {DRAFT}", "      | Grüß Gott", "It was rude.",
                 "m (served by m-2026)", "20 + 4 tokens (8 cached, 2 reasoning)", "1 calls, $0.002000"):  # fmt: skip
        assert part in text
    assert '      | Say "Grüß\n      | Gott"' in text


def test_a_draft_with_what_was_made_of_it(told: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(told, capsys, id_of(told, "completions.completion_id", "author = 'student'")[:13])
    assert "student pupil, policy base, round 1" in text
    assert "rewrite by m@bare in round 1" in text
    assert "better:\n      | Grüß Gott" in text


def test_the_least_sure_tokens_come_first(told: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(told, capsys, "--prompt", "Count")
    assert text.index("'2' -3.500, likeliest '3' -0.250") < text.index("'1' -0.010")
    assert "2 tokens, mean -1.755, top 2" in text


def test_a_dead_letter_says_why(told: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dead letter (400): HTTP 400: not this" in shown(told, capsys, "--prompt", "forbidden")
    (row,) = rows(told, capsys, "--prompt", "forbidden")
    assert (row["dead_status"], row["dead_error"], row["answers"]) == (400, "HTTP 400: not this", [])
    assert "not answered yet" in shown(told, capsys, "--prompt", "Later")


def test_a_prompt_is_found_by_its_text_as_written(told: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["purpose"] for row in rows(told, capsys, "--prompt", 'say "grüß\ngott"')} == {"rollout", "relabel"}


@pytest.mark.parametrize("column", ["request_key", "requests.prompt_id", "completions.completion_id"])
def test_any_id_finds_it(told: Corpus, capsys: pytest.CaptureFixture[str], column: str) -> None:
    found = rows(told, capsys, id_of(told, column, "purpose = 'sample'").upper())
    assert [row["purpose"] for row in found] == ["sample"]
    assert found[0]["answers"][0]["logprobs"][0]["least_sure"][0]["token"] == "2"


def test_the_last_ones_are_shown_in_order(told: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(rows(told, capsys, "--last", "2")) == 2
    everything = rows(told, capsys, "--last", "99")
    assert len(everything) == 4
    assert everything[-1]["purpose"] in ("sample", "rollout")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "show needs one of"),
        (["ab", "--last", "2"], "show needs one of"),
        (["--last", "-1"], "show needs one of"),
        (["zzz"], "no question found by id 'zzz'"),
    ],
)
def test_a_mistake_is_one_line(told: Corpus, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(["show", "--corpus", str(told.path), *flags]) == 2
    assert said in capsys.readouterr().err
