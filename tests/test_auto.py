"""`algorithm: auto`: the choice follows what the endpoint can do and what the budget allows, and is the same again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.auto import AutoConfig
from blackbox_kd.command import overrides
from blackbox_kd.config import load_config
from blackbox_kd.corpus import query
from blackbox_kd.probe import ensure
from blackbox_kd.project import Project, affordable
from blackbox_kd.prompts import PromptSet
from blackbox_kd.settings import Config
from blackbox_kd.teachers.base import Capabilities
from blackbox_kd.teachers.budget import MESSAGE_TOKENS

WORST = len("Say train 0") + 2 * MESSAGE_TOKENS + 16
"""Tokens of a call at most: a byte each, and the longest answer."""
AUTO = ["--onpolicy.algorithm", "{name: auto, max_completion_length: 16}"]


@pytest.mark.parametrize(
    ("can", "chosen", "said"),
    [
        ({"scoring": "echo", "n_max": 2}, "score", "score; runner-up relabel; not forks ("),
        ({"prefill": "prefix", "top_logprobs_max": 20}, "forks", "forks; runner-up prefix; not score ("),
        ({"prefill": "prefix"}, "prefix", "prefix; runner-up relabel; not score ("),
        (
            {"scoring": "forced", "n_max": 2},
            "relabel",
            "relabel; runner-up preference; not score (it would take 41 calls",
        ),
        ({"n_max": 2}, "relabel", "relabel; runner-up preference; not score ("),
    ],
)
def test_the_strongest_that_the_endpoint_serves(can: dict[str, Any], chosen: str, said: str) -> None:
    algorithm, why = AutoConfig().resolve(Capabilities(**can), 64, 40, lambda: None)
    assert algorithm.name == chosen
    assert why.startswith(said)


@pytest.mark.parametrize(("calls", "chosen"), [(256, "forks"), (255, "prefix"), (63, "preference"), (-5, "preference")])
def test_the_strongest_that_the_budget_pays_for(calls: int, chosen: str) -> None:
    algorithm, why = AutoConfig().resolve(Capabilities(prefill="prefix", top_logprobs_max=20), 64, 40, lambda: calls)
    assert algorithm.name == chosen
    assert ("its 256 calls are more than the" in why) == (chosen != "forks")


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


def test_plan_counts_the_calls_of_forced_decoding(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--onpolicy.algorithm", "{name: score}", "--teacher.capabilities", "{scoring: forced}"]
    assert main(["plan", "--config", str(project_file), *flags, "--json"]) == 0
    (stage,) = (s for s in json.loads(capsys.readouterr().out)["stages"] if s["stage"] == "onpolicy")
    assert stage["questions"] == 2 * 3 * (8 + 1)


def test_its_replies_are_as_long_as_it_is_told() -> None:
    algorithm, _ = AutoConfig(max_completion_length=9).resolve(Capabilities(prefill="prefix"), 1, 40, lambda: None)
    assert algorithm.reply_tokens == 9


def test_a_run_probes_first_and_makes_the_same_choice_again(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = ["--teacher.capabilities", "{scoring: none}"]
    command = ["run", "--config", str(project_file), *AUTO, *blank]
    assert main([*command, "--onpolicy.rounds", "1"]) == 0
    said = capsys.readouterr().err
    assert "probing scripted" in said
    assert "onpolicy.algorithm auto: " in said
    corpus = project_file.parent / "run" / "corpus.duckdb"
    calls = "select count(*) from attempts join requests using (request_key) where purpose = 'probe'"
    probed = query(corpus, calls)[1]
    assert probed > [(0,)]
    assert main([*command, "--onpolicy.rounds", "2"]) == 0
    assert query(corpus, calls)[1] == probed
    assert (project_file.parent / "run" / "checkpoints" / "round-2").exists()


def test_what_another_run_has_probed_meanwhile_counts(project_file: Path) -> None:
    blank = [*AUTO, "--teacher.capabilities", "{scoring: none}"]
    other = ["--run_dir", str(project_file.parent / "other")]
    other += ["--corpus", str(project_file.parent / "run" / "corpus.duckdb")]
    with (
        Project(load_config(Config, str(project_file), overrides(blank))) as ours,
        Project(load_config(Config, str(project_file), overrides([*blank, *other]))) as theirs,
    ):
        theirs.teacher.set_capabilities({"prefill": ("prefix", "tried")})
        asyncio.run(ensure(ours))
        assert ours.config.onpolicy.algorithm.name == "prefix"
        assert ours.corpus.rows("SELECT count(*) FROM attempts") == [(0,)]


def test_plan_counts_what_it_would_choose(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    able = ["--teacher.capabilities", "{prefill: prefix, top_logprobs_max: 20}"]
    for flags, chosen, questions in ((able, "forks", 2 * 3 * 4), ([*able, "--max-requests", "32"], "prefix", 2 * 3)):
        assert main(["plan", "--config", str(project_file), *AUTO, *flags[:2], "--json", *flags[2:]]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["algorithm"].startswith(f"{chosen}; ")
        (stage,) = (stage for stage in found["stages"] if stage["stage"] == "onpolicy")
        assert stage["questions"] == questions


def test_what_the_choice_among_answers_takes_is_not_left_for_the_loop(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*AUTO, "--teacher.capabilities", "{prefill: prefix}", "--sample.n", "2", "--max-requests", "32"]
    graded = ["--judge", "{provider: scripted, model: judge}", "--curate.best_of_n", "drop"]
    for more, chosen in ((graded, "preference"), ([], "prefix")):
        assert main(["plan", "--config", str(project_file), *flags, *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["algorithm"].startswith(f"{chosen}; ")


def test_a_higher_cap_goes_on_with_what_was_chosen(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--config", str(project_file), *AUTO, "--teacher.capabilities", "{n_max: 2}"]
    assert main([*command, "--max-tokens", str(24 * WORST)]) in (0, 4)
    assert "preference; not" in capsys.readouterr().err
    assert main([*command, "--max-tokens", str(200 * WORST), "--onpolicy.rounds", "3"]) == 0
    assert "preference, as in the rounds before" in capsys.readouterr().err
    assert (project_file.parent / "run" / "checkpoints" / "round-3").exists()
