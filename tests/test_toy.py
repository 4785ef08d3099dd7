"""A world with a known optimum: every algorithm, as a whole run, moves the student towards the teacher.

Before and after are exact sums over all answers (tests/toy.py), not estimates. The student has to come nearer than
anybody can who does not look at the question (`blind`). Each algorithm is run once more with a teacher that answers
the other question (`SWAPPED`): then it must not, else the test would prove nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms import algorithms
from blackbox_kd.sections import StudentConfig
from blackbox_kd.student.render import Renderer
from blackbox_kd.student.student import Student
from blackbox_kd.teachers.scores import prompt_tokens
from tests.fakes import FakeAPI, served
from tests.toy import (
    ANSWERS,
    END,
    LONGEST,
    PROMPTS,
    SWAPPED,
    TEACHER,
    WRONG,
    Distance,
    blind,
    distance,
    make_student,
)
from tests.toy_teacher import ToyEndpoint

ROUNDS = 3


class Line(NamedTuple):
    """One algorithm in one setting."""

    algorithm: dict[str, Any]
    falls: str
    """The part of `Distance` that its objective drives down."""
    flags: dict[str, Any] = {}
    """What else it needs in the config, by dotted key."""


SAME_JUDGE = {"judge": {"same_as": "teacher", "model": "judge"}}


def few_large_steps(prompts: int, learning_rate: float) -> dict[str, Any]:
    """For policy gradients: what a handful of draws says is mostly noise, and many small steps on it lead astray."""
    update = {"batch_size": 64, "micro_batch_size": 64, "num_epochs": 2, "learning_rate": learning_rate}
    return {"onpolicy.prompts_per_round": prompts, **{f"onpolicy.update.{k}": v for k, v in update.items()}}


LINES = {
    # cross entropy on the teacher's draws, whose gradient is that of the forward KL
    "relabel rewrite": Line(
        {"name": "relabel", "template": "rewrite.md.j2", "max_completion_length": LONGEST}, "forward"
    ),
    "relabel afresh": Line(
        {"name": "relabel", "mode": "afresh", "worst_fraction": 1.0, "max_completion_length": LONGEST}, "forward"
    ),
    # the teacher's whole distribution behind the student's own beginnings. The first sign, where `prefix` never cuts,
    # is left to replayed rows: without them the end that is learnt behind it comes up there too (2% -> 17%)
    "prefix alone": Line({"name": "prefix", "cuts": 2, "within": 1.0, "max_completion_length": LONGEST}, "behind"),
    "prefix": Line(
        {"name": "prefix", "cuts": 2, "within": 1.0, "max_completion_length": LONGEST},
        "forward",
        {"onpolicy.replay": 0.25},
    ),
    "forks": Line({"name": "forks"}, "forward"),
    # its anchor is that cross entropy; DPO alone only orders the two answers of a pair
    "preference snapshot": Line({"name": "preference"}, "forward"),
    "preference fresh": Line({"name": "preference", "rejected": "fresh"}, "forward"),
    # raises sum_y q(y) log p(y), the reverse KL but for the student's own entropy. Alone that proves little: one answer
    # that suits both questions has a good value, whoever gave the grades
    "reward best of n": Line(
        {"name": "reward", "grades": "rubric", "update": "best_of_n"},
        "reverse",
        {**SAME_JUDGE, "onpolicy.prompts_per_round": 64},
    ),
    "reward pg": Line(
        {"name": "reward", "grades": "digits", "update": "pg"}, "reverse", {**SAME_JUDGE, **few_large_steps(128, 2e-3)}
    ),
    # its gradient is that of the reverse KL, estimated on the student's draws
    "score pg": Line({"name": "score"}, "reverse", few_large_steps(200, 5e-3)),
    # the teacher shows all of its three tokens, so this is the whole divergence at the student's own prefixes
    "score kl": Line({"name": "score", "loss": "kl"}, "reverse"),
    # rewards of a Bradley-Terry discriminator estimate log p_teacher - log p_student: the gradient of the reverse KL
    "gad": Line(
        {
            "name": "gad",
            "num_generations": 4,
            "discriminator": {"warmup_steps": 120, "steps": 40, "learning_rate": 3e-3, "batch_size": 16},
        },
        "reverse",
        # the start tells the kinds apart as the teacher does. The student of the swapped one first learns what both
        # kinds have in common, so it passes below the bound before it takes each for the other; in three rounds of
        # noisy rewards it got that far on one processor and not on another, in six it did on both
        {"onpolicy.rounds": 6, **few_large_steps(200, 2e-3)},
    ),
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


@pytest.fixture(scope="module")
def renderer(student: Path) -> Renderer:
    return Student(StudentConfig(model=str(student), device="cpu")).renderer


@pytest.fixture(scope="module", params=["teacher", "swapped"])
def world(
    request: pytest.FixtureRequest, student: Path, renderer: Renderer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder, honest = tmp_path_factory.mktemp(request.param), request.param == "teacher"
    shutil.copytree(student, folder / "student")
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "rewrite.md.j2").write_text("{{ prompt }} instead of {{ draft }}")
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
        "student": {"model": "student", "device": "cpu", "lora": {"r": 8, "lora_alpha": 16}},
        # a stage that changes nothing: what falls afterwards, the algorithm brought down
        "sft": {"dev_fraction": 0, "trainer": {"learning_rate": 1e-12, "max_steps": 1}},
        "onpolicy": {
            "algorithm": {"name": "relabel"},
            "rounds": ROUNDS,
            "prompts_per_round": 128,
            "max_completion_length": LONGEST,
            "rollout_batch_size": 128,
            "replay": 0,
            "update": {"batch_size": 16, "micro_batch_size": 16, "num_epochs": 3, "learning_rate": 3e-3},
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
        arguments += [part for key, value in line.flags.items() for part in (f"--{key}", json.dumps(value))]
        assert main(["onpolicy", "--config", "project.yaml", "--debug", *arguments]) == 0
        end = measured(run, f"round-{line.flags.get('onpolicy.rounds', ROUNDS)}")
    moved = {part: f"{a:.3f} -> {b:.3f}" for part, a, b in zip(end._fields, world.start, end, strict=True)}
    print(f"\n{world.folder.name}, {name}: {moved}")
    start, now, limit = (getattr(each, line.falls) for each in (world.start, end, blind()))
    assert start > 1.5 * limit
    # the other teacher's student may end at the limit: what the two have in common is learnt from either
    assert now < 0.8 * limit if world.honest else now > 0.9 * limit, moved
    assert end.astray < 0.2


def test_the_distance_is_0_where_both_speak_alike(student: Path) -> None:
    learnt = distance(Student(StudentConfig(model=str(student), device="cpu")), WRONG)
    assert max(learnt.forward, learnt.reverse, learnt.astray) < 0.02
    p = [
        sum(math.exp(language.logprob(prompt, y)) for y in ANSWERS) for language in (TEACHER, WRONG) for prompt in "xy"
    ]
    assert p == pytest.approx([1.0] * 4)


def ask(renderer: Renderer, *messages: str, **more: Any) -> Any:
    roles = itertools.cycle(["user", "assistant"])
    asked = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]
    body = {"model": "toy", "messages": asked, "max_tokens": LONGEST, "seed": 3, **more}
    return ToyEndpoint(TEACHER, renderer)(body, None)


def test_the_teacher_draws_what_it_shows(renderer: Renderer) -> None:
    drawn = ask(renderer, "x07", n=4000, logprobs=True, top_logprobs=20)["choices"]
    begun = [choice["logprobs"]["content"][0] for choice in drawn]
    for top in begun[0]["top_logprobs"]:
        share = sum(token["token"] == top["token"] for token in begun) / len(drawn)
        assert share == pytest.approx(math.exp(top["logprob"]), abs=0.03)
    same = [ask(renderer, "x07", seed=seed)["choices"][0]["message"]["content"] for seed in (1, 1, 2, 3, 4, 5)]
    assert same[0] == same[1]
    assert len(set(same)) > 1
    assert text_of(ask(renderer, "x07", temperature=0)) == "+-"


def test_the_teacher_goes_on_with_what_it_is_given(renderer: Renderer) -> None:
    (choice,) = ask(renderer, "y07", "-", max_tokens=1, logprobs=True, top_logprobs=20)["choices"]
    shown = {top["token"]: math.exp(top["logprob"]) for top in choice["logprobs"]["content"][0]["top_logprobs"]}
    assert shown == pytest.approx(TEACHER.next("y", "-"))


@pytest.mark.parametrize("form", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
def test_the_teacher_scores_what_it_is_given(form: dict[str, Any], renderer: Renderer) -> None:
    scored = prompt_tokens(ask(renderer, "y07", "-+", prompt_logprobs=20, **form))
    start = len(renderer.prompt([{"role": "user", "content": "y07"}])) - 1  # the first token has no entry
    answer = scored[start:][: 2 if form else 3]
    assert [token.token for token in answer] == ["-", "+", END][: len(answer)]
    assert sum(t.logprob for t in answer) == pytest.approx(TEACHER.logprob("y", ("-", "+", END)[: len(answer)]))
    assert [token.id for token in answer] == renderer.completion("-+")[: len(answer)]


def test_the_teacher_grades_by_how_likely_an_answer_is(renderer: Renderer) -> None:
    answers = "".join(f"<answer_{i}>\n{text}\n</answer_{i}>\n" for i, text in enumerate(("+-", "*-", "?"), 1))
    criteria = json.loads(text_of(ask(renderer, "A rubric for x07. Reply with JSON only")))["criteria"]
    lines = "".join(f"{i}. {line['criterion']}\n" for i, line in enumerate(criteria, 1))
    grades = json.loads(text_of(ask(renderer, f"x07\n{answers}Reply with JSON only")))
    assert list(grades.values()) == [8, 3, 0]
    met = json.loads(text_of(ask(renderer, f"x07\n{answers}{lines}Reply with JSON only")))
    assert [sum(row) for row in met.values()] == [6, 2, 0]
    assert all(len(row) == len(criteria) for row in met.values())


def text_of(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def test_every_algorithm_has_a_line() -> None:
    registered = {config.model_fields["name"].default for config in algorithms()} - {"auto"}  # one of the others
    assert registered == {line.algorithm["name"] for line in LINES.values()}
