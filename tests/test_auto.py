"""`algorithm: auto`: the choice follows the study at equal spend and what the budget allows, and is the same again."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from algorithms import VARIANTS
from equal_spend import ARMS, RESULTS, SPENDS

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.auto import AutoConfig
from blackbox_kd.command import overrides
from blackbox_kd.config import load_config
from blackbox_kd.project import Project, affordable
from blackbox_kd.prompts import PromptSet
from blackbox_kd.settings import Config
from blackbox_kd.teachers.budget import MESSAGE_TOKENS

WORST = len("Say train 0") + 2 * MESSAGE_TOKENS + 16
"""Tokens of a call at most: a byte each, and the longest answer."""
AUTO = ["--onpolicy.algorithm", "{name: auto, max_completion_length: 16}"]


@pytest.mark.parametrize(
    ("calls", "chosen"), [(None, "relabel"), (32, "relabel"), (31, "preference"), (-5, "preference")]
)
def test_new_answers_where_the_budget_pays_for_them(calls: int | None, chosen: str) -> None:
    algorithm, why = AutoConfig().resolve(2, 32, 0, lambda: calls)
    assert algorithm.name == chosen
    assert ("its 32 calls are more than the" in why) == (chosen == "preference")


def test_what_would_take_no_less_is_no_way_out() -> None:
    """Preference asks about each prompt that `sample` has not answered."""
    assert AutoConfig().resolve(2, 40, 56, lambda: 38)[0].name == "relabel"
    assert AutoConfig().resolve(2, 40, 39, lambda: 38)[0].name == "preference"
    assert AutoConfig().resolve(2, 1, 0, lambda: 1)[0].name == "preference"  # of one rollout a round one is asked about


def test_the_choice_is_between_the_best_of_the_study() -> None:
    """The two on-policy arms nearest to the teacher, on average over the spends that all of them have."""
    reached: dict[str, dict[int, list[float]]] = {}
    for row in json.loads((RESULTS / "equal_spend.json").read_text())["rows"]:
        reached.setdefault(row["arm"], {}).setdefault(row["spend"], []).append(row["metrics"]["true_kl"])
    loops = {arm: by for arm, by in reached.items() if ARMS[arm].algorithm and SPENDS[0] in by}
    spends = set.intersection(*(set(by) for by in loops.values()))
    best = sorted(loops, key=lambda arm: fmean(fmean(loops[arm][spend]) for spend in spends))[:2]
    candidates = AutoConfig(max_completion_length=40).candidates
    assert sorted(best) == ["preference:fresh", "relabel:afresh"]
    for arm, chosen in zip(sorted(best, reverse=True), candidates, strict=True):
        variant = VARIANTS[arm]
        assert {key: getattr(chosen, key) for key in variant} == variant


@pytest.mark.parametrize(
    ("caps", "afforded"),
    [
        ({}, None),
        ({"max_requests": 9}, 9),
        ({"max_tokens": 1000}, 1000 // WORST),
        ({"max_usd": 0.5}, 500_000 // WORST),
        ({"max_usd": 0.5, "max_requests": 3}, 3),
    ],
)
def test_every_cap_is_so_many_calls(project_file: Path, caps: dict[str, float], afforded: int | None) -> None:
    flags = [("budget", json.dumps(caps)), ("teacher.price", "{input: 1, output: 1}")]
    config = load_config(Config, str(project_file), flags)
    assert affordable(config, PromptSet(config.prompts)) == afforded


def test_its_replies_are_as_long_as_it_is_told() -> None:
    algorithm, _ = AutoConfig(max_completion_length=9).resolve(1, 1, 0, lambda: None)
    assert algorithm.reply_tokens == 9


def test_a_run_makes_the_same_choice_again(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--config", str(project_file), *AUTO, "--teacher.capabilities", "{scoring: none}"]
    command += ["--onpolicy.update.learning_rate", "null"]
    assert main([*command, "--onpolicy.rounds", "1"]) == 0
    said = capsys.readouterr().err
    assert "onpolicy.algorithm auto: relabel afresh" in said
    assert "probing" not in said
    assert main([*command, "--onpolicy.rounds", "2"]) == 0
    assert "onpolicy.algorithm auto: relabel, as in the rounds before" in capsys.readouterr().err
    assert (project_file.parent / "run" / "checkpoints" / "round-2").exists()


def test_the_learning_rate_is_that_of_the_algorithm(project_file: Path) -> None:
    free = ["--onpolicy.update.learning_rate", "null"]
    for flags, rate in ((AUTO, 1e-4), ([*AUTO, "--budget.max_requests", "23"], 1e-5)):
        with Project(load_config(Config, str(project_file), overrides([*flags[:2], *free, *flags[2:]]))) as project:
            assert project.config.onpolicy.update.learning_rate == rate
        assert load_config(Config, str(project.run_dir.path / "config.yaml"), []).onpolicy.update.learning_rate == rate


def test_plan_counts_what_it_would_choose(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, chosen, questions in (([], "relabel", 2 * 2), (["--max-requests", "23"], "preference", 0)):
        assert main(["plan", "--config", str(project_file), *AUTO, "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["algorithm"].startswith(f"{chosen} ")
        (stage,) = (stage for stage in found["stages"] if stage["stage"] == "onpolicy")
        assert stage["questions"] == questions


def test_what_the_choice_among_answers_takes_is_not_left_for_the_loop(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*AUTO, "--sample.n", "2", "--max-requests", "32"]
    graded = ["--judge", "{provider: scripted, model: judge}", "--curate.best_of_n", "drop"]
    for more, chosen in ((graded, "preference"), ([], "relabel")):
        assert main(["plan", "--config", str(project_file), *flags, *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["algorithm"].startswith(f"{chosen} ")


def test_a_higher_cap_goes_on_with_what_was_chosen(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--config", str(project_file), *AUTO, "--onpolicy.update.learning_rate", "null"]
    assert main([*command, "--max-tokens", str(23 * WORST)]) in (0, 4)
    assert "preference over fresh samples; not relabel afresh (" in capsys.readouterr().err
    higher = ["--max-tokens", str(200 * WORST), "--onpolicy.rounds", "3"]
    assert main(["plan", *command[1:], *higher, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["algorithm"] == "preference, as in the rounds before"
    assert main([*command, *higher]) == 0
    assert "preference, as in the rounds before" in capsys.readouterr().err
    assert (project_file.parent / "run" / "checkpoints" / "round-3").exists()
