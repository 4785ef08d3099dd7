"""`run`: the main job in order. sample -> fixed set -> sft -> onpolicy -> evaluate -> report.

    blackbox-kd run --config quickstart

Run again, it goes on where it stopped, and asks the teacher nothing that it has asked before.
"""

from __future__ import annotations

import sys
from typing import Any

from blackbox_kd import evaluate, probe, report, sample, yardstick
from blackbox_kd.command import stage_main
from blackbox_kd.lane import Lane
from blackbox_kd.progress import busy, say
from blackbox_kd.project import Project
from blackbox_kd.prompts import SPLITS
from blackbox_kd.tasks import Tasks, passed


async def run(project: Project) -> dict[str, Any]:
    """The summary of `evaluate`."""
    with busy("loading torch and transformers"):  # ten seconds, in which a mistake in the config is long said
        from blackbox_kd import onpolicy, sft

    check(project)
    try:
        await probe.ensure(project)
        await sample.run(project)
        await yardstick.capture(project)
        await sft.run(project)
        await onpolicy.run(project)
        summary = await evaluate.run(project)
    finally:  # also at the budget, or where a gate fails: then there is something to look at
        write_report(project)
    if project.teacher.engine.asked == 0:
        say("the teacher was asked nothing: every answer was in the corpus already")
    return summary


def write_report(project: Project) -> None:
    """What it fails of is said: it must not stand in for what the run ended with."""
    try:
        report.write(project.run_dir.path, project.corpus.path)
    except Exception as error:
        say(f"no report: {type(error).__name__}: {error}")


def check(project: Project) -> None:
    """Everything that can be known to be wrong before anything is paid."""
    from blackbox_kd.sft_trainer import trainer_config
    from blackbox_kd.student.student import Student
    from blackbox_kd.student.trainer import check_soft

    project.prompts.refuse_leaks()
    config = project.config
    evaluate.check(project)
    args = trainer_config(config, project.run_dir.path / "trainer", has_dev=config.sft.dev_fraction > 0)
    if config.sft.soft_labels and config.sample.top_logprobs:
        check_soft(args)
    student = Student(config.student, seed=config.seed)
    Tasks(config.evaluate).check(student)
    if not config.onpolicy.algorithm.lacking(project.teacher.capabilities):
        config.onpolicy.algorithm.build(project.tools(student.renderer, Lane()))
    for split in SPLITS:
        for prompt in project.prompts[split]:
            student.renderer.prompt(prompt.messages)


def show(project: Project, summary: dict[str, Any]) -> None:
    """The result, what it cost, and what to type next."""
    evaluate.show(project, summary)
    spend = summary["spend"]
    cost = "cost unknown (no price)" if spend["cost_usd"] is None else f"${spend['cost_usd']:.4f}"
    tokens = f"{spend['prompt_tokens']} prompt + {spend['completion_tokens']} completion tokens"
    directory, corpus = project.run_dir.path, project.corpus.path
    print(f"""
spent      {spend["calls"]} calls, {tokens}, {cost}
this time  {project.teacher.engine.asked} asked, {project.teacher.engine.cached} answered from the corpus
run        {directory}  (config.yaml, metrics.jsonl, summary.json, checkpoints/)
corpus     {corpus}
report     {directory / report.PAGE}
next       blackbox-kd sql "select author, round, count(*) from completions group by all order by all"
           blackbox-kd sql "select messages, rejected, chosen from pairs limit 5"
           blackbox-kd status
           blackbox-kd export-corpus --out {directory}/export""")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("run", __doc__, run, argv, show=show, verdict=passed)


if __name__ == "__main__":
    sys.exit(main())
