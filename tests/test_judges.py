"""Judges in a project: who they are, that they share the run's budget, and that a gamed one stops it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.reward import RewardConfig
from blackbox_kd.command import overrides
from blackbox_kd.config import load_config
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.corpus.store import Billed
from blackbox_kd.errors import BudgetExhausted, ConfigError, GateFailed
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.teachers.base import PriceConfig
from blackbox_kd.teachers.budget import Amount, Budget, BudgetConfig
from blackbox_kd.teachers.local import LocalTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Usage
from tests.conftest import GGUF, RUN_ID
from tests.fakes import FakeAPI, chat_reply, served
from tests.judges import is_rubric, says
from tests.records import attempt, usage
from tests.rollouts import renderer, rollout, tools
from tests.test_local_teacher import MODEL

__all__ = ["renderer"]  # a fixture

REWARD = ["--onpolicy.algorithm", "{name: reward, update: pg, num_generations: 2, unseen_share: 1.0}"]
SAME = ["--judge", "{same_as: teacher}"]


def loaded(project_file: Path, *flags: str) -> Config:
    return load_config(Config, str(project_file), overrides(flags))


# Who they are


def test_without_a_judge_reward_is_refused_before_anything_is_loaded(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(project_file), "--student.model", "no/such/model"]
    assert main(["onpolicy", *config, *REWARD]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "onpolicy.algorithm reward needs a judge" in line
    assert "judge: {same_as: teacher}" in line
    assert not (project_file.parent / "run").exists()


def test_there_is_no_judge_unless_one_is_named(project_file: Path) -> None:
    config = loaded(project_file)
    assert (config.judge, config.evaluate.judge) == (None, None)
    with Project(config) as project:
        assert project.endpoints == [project.teacher]


def test_same_as_teacher_is_the_teacher_without_its_private_prompt(project_file: Path) -> None:
    (project_file.parent / "rules.md.j2").write_text("Be short.")
    private = ["--teacher.prompt.template", str(project_file.parent / "rules.md.j2"), "--teacher.seed", "7"]
    config = loaded(project_file, *private, "--judge", "{same_as: teacher, concurrency: 2}")
    assert config.judge is not None
    assert config.judge.model_copy(update={"prompt": config.teacher.prompt, "concurrency": 8}) == config.teacher
    assert (config.judge.prompt.template, config.judge.concurrency) == (None, 2)
    with Project(config) as project:
        resolved = project.run_dir.path / "config.yaml"
        assert project.judge is not None
        assert project.judge is not project.teacher
    assert load_config(Config, str(resolved)) == config.model_copy(update={"corpus": config.corpus_path})


def test_a_teacher_that_is_told_to_compare_its_own_answers_does(project_file: Path) -> None:
    config = loaded(project_file, "--evaluate.judge", "{same_as: teacher}")
    assert config.evaluate.judge is not None
    with Project(config) as project:
        again = load_config(Config, str(project.run_dir.path / "config.yaml"))
    assert again.evaluate == config.evaluate  # also where the resolved config spells it out
    assert loaded(
        project_file, "--evaluate", "{judge: {provider: scripted}, judge_is_teacher: true}"
    ).evaluate.judge_is_teacher


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--judge", "{same_as: teachr}"], "judge.same_as: it can only be teacher, it is 'teachr'"),
        (["--evaluate.judge", "{same_as: judge}"], "evaluate.judge.same_as: it can only be teacher, it is 'judge'"),
        (["--judge", "{model: m}"], "judge.provider: this key is required, one of openai, local, scripted"),
        (["--judge", "{provider: scripted, modle: m}"], "unknown key 'judge.modle'; did you mean 'judge.model'?"),
        (["--evaluate.judge.provider", "scriptd"],
         "evaluate.judge.provider: 'scriptd' is none of openai, local, scripted"),
        ([*SAME, "--evaluate.judge", "{same_as: teacher}"],
         "evaluate.judge: 'scripted' is the judge itself; name another model, or none"),
        (["--evaluate.judge", "{provider: scripted, concurrency: 2}"],
         "evaluate.judge: 'scripted' is the teacher itself, which likes its own answers best; name another model, or "
         "say evaluate.judge: {same_as: teacher}"),
        (["--judge", "teacher"], "judge: should be a section with keys of its own, it is a str"),
    ],
)  # fmt: skip
def test_a_wrong_judge_is_one_line(project_file: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(project_file, *flags)
    assert str(raised.value).removeprefix(f"{project_file}: ") == said


def test_a_key_that_a_judge_lacks_is_named_as_its_own(project_file: Path) -> None:
    judge = ["--judge", "{provider: openai, model: m, api_key_env: JUDGE_KEY}"]
    with (
        pytest.raises(ConfigError, match=r"^judge\.api_key_env: environment variable JUDGE_KEY is not set"),
        Project(loaded(project_file, *judge)),
    ):
        pass


def test_another_judge_is_another_experiment(project_file: Path) -> None:
    with Project(loaded(project_file, *REWARD, *SAME)) as project:
        assert "judge" not in project.settings_of("sft")
        first = project.settings_of("round-1")["judge"]
    other = ["--judge", "{provider: scripted, model: another, concurrency: 1}"]
    with Project(loaded(project_file, *REWARD, *other)) as project:
        assert project.settings_of("round-1")["judge"] == first | {"model": "another"}


# What they cost


def test_a_budget_beside_another_has_its_own_price_and_the_same_purse() -> None:
    teacher = Budget(BudgetConfig(max_usd=0.1), PriceConfig(input=1.0, output=10.0))
    judge = teacher.beside(PriceConfig(input=100.0, output=1000.0))
    for budget in (teacher, judge):
        budget.settle(Amount(), attempt(usage=usage(10, 1)))
    assert teacher.spent == judge.spent == Amount(20e-6 + 2000e-6, 22, 2)

    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    asyncio.run(judge.reserve(body, lambda: False))
    assert teacher.reserved == judge.reserved != Amount()
    judge.free(judge.reserved)
    judge.count_history(Billed(cost_usd=0.0999, tokens=0, calls=0, unpriced=Usage(), uncertain=[]))
    with pytest.raises(BudgetExhausted):
        asyncio.run(teacher.reserve(body | {"max_tokens": 20}, lambda: False))


def test_what_nobody_priced_is_counted_at_the_highest_price(corpus: Corpus) -> None:
    teacher = Budget(BudgetConfig(max_usd=1), PriceConfig(input=1.0, output=1.0))
    judge = teacher.beside(PriceConfig(input=3.0, output=3.0))
    billed = corpus.billed(RUN_ID)._replace(unpriced=Usage(prompt_tokens=100), calls=1, tokens=100)
    assert not judge.is_counted
    teacher.count_history(billed)
    assert judge.is_counted
    assert judge.spent == Amount(300e-6, 100, 1)


def test_a_judge_without_a_price_is_named_under_a_cap_in_dollars(project_file: Path) -> None:
    priced = ["--teacher.price", "{input: 1, output: 1}", "--budget.max_usd", "1"]
    with (
        pytest.raises(ConfigError, match=r"set judge\.price"),
        Project(loaded(project_file, *priced, "--judge", "{provider: scripted, model: j}")),
    ):
        pass


# The stage, with judges behind HTTP whose grades depend on the round


class Judge:
    """`handler` of a FakeAPI: the i-th round's answers get `levels[i]` or a little less, by their length."""

    def __init__(self, levels: list[int], groups: int = 3) -> None:
        self.levels, self.groups, self.graded = levels, groups, 0

    def __call__(self, body: dict[str, Any], request: Any) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        if not is_rubric(text):
            self.graded += 1
        level = self.levels[min(len(self.levels), (self.graded + self.groups - 1) // self.groups) - 1]
        return chat_reply(says(text, lambda answer: [i < level - len(answer) % 2 for i in range(4)]))


@pytest.fixture
def run(trained: Path) -> Iterator[Callable[..., int]]:
    """Runs `onpolicy` with two judges; `run.apis` are their servers."""
    with served(FakeAPI()) as first, served(FakeAPI()) as second:

        def go(judge: Judge | None = None, unseen: Judge | None = None, *flags: str) -> int:
            for api, handler in ((first, judge), (second, unseen)):
                if handler:
                    api.handler = handler
            judges = []
            for key, api in (("judge", first), ("evaluate.judge", second)):
                section = {"provider": "openai", "model": key, "api_key_env": None, "base_url": api.url}
                judges += [f"--{key}", yaml.safe_dump(section)]
            return main(["onpolicy", "--config", str(trained), *REWARD, *judges, *flags])

        go.apis = (first, second)  # type: ignore[attr-defined]
        yield go


def metrics(project_file: Path, *names: str) -> list[tuple[Any, ...]]:
    listed = ", ".join(f"'{name}'" for name in names)
    select = f"SELECT round, name, round(value, 3) FROM metrics WHERE name IN ({listed}) ORDER BY ALL"
    return query(project_file.parent / "run" / "corpus.duckdb", select)[1]


def test_a_judge_that_is_gamed_stops_the_run_with_5_also_after_a_restart(
    trained: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gamed = Judge([2, 4]), Judge([4, 2])
    assert run(*gamed) == 5
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: round 2: the judge's mean reward rose to" in line
    assert "max_judge_divergence is 0.1" in line
    checkpoints = trained.parent / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["round-1", "sft"]
    seen = metrics(trained, "judge_reward", "unseen_reward")
    assert [(round_, name) for round_, name, _ in seen] == [
        (1, "judge_reward"), (1, "unseen_reward"), (2, "judge_reward"), (2, "unseen_reward")
    ]  # fmt: skip
    assert seen[2][2] > seen[0][2]
    assert seen[3][2] < seen[1][2]

    asked = [len(api.bodies) for api in run.apis]
    assert run(*gamed) == 5
    assert [len(api.bodies) for api in run.apis] == asked
    assert run(*gamed, "--onpolicy.max_judge_divergence", "1.0") == 2  # another experiment: its settings differ
    assert GateFailed.exit_code == 5


def test_judges_that_agree_let_it_go_on(trained: Path, run: Any) -> None:
    assert run(Judge([2, 4]), Judge([2, 4])) == 0
    names = ("judge_rank_correlation", "reward", "groups_equal", "unseen_failed")
    assert {name for _, name, _ in metrics(trained, *names)} >= {"reward", "groups_equal", "unseen_failed"}
    rows = query(
        trained.parent / "run" / "corpus.duckdb",
        "SELECT author, purpose, c.model, count(*) FROM completions c JOIN requests USING (request_key) "
        "WHERE author = 'judge' GROUP BY ALL ORDER BY ALL",
    )[1]
    assert rows == [("judge", "judge", "evaluate.judge", 6), ("judge", "judge", "judge", 6),
                    ("judge", "rubric", "evaluate.judge", 6), ("judge", "rubric", "judge", 6)]  # fmt: skip
    kinds = query(
        trained.parent / "run" / "corpus.duckdb", "SELECT kind, round, count(*) FROM feedback GROUP BY ALL ORDER BY ALL"
    )[1]
    assert kinds == [("rubric", 1, 12), ("rubric", 2, 12)]


def test_what_judges_spend_counts_against_the_cap_of_the_run(
    trained: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # `sample` has asked 6; 3 rubrics and 3 grades of the judge, and 2 more calls of the unseen one
    assert run(Judge([4]), Judge([4]), "--max-requests", "14") == 4
    assert [len(api.bodies) for api in run.apis] == [6, 2]
    assert "max_requests is 14" in capsys.readouterr().err
    assert run(None, None, "--max-requests", "40") == 0


def test_plan_counts_the_judges_calls_at_its_price(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = ["--judge", "{provider: scripted, model: j, price: {input: 1, output: 1}}"]
    assert main(["plan", "--config", str(project_file), "--json", *REWARD, *judge]) == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["onpolicy"]["questions"] == 2 * 3 * 2  # rounds, prompts, a rubric and a list of grades
    assert stages["onpolicy"]["usd_high"] > 0
    assert stages["sample"]["usd_high"] is None


# A real server


@pytest.mark.slow
@pytest.mark.parametrize("grades", ["rubric", "digits"])
def test_llama_cpp_replies_by_the_schema(grades: Any, corpus: Corpus, renderer: Any) -> None:
    """A model of this size cannot judge; by the grammar its replies can be read all the same."""
    local = LocalTeacherConfig(model=MODEL, gguf=GGUF)
    rollouts = [rollout(renderer, "What is the capital of France?", d) for d in ("Paris.", "I like trains.", "Rome")]

    async def ask() -> Any:
        async with (
            Teacher(local, corpus, RUN_ID) as teacher,
            Teacher(local, corpus, RUN_ID, author="judge") as judge,
        ):
            config = RewardConfig(
                grades=grades, num_generations=3, references=0, max_completion_length=600, top_logprobs=10
            )
            return await config.build(tools(teacher, renderer, judge=judge)).feedback(rollouts, 1)

    outcome = asyncio.run(ask())
    replies = corpus.rows("SELECT purpose, finish_reason, text FROM completions JOIN requests USING (request_key)")
    assert outcome.failed == 0, replies
    values = [said.value for said in outcome.feedback]
    assert all(0 <= value <= 1 for value in values)
    if grades == "digits":  # a mean over digits is none of the ten
        assert any(abs(value * 9 - round(value * 9)) > 1e-3 for value in values)
