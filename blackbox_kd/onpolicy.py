"""Stage `onpolicy`: the student writes, the teacher scores or relabels, the student is updated on its own samples.

    blackbox-kd onpolicy --config quickstart --onpolicy.rounds 3

Reads   train prompts, checkpoints/sft.
Writes  rollouts, feedback, metrics, checkpoints/round-N (adapter, optimiser state, what the algorithm goes on from).

Teacher and student take turns, or work at the same time with `max_staleness: 1`: while the teacher looks at round r,
the student is updated on round r-1 and writes round r+1.

    student   write 1  write 2  ...........  update 1  write 3  .........  update 2  write 4
    teacher            feedback 1 .........  feedback 2 ................  feedback 3

A round commits by renaming its checkpoint folder. A killed round is repeated with the same seeds: its rollouts are
read back from the corpus, and what the teacher said already is not asked again.

The update may be shared by several processes (`student.ranks`), of which the first alone does everything else: it
writes the rollouts, asks the teacher and keeps the books.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from itertools import takewhile
from typing import Any

from blackbox_kd import curate, health, probe
from blackbox_kd.algorithms.base import Algorithm, Outcome
from blackbox_kd.command import stage_main
from blackbox_kd.errors import ConfigError, GateFailed
from blackbox_kd.lane import Lane
from blackbox_kd.progress import console, say
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.student.ranks import PeerGone, Ranks
from blackbox_kd.student.student import Student
from blackbox_kd.trainee import Trainee, checkpoints, metric_rows, updater_of
from blackbox_kd.types import Rollout


async def run(project: Project) -> dict[str, Any]:
    """All rounds that are not done yet; metrics of each by name."""
    lane = Lane()
    ranks = await lane.run(Ranks.join, project.config.student)
    found = await go_round(project, lane, ranks)
    await lane.run(ranks.share)  # there is nothing more to follow
    await lane.run(ranks.leave)
    lane.close()
    return {"rounds": found}


async def go_round(project: Project, lane: Lane, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Metrics of each round, by its checkpoint."""
    run_dir, names = project.run_dir, checkpoints(project)
    done = len(list(takewhile(lambda name: run_dir.done(name, project.settings_of(name)), names)))
    if not done:
        raise ConfigError(f"no {run_dir.checkpoint('sft')}: run `sft` first")
    if done == len(names):
        say(f"onpolicy: all {len(names) - 1} rounds are there already")
        return {}
    project.prompts.refuse_leaks()
    await probe.ensure(project)
    await curate.apply(project)
    config, loop, start = project.config, project.config.onpolicy, run_dir.checkpoint(names[done - 1])
    await lane.run(ranks.share, (start, config))
    student = Student(config.student, adapter=start)
    algorithm = loop.algorithm.build(project.tools(student.renderer, lane))
    algorithm.restore(start)
    trainee = await lane.run(Trainee, project, student, start, ranks)
    told: dict[int, asyncio.Task[Told]] = {}
    found: dict[str, dict[str, float]] = {}
    try:
        for round_ in range(done, len(names)):
            for ahead in range(round_, min(round_ + loop.max_staleness, loop.rounds) + 1):
                if ahead not in told:
                    rollouts = await lane.run(trainee.write, ahead)
                    told[ahead] = asyncio.create_task(ask(project, algorithm, rollouts, ahead, told.get(ahead - 1)))
            found[names[round_]] = await lane.run(trainee.update, round_, *await told.pop(round_))
    finally:
        for task in told.values():
            task.cancel()
        await asyncio.gather(*told.values(), return_exceptions=True)
        trainee.report.close()
    return found


def follow(config: Config) -> None:
    """Every rank but the first: its share of the updates, and no run directory, corpus or teacher."""
    ranks = Ranks.join(config.student)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 knows what to do, and takes this one with it
    with suppress(PeerGone):
        if told := ranks.share():
            start, config = told  # with the algorithm that `auto` stands for
            updater = updater_of(config, Student(config.student, adapter=start), start, ranks)
            console.quiet = True  # from here on rank 0 sees the same
            while task := ranks.share():
                updater.run(*task)
        ranks.leave()


Told = tuple[list[Rollout], Outcome]


async def ask(
    project: Project, algorithm: Algorithm, rollouts: list[Rollout], round_: int, before: asyncio.Task[Told] | None
) -> Told:
    """The teacher's word on a round, when the round before it is through."""
    if before:
        await asyncio.wait([before])
        before.result()
    outcome = await algorithm.feedback(rollouts, round_)
    name = checkpoints(project)[round_]
    with project.corpus.connect():
        project.corpus.add_feedback(outcome.feedback, round_=round_, run_id=project.run_id)
        outcome.check(project.config.onpolicy.max_failed_feedback)
        project.begin(name)
        # Before the update: a round that a gate stops is to be looked at, too, and the next may be asked by then.
        project.log("onpolicy", metric_rows(name, round_, outcome.metrics, []))
        check_judges(project, round_)
    return rollouts, outcome


def check_judges(project: Project, round_: int) -> None:
    """Stop where the judge likes the student better and better, and another one, whom it never learnt from, does not.

    Raises:
        GateFailed: they part further than the limit, see `health.divergence`.
    """
    names = ("judge_reward", "unseen_reward")
    rounds = project.corpus.metrics_by_round(project.run_id, "onpolicy", names)
    judged = [(rounds[r][names[0]], rounds[r][names[1]]) for r in sorted(rounds) if r <= round_]
    limit = project.config.onpolicy.max_judge_divergence
    if round_ in rounds and (apart := health.divergence(judged)) > limit:
        raise GateFailed(
            f"round {round_}: the judge's mean reward rose to {judged[-1][0]:.3f}, that of evaluate.judge fell by "
            f"{apart:.3f} to {judged[-1][1]:.3f} (onpolicy.max_judge_divergence is {limit:g}): the student learns to "
            "please the judge; use the checkpoint of an earlier round"
        )


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("onpolicy", __doc__, run, argv, follow=follow)


if __name__ == "__main__":
    sys.exit(main())
