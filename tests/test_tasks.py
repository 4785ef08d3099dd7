"""Hold-back tasks under real, tiny checkpoints: pairs with the base model, and a gate that a damaged one fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blackbox_kd.__main__ import main
from blackbox_kd.checkers import Choice
from blackbox_kd.config import load_config
from blackbox_kd.corpus import query
from blackbox_kd.errors import AlignmentError, ConfigError, GateFailed
from blackbox_kd.evaluate import writer
from blackbox_kd.project import Project
from blackbox_kd.sections import EvaluateConfig
from blackbox_kd.settings import Config
from blackbox_kd.student.student import Student
from blackbox_kd.tasks import AgainstBase, Tasks, gates, passed
from blackbox_kd.types import Prompt

# Numbers by hand


def test_a_drop_is_over_pairs_and_the_first_scores_are_the_base_models() -> None:
    against = AgainstBase(200)
    base = against.metrics({"t": [1, 1, 0, 0]})["holdback"]
    assert (base["task_t"].value, base["task_t_drop"].value, base["task_t_drop"].hi) == (0.5, 0, 0)
    found = against.metrics({"t": [1, 0, 0, 0]})["holdback"]
    assert (found["task_t"].value, found["task_t_drop"].value) == (0.25, 0.25)
    swapped = against.metrics({"t": [0, 0, 1, 1]})["holdback"]["task_t_drop"]
    assert (swapped.value, swapped.lo < 0 < swapped.hi) == (0, True)  # other answers, as many right ones


def test_no_task_is_no_metric_and_other_questions_are_an_error() -> None:
    against = AgainstBase(200)
    assert against.metrics({}) == {}
    against.metrics({"t": [1, 1]})
    with pytest.raises(AlignmentError, match="task t: 1 answers, the base model gave 2"):
        against.metrics({"t": [1]})


def drop(value: float) -> dict[str, Any]:
    return {"task_t_drop": {"value": value, "lo": value - 0.1, "hi": value + 0.1}}


@pytest.mark.parametrize(("value", "ok"), [(0.1, True), (3 * 0.1 - 0.2, True), (0.1001, False), (-0.5, True)])
def test_the_gate_fails_by_the_point_estimate_beyond_its_limit(value: float, ok: bool) -> None:
    assert gates({"t": 0.1}, "round-1", drop(value))["t"]["passed"] is ok


def test_a_failed_gate_says_task_drop_limit_checkpoint_and_what_to_do() -> None:
    summary = {"gate": gates({"t": 0.1}, "round-2", drop(0.25))}
    with pytest.raises(GateFailed) as raised:
        passed(summary)
    said = str(raised.value)
    assert said.startswith(
        "gate: task t: round-2 drops by 0.25 [0.15, 0.35] from base, the limit is 0.1. Use an earlier"
    )
    assert "\n" not in said
    passed({"gate": gates({"t": 0.3}, "round-2", drop(0.25))})
    passed({})


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"gate": {"everyday": 0.1}}, "gate: there is no task 'everyday' (known: none)"),
        ({"gate": {"x": 0.1}, "tasks": {"t": "f"}, "lm_eval": {"tasks": ["arc_easy"]}}, "(known: t, arc_easy)"),
        ({"gate": {"t": 1.5}, "tasks": {"t": "f"}}, "evaluate.gate.t: should be less than or equal to 1, it is 1.5"),
        ({"tasks": {"t_drop": "f", "t": "f"}}, "task 't_drop': so the drop of another one is called; rename it"),
        ({"tasks": {"t": "f"}, "lm_eval": {"tasks": ["t_drop"]}}, "task 't_drop'"),
        ({"tasks": {"t": "f"}, "lm_eval": {"tasks": ["t"]}}, "'t' is a task in tasks and in lm_eval.tasks"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(project_file: Path, evaluate: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(Config, str(project_file), [("evaluate", json.dumps(evaluate))])
    assert said in str(raised.value)


# Under checkpoints

BIASED = '{provider: scripted, model: other, reply: \'{"better": "answer_1"}\'}'
CHOICES = ("one", "two", "three four five")


@pytest.fixture
def forgetful(project_file: Path, write_jsonl: Callable[..., Path]) -> list[str]:
    """`evaluate` with a task that the base model answers right, and a checkpoint whose weights are damaged."""
    with Project(load_config(Config, str(project_file))) as project:
        student = Student(project.config.student)
        prompts = project.prompts["holdback"]
        rows = [
            {"prompt": prompt.text, "checker": "exact", "answer": answer.text}
            for prompt, answer in writer(project, student, "base", 0.0).answers(prompts)
        ]
        taken = Choice(choices=list(CHOICES), answer="one").taken(sums(student, prompts[0]))
        rows.append({"prompt": prompts[0].text, "checker": "choice", "choices": CHOICES, "answer": taken})
        with torch.no_grad(), project.run_dir.committing("sft", project.settings_of("sft")) as folder:
            for name, weight in student.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
            student.save(folder)
    task = write_jsonl("mine.jsonl", rows)
    return ["--config", str(project_file), "--evaluate.tasks", f"{{mine: {task}}}", "--evaluate.judge", BIASED]


def sums(student: Student, prompt: Prompt) -> list[float]:
    """Nats of each choice behind the prompt, from the whole sequence and not from the student's own rows."""
    found = []
    for choice in CHOICES:
        before, text = student.renderer.prompt(prompt.messages), student.tokenizer(choice)["input_ids"]
        with torch.no_grad():
            logits = student.model(torch.tensor([[*before, *text]])).logits[0, len(before) - 1 : -1]
        found.append(float(logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum()))
    return found


