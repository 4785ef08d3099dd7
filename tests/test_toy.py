"""A world with a known optimum: every algorithm, as a whole run, moves the student towards the teacher.

Before and after are exact sums over all answers (tests/toy.py), not estimates. Each algorithm is run once more with a
teacher that answers the other question (`SWAPPED`): then the same number must fall by less than half of what is asked
for, else it would prove nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms import algorithms
from blackbox_kd.config import StudentConfig
from blackbox_kd.student.student import Student
from tests.fakes import FakeAPI, served
from tests.toy import LONGEST, PROMPTS, SWAPPED, TEACHER, Distance, distance, make_student
from tests.toy_teacher import ToyEndpoint

ROUNDS = 3


class Line(NamedTuple):
    """One algorithm in one setting."""

    algorithm: dict[str, Any]
    falls: str
    """The part of `Distance` that its objective drives down."""
    to: float
    """At most this share of what it was."""
    onpolicy: dict[str, Any] = {}


LINES = {
    # cross entropy on the teacher's draws: its gradient is that of the forward KL
    "relabel rewrite": Line({"name": "relabel", "template": "rewrite.md.j2", "max_completion_length": LONGEST}, "forward", 0.5),
    "relabel afresh": Line(
        {"name": "relabel", "mode": "afresh", "worst_fraction": 1.0, "max_completion_length": LONGEST}, "forward", 0.5
    ),
    "preference snapshot": Line({"name": "preference"}, "forward", 0.5),
    "preference fresh": Line({"name": "preference", "rejected": "fresh"}, "forward", 0.5),
}


class World(NamedTuple):
    """A project whose student has met its teacher's answers, and has learnt nothing from them."""

    folder: Path
    """Where its commands are run: a path in the config would be part of what is asked, and of the training order."""
    honest: bool
    start: Distance


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("toy-student"))


@pytest.fixture(scope="module", params=["teacher", "swapped"])
def world(request: pytest.FixtureRequest, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, honest = tmp_path_factory.mktemp(request.param), request.param == "teacher"
    shutil.copytree(student, folder / "student")
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "rewrite.md.j2").write_text("{{ prompt }} instead of {{ draft }}")
    renderer = Student(StudentConfig(model=str(student), device="cpu")).renderer
    with served(FakeAPI(ToyEndpoint(TEACHER if honest else SWAPPED, renderer))) as api, chdir(folder):
        Path("project.yaml").write_text(yaml.safe_dump(project(api.url)))
        for stage in ("sample", "sft"):
            assert main([stage, "--config", "project.yaml", "--debug"]) == 0
        start = measured("run", "sft")
        yield World(folder, honest, start)


def project(url: str) -> dict[str, Any]:
    can = {"top_logprobs_max": 20, "has_bytes": True, "scoring": "prompt_logprobs", "prefill": "assistant_last"}
    teacher = {"provider": "openai", "model": "toy", "api_key_env": None, "base_url": url, "capabilities": can}
    return {
        "seed": 1,
        "run_dir": "run",
        "prompts": {"path": "train.jsonl"},
        "teacher": teacher,
        "sample": {"max_prompts": 128, "max_completion_length": LONGEST},
        "student": {"model": "student", "device": "cpu", "lora": {"r": 8}},
        # a stage that changes nothing: what falls afterwards, the algorithm brought down
        "sft": {"dev_fraction": 0, "trainer": {"learning_rate": 1e-12, "max_steps": 1}},
        "onpolicy": {
            "algorithm": {"name": "relabel"},
            "rounds": ROUNDS,
            "prompts_per_round": 128,
            "max_completion_length": LONGEST,
            "rollout_batch_size": 128,
            "replay": 0,
            "update": {"batch_size": 8, "num_epochs": 2, "learning_rate": 2e-3},
        },
        "evaluate": {"every_steps": None},
    }


def measured(run: str, checkpoint: str) -> Distance:
    config = yaml.safe_load(Path("project.yaml").read_text())["student"]
    return distance(Student(StudentConfig(**config), adapter=Path(run, "checkpoints", checkpoint)))


@pytest.mark.parametrize("name", LINES)
def test_the_student_moves_towards_the_teacher_it_learns_from(name: str, world: World) -> None:
    line, run = LINES[name], name.replace(" ", "-")
    with chdir(world.folder):
        shutil.copytree("run", run)
        arguments = ["--run_dir", run, "--onpolicy.algorithm", json.dumps(line.algorithm)]
        for key, value in line.onpolicy.items():
            arguments += [f"--onpolicy.{key}", str(value)]
        assert main(["onpolicy", "--config", "project.yaml", "--debug", *arguments]) == 0
        end = measured(run, f"round-{ROUNDS}")
    moved = {name: f"{a:.3f} -> {b:.3f}" for name, a, b in zip(Distance._fields, world.start, end, strict=True)}
    print("MOVED", world.folder.name, name, moved)
    ratio = getattr(end, line.falls) / getattr(world.start, line.falls)
    assert ratio <= line.to if world.honest else ratio > (1 + line.to) / 2, moved
    assert end.astray < 0.1


def test_every_algorithm_has_a_line() -> None:
    registered = {config.model_fields["name"].default for config in algorithms()}
    assert registered == {line.algorithm["name"] for line in LINES.values()}
