"""`plan`: everything is counted, and nothing is spent, asked or made."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.config import load_config
from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.history import history, known
from blackbox_kd.corpus.journal import Answered
from blackbox_kd.project import sample_questions
from blackbox_kd.prompts import PromptSet
from blackbox_kd.questions import CHUNK, count
from blackbox_kd.settings import Config
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.teachers.teacher import Questions
from blackbox_kd.types import Request
from tests.records import answered, attempt, completion, prompt, request, usage

HOSTED = {"provider": "openai", "model": "scripted", "api_key_env": "NOT_SET_API_KEY"}
PRICED = {**HOSTED, "price": {"input": 1.0, "output": 10.0}}


def planned(project_file: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["plan", "--config", str(project_file), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    return {**found, **{row["stage"]: row for row in [*found["stages"], found["total"]]}}


def with_answers(project_file: Path, answers: int, dead: int = 0) -> Corpus:
    """The corpus of a run that was stopped after so many of its sample questions."""
    config = load_config(Config, str(project_file))
    prompts = list(PromptSet(config.prompts).stream("train", config.sample.max_prompts))
    requests = list(sample_questions(Questions(config.teacher, config.sample), prompts))
    corpus = Corpus(config.corpus_path)
    corpus.add_requests(requests)
    used = usage(10, 4)
    corpus.try_ingest([
        *(answered(completion(asked), attempted_at=1e9 + 2 * i, latency_s=1.0, usage=used)
          for i, asked in enumerate(requests[:answers])),
        *(Answered(attempt=attempt(asked, status=400, error="no"), dead_letter=True)
          for asked in requests[answers : answers + dead]),
    ])  # fmt: skip
    return corpus


def test_a_first_plan_makes_no_file_and_needs_no_key(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = set(project_file.parent.rglob("*"))
    found = planned(project_file, capsys, "--teacher", json.dumps(PRICED))
    assert set(project_file.parent.rglob("*")) == files
    assert [found[stage]["to_ask"] for stage in ("sample", "onpolicy", "evaluate", "total")] == [6, 6, 14, 26]
    assert found["sample"]["completion_tokens_low"] == 6 * 16 / 4
    assert found["sample"]["completion_tokens_high"] == 6 * 16
    assert found["tokens_from"] == "bytes / 4"
    tokens, row = found["sample"]["prompt_tokens"], found["sample"]
    assert (row["usd_low"], row["usd_high"]) == pytest.approx(((tokens + 240) / 1e6, (tokens + 960) / 1e6))
    assert (found["rate_per_s"], row["seconds"], found["total"]["seconds"]) == (None, None, None)


def test_what_is_known_is_not_counted_again(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = with_answers(project_file, 3, dead=1)
    before = corpus.path.read_bytes()
    found = planned(project_file, capsys)
    row = found["sample"]
    assert [row[name] for name in ("questions", "cached", "dead", "to_ask")] == [6, 3, 1, 2]
    assert corpus.path.read_bytes() == before
    again = planned(project_file, capsys, "--teacher.retry_dead_letters", "true")
    assert (again["sample"]["dead"], again["sample"]["to_ask"]) == (1, 3)


def test_estimates_come_from_what_was_seen(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_answers(project_file, 3)
    found = planned(project_file, capsys)
    assert found["tokens_from"] == "3 answers of scripted"
    assert found["sample"]["prompt_tokens"] == pytest.approx(3 * 10, abs=1)
    assert found["sample"]["completion_tokens_low"] == 3 * 4
    assert found["rate_per_s"] == pytest.approx(0.5)
    assert found["sample"]["seconds"] == pytest.approx(6.0)


def test_rounds_that_are_done_are_not_asked_again(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = project_file.parent / "run" / "checkpoints" / "round-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "settings.json").write_text("{}")
    row = planned(project_file, capsys)["onpolicy"]
    assert [row[name] for name in ("questions", "cached", "to_ask")] == [6, 3, 3]


def test_an_algorithm_says_how_much_it_asks(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--onpolicy.algorithm.mode", "afresh", "--onpolicy.algorithm.worst_fraction", "0.34"]
    assert planned(project_file, capsys, *flags)["onpolicy"]["questions"] == 2
    assert planned(project_file, capsys, "--onpolicy.rounds", "0")["onpolicy"]["questions"] == 0


def test_the_best_of_n_is_a_question_a_prompt_until_it_is_answered(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grades = json.dumps({"answer_1": 3, "answer_2": 9})
    priced = {"provider": "scripted", "model": "judge", "reply": grades, "price": {"input": 1.0, "output": 10.0}}
    flags = ["--sample.n", "2", "--teacher.reply", "one {{ range(1000000) | random }}", "--judge", json.dumps(priced)]
    assert "curate" not in planned(project_file, capsys, *flags)
    flags += ["--curate.best_of_n", "drop"]
    found = planned(project_file, capsys, *flags)
    row = found["curate"]
    assert [row[name] for name in ("questions", "cached", "to_ask")] == [6, 0, 6]
    assert row["completion_tokens_high"] == 6 * 1024
    assert row["usd_high"] == pytest.approx((row["prompt_tokens"] + 10 * 6 * 1024) / 1e6)
    assert found["total"]["to_ask"] == 12 + 6 + 6 + 14
    for command in ("sample", "curate"):
        assert main([command, "--config", str(project_file), *flags]) == 0
    capsys.readouterr()
    row = planned(project_file, capsys, *flags)["curate"]
    assert [row[name] for name in ("questions", "cached", "to_ask")] == [6, 6, 0]


def test_without_a_length_limit_the_worst_case_is_not_known(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = planned(project_file, capsys, "--teacher", json.dumps({**PRICED, "omit_params": ["max_tokens"]}))["sample"]
    assert (row["completion_tokens_low"], row["completion_tokens_high"], row["usd_high"]) == (None, None, None)


def test_several_choices_cost_several_times(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = planned(project_file, capsys, "--teacher", json.dumps({**PRICED, "extra_body": {"n": 3}}))["sample"]
    assert row["completion_tokens_high"] == 6 * 16 * 3


def test_a_batch_costs_its_share_and_nobody_knows_how_long_it_takes(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_answers(project_file, 3)
    priced = {**PRICED, "price": {**PRICED["price"], "cached_input": 0.5, "batch_factor": 0.25}}
    flags = ["--teacher", json.dumps(priced)]
    alone, batch = (planned(project_file, capsys, *flags, "--sample.batch", on) for on in ("false", "true"))
    assert batch["sample"]["usd_high"] == pytest.approx(alone["sample"]["usd_high"] / 4)
    assert batch["sample"]["usd_low"] == pytest.approx(alone["sample"]["usd_low"] / 4)
    assert batch["evaluate"] == alone["evaluate"]
    assert (alone["sample"]["seconds"], batch["sample"]["seconds"]) == (pytest.approx(6.0), None)


def test_a_row_that_stands_twice_is_one_question(
    project_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "twice.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i % 4}"}) + "\n" for i in range(10)))
    found = planned(project_file, capsys, "--prompts", json.dumps({"path": str(rows)}), "--sample.n", "2")
    assert (found["sample"]["questions"], found["sample"]["to_ask"]) == (8, 8)


def test_a_person_reads_what_the_numbers_rest_on(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(project_file), "--teacher", json.dumps(HOSTED)]) == 0
    text = capsys.readouterr().out
    for part in ("from bytes / 4", "no answer was timed yet", "set teacher.price", "total\t26\t0\t0\t26"):
        assert part in text


def test_pauses_between_runs_do_not_slow_the_rate(corpus: Corpus) -> None:
    asked = [request(prompt(f"Hi {i}")) for i in range(6)]
    corpus.add_requests(asked)
    times = [0.0, 1.0, 2.0, 9000.0, 9001.0, 9002.0]
    corpus.try_ingest([
        answered(completion(q), attempted_at=1e9 + at, latency_s=0.5, usage=usage(10, 4))
        for q, at in zip(asked, times, strict=True)
    ])  # fmt: skip
    assert history(corpus.path, "m").rate_per_s == pytest.approx(1.0)
    assert history(corpus.path, "another").rate_per_s is None


def test_a_corpus_that_is_not_there_knows_nothing(tmp_path: Path) -> None:
    assert known(tmp_path / "none.duckdb", [request().request_key]) == (set(), set())
    assert history(tmp_path / "none.duckdb", "m").answers == 0
    assert not list(tmp_path.iterdir())


def test_many_questions_are_looked_up_in_flat_memory(tmp_path: Path) -> None:
    def endless(total: int) -> Iterator[Request]:
        for i in range(total):
            body = {"messages": [{"role": "user", "content": f"{i} " + "x" * 1000}], "max_tokens": 2}
            yield Request(purpose="sample", prompt_id="p", body=body)

    config = ScriptedTeacherConfig()
    tracemalloc.start()
    found = count(endless(3 * CHUNK), tmp_path / "none.duckdb", config, 0.25)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.questions, found.longest) == (3 * CHUNK, 6 * CHUNK)
    assert peak < 3000 * 2 * CHUNK  # two chunks at most


def test_plan_counts_the_calls_of_forced_decoding(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--onpolicy.algorithm", "{name: score}", "--teacher.capabilities", "{scoring: forced}"]
    assert planned(project_file, capsys, *flags)["onpolicy"]["questions"] == 2 * 3 * (8 + 1)