def values(project_file: str, name: str) -> dict[tuple[str, str], float]:
    """(checkpoint, split) -> value of a metric."""
    corpus = Path(project_file).parent / "run" / "corpus.duckdb"
    rows = query(corpus, f"SELECT checkpoint, split, value FROM leaderboard WHERE name = '{name}'")[1]
    return {(checkpoint, split): value for checkpoint, split, value in rows}


def test_a_checkpoint_that_forgets_fails_its_gate_with_5_when_all_is_written(
    forgetful: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *forgetful, "--evaluate.gate", "{mine: 0.2}"]) == 5
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1].startswith("error: gate: task mine: sft drops by ")
    assert "task_mine_drop" in said.out
    assert "gate      FAILED: task mine: sft drops by " in said.out

    file = forgetful[1]
    right, drops = values(file, "task_mine"), values(file, "task_mine_drop")
    assert right["base", "holdback"] == 1
    assert drops["base", "holdback"] == 0
    assert right["sft", "holdback"] < 0.8
    assert drops["sft", "holdback"] == 1 - right["sft", "holdback"]
    summary = json.loads((Path(file).parent / "run" / "summary.json").read_text())
    gate = summary["gate"]["mine"]
    assert (gate["checkpoint"], gate["limit"], gate["passed"]) == ("sft", 0.2, False)
    assert gate["lo"] <= gate["drop"] == drops["sft", "holdback"] <= gate["hi"]
    assert {row["split"] for row in summary["teacher"]} == {"heldout", "ood"}

    # the teacher is measured, too, and a judge that prefers a place finds no winner
    assert values(file, "entropy").keys() == {(c, s) for c in ("base", "sft", "teacher") for s in ("heldout", "ood")}
    assert set(values(file, "win_rate_vs_teacher").values()) == {0.5}
    assert values(file, "win_rate_vs_previous").keys() == {("sft", "heldout"), ("sft", "ood")}

    # within its limit it passes, and nothing is asked again
    asked = query(Path(file).parent / "run" / "corpus.duckdb", "SELECT count(*) FROM attempts")[1]
    assert main(["evaluate", *forgetful, "--evaluate.gate", "{mine: 1}"]) == 0
    assert "gate      passed: task mine" in capsys.readouterr().out
    assert query(Path(file).parent / "run" / "corpus.duckdb", "SELECT count(*) FROM attempts")[1] == asked

    # base and sft beside the teacher, sft beside base: both orders of 7 prompts each
    assert main(["plan", *forgetful, "--onpolicy.rounds", "0", "--json"]) == 0
    stages = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    assert (stages["win_rate"]["questions"], stages["win_rate"]["to_ask"]) == (42, 0)


@pytest.mark.parametrize("command", ["evaluate", "plan", "run"])
def test_a_wrong_row_is_named_before_anything_is_loaded_or_asked(
    project_file: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    task = write_jsonl("task.jsonl", [{"prompt": "Say a.", "checker": "exakt", "answer": "a"}])
    flags = ["--evaluate.tasks", f"{{letters: {task}}}", "--student.model", "no/such/model"]
    assert main([command, "--config", str(project_file), *flags]) == 2
    assert f"error: {task}:1: checker 'exakt' is none of" in capsys.readouterr().err
    assert not (project_file.parent / "run").exists()


def test_a_question_that_is_too_long_is_left_out(
    project_file: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    long, choice = "Say " * 300, {"checker": "choice", "choices": ["a", "b"], "answer": "a"}
    rows = [
        {"prompt": "Say a.", "checker": "regex", "answer": ""},
        {"prompt": long, "checker": "regex", "answer": ""},
        {"prompt": long, **choice},
        {"prompt": "Say b.", **choice},
    ]
    tasks = Tasks(EvaluateConfig(tasks={"letters": str(write_jsonl("task.jsonl", rows))}))
    with Project(load_config(Config, str(project_file), [("student.max_length", "256")])) as project:
        student = Student(project.config.student)
        assert len(tasks.scores(writer(project, student, "base", 0.0))["letters"]) == 2
    assert "1 prompts are longer than student.max_length allows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "checker", [{"checker": "regex", "answer": ""}, {"checker": "choice", "choices": ["a", "b"], "answer": "a"}]
)
def test_a_task_of_too_long_questions_is_named_before_anything_is_paid(
    project_file: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str], checker: dict[str, Any]
) -> None:
    task = write_jsonl("task.jsonl", [{"prompt": "Say " * 300, **checker}])
    flags = ["--evaluate.tasks", f"{{letters: {task}}}", "--student.max_length", "128"]
    assert main(["run", "--config", str(project_file), *flags]) == 2
    assert "evaluate.tasks.letters: every question is longer than student.max_length (128)" in capsys.readouterr().err
    assert query(project_file.parent / "run" / "corpus.duckdb", "SELECT count(*) FROM requests")[1] == [(0,)]
