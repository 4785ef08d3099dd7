"""The loop: who writes which round, teacher and student at the same time, and a kill in each of its phases."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from blackbox_kd.__main__ import main
from blackbox_kd.corpus import query
from blackbox_kd.errors import TrainingError
from blackbox_kd.lane import Lane
from tests import warm

PIPELINED = ["--onpolicy.max_staleness", "1"]


def rows(project: Path, sql: str, run: str = "run") -> list[tuple[object, ...]]:
    return query(project.parent / run / "corpus.duckdb", sql)[1]


def onpolicy(project: Path, run: str, *flags: str) -> list[str]:
    return ["onpolicy", "--config", str(project), "--run_dir", str(project.parent / run), *flags]


def adapters(project: Path, run: str, rounds: int) -> list[dict[str, object]]:
    folders = (project.parent / run / "checkpoints" / f"round-{r}" for r in range(1, rounds + 1))
    return [load_file(folder / "adapter_model.safetensors") for folder in folders]


def same(one: list[dict[str, object]], other: list[dict[str, object]]) -> bool:
    return all(
        a.keys() == b.keys() and all(bool((a[key] == b[key]).all()) for key in a)  # type: ignore[attr-defined]
        for a, b in zip(one, other, strict=True)
    )


def test_with_staleness_1_a_round_is_written_one_policy_earlier(trained: Path) -> None:
    shutil.copytree(trained.parent / "run", trained.parent / "strict")
    # steps that are large enough for another policy to write another text from the same random numbers
    flags = ("--onpolicy.rounds", "3", "--onpolicy.update.learning_rate", "0.02")
    assert main(onpolicy(trained, "run", *flags, *PIPELINED)) == 0
    assert main(onpolicy(trained, "strict", *flags)) == 0
    wrote = "select round, min(policy), count(distinct policy) from completions where author = 'student' group by 1"
    stale = {round_: policy for round_, policy, one in rows(trained, wrote) if one == 1}
    strict = {round_: policy for round_, policy, one in rows(trained, wrote, "strict") if one == 1}
    assert stale[1] == stale[2] == strict[1]  # of sft
    assert len({stale[2], stale[3]}) == 2
    assert len(set(strict.values())) == 3
    noted = rows(trained, "select round, value from metrics where name = 'staleness' order by 1")
    assert noted == [(1, 0.0), (2, 1.0), (3, 1.0)]
    assert not same(adapters(trained, "run", 3)[1:], adapters(trained, "strict", 3)[1:])


def test_a_restart_writes_with_the_policy_that_would_have_written(trained: Path) -> None:
    shutil.copytree(trained.parent / "run", trained.parent / "again")
    assert main(onpolicy(trained, "run", "--onpolicy.rounds", "3", *PIPELINED)) == 0
    for upto in ("1", "2", "3"):  # each time a new process would find the student one round further than the writer
        assert main(onpolicy(trained, "again", "--onpolicy.rounds", upto, *PIPELINED)) == 0
    assert same(adapters(trained, "run", 3), adapters(trained, "again", 3))
    asked = "select request_key, count(*) from attempts group by 1 having count(*) > 1"
    assert rows(trained, asked, "again") == []


def in_corpus(purpose: str) -> Callable[[Path], bool]:
    def seen(run: Path) -> bool:
        sql = f"select count(*) from completions join requests using (request_key) where purpose = '{purpose}'"
        return query(run / "corpus.duckdb", sql)[1] != [(0,)]

    return seen


PHASES: dict[str, Callable[[Path], bool]] = {
    "rollout": in_corpus("rollout"),
    "feedback": in_corpus("relabel"),
    "save": lambda run: (run / "checkpoints" / ".round-1.partial").exists(),
    "update": lambda run: (run / "checkpoints" / "round-1").exists(),
}
"""What a kill waits for: a sign that the phase has begun, or that the one before it is just over."""


@pytest.mark.parametrize("flags", [[], PIPELINED], ids=["strict", "pipelined"])
def test_killed_in_each_phase_it_ends_with_the_same_adapter(trained: Path, flags: list[str]) -> None:
    killed = trained.parent / "killed"
    shutil.copytree(trained.parent / "run", killed)
    assert main(onpolicy(trained, "run", *flags)) == 0
    for phase, begun in PHASES.items():
        process = warm.start(*onpolicy(trained, "killed", *flags))
        deadline = time.monotonic() + 120
        while process.is_alive() and not begun(killed):
            assert time.monotonic() < deadline, phase
            time.sleep(0.001 if phase == "save" else 0.02)
        process.kill()
        process.join()
    assert main(onpolicy(trained, "killed", *flags)) == 0
    assert same(adapters(trained, "run", 2), adapters(trained, "killed", 2))
    kept = "select count(*), count(distinct request_key) from completions"
    assert rows(trained, kept, "killed") == rows(trained, kept)
    billed = "select count(*) filter (where billed) as paid from attempts group by request_key having paid > 1"
    assert rows(trained, billed, "killed") == []


def test_an_update_that_fails_ends_the_round_that_is_asked_meanwhile(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--onpolicy.update.learning_rate", "1e30", "--onpolicy.update.num_epochs", "3"]
    started = threading.active_count()
    assert main(onpolicy(trained, "run", *flags, *PIPELINED)) == 2
    assert "lower onpolicy.update.learning_rate" in capsys.readouterr().err
    assert threading.active_count() <= started + 1  # the lane waits for jobs, and ends with the process
    assert rows(trained, "select count(*) from completions where round = 2 and author = 'student'") == [(3,)]


def test_the_lane_runs_one_job_after_the_other_and_raises_what_they_raise() -> None:
    lane, running = Lane(), []

    def job(name: str) -> str:
        running.append(name)
        time.sleep(0.01)
        assert running == [name]
        running.remove(name)
        return name

    def failing() -> None:
        raise TrainingError("no")

    async def both() -> list[str]:
        with pytest.raises(TrainingError, match="no"):
            await lane.run(failing)
        return await asyncio.gather(*(lane.run(job, name) for name in "abc"))

    assert asyncio.run(both()) == ["a", "b", "c"]


def test_the_event_loop_goes_on_while_the_lane_works() -> None:
    lane, release = Lane(), threading.Event()

    async def beside() -> bool:
        waiting = asyncio.create_task(lane.run(release.wait, 10.0))
        await asyncio.sleep(0)
        release.set()  # only a loop that is not blocked comes here
        return await waiting

    assert asyncio.run(beside())
