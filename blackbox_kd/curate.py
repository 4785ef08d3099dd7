"""`curate`: which of the teacher's answers `sft` will not learn, and why.

    blackbox-kd curate --config quickstart

Reads   the teacher's answers of purpose `sample`.    Writes   curation: a row for each answer and reason.
Nothing is deleted, and nothing is asked unless `curate.best_of_n` is on. `sft` and `onpolicy` do it before they train.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from blackbox_kd.best_of_n import best_of_n
from blackbox_kd.command import stage_main
from blackbox_kd.corpus import curation
from blackbox_kd.curation import Answer, Verdict, judged, remaining
from blackbox_kd.errors import TrainingError
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.prompts import Template
from blackbox_kd.sql import show as show_table
from blackbox_kd.types import Usage

SHOWN = 60
"""Characters of an example's text in the table."""


async def run(project: Project) -> dict[str, Any]:
    """How many answers there are, are learnt, and of these are flagged; `reasons` with an example each.

    Raises:
        TrainingError: there are none, or all are dropped.
    """
    if not (answers := sampled(project)):
        raise TrainingError(f"no answers to these prompts in {project.corpus.path}: run `sample` first")
    verdicts = await apply(project, answers)
    kept = remaining(answers, verdicts)
    flagged = {verdict.completion_id for verdict in verdicts if verdict.action == "flag"}
    return {
        "answers": len(answers),
        "kept": len(kept),
        "flagged": len(flagged & {answer.completion_id for answer in kept}),
        "reasons": curation.summary(project.corpus, project.run_id),
    }


async def apply(project: Project, answers: Sequence[Answer] | None = None) -> list[Verdict]:
    """Judge the answers to the questions of `sample`, and note what is said of them in the corpus.

    Raises:
        TrainingError: nothing would be left.
        TeacherError: see `best_of_n`.
    """
    config, answers = project.config.curate, sampled(project) if answers is None else answers
    verdicts = judged(answers, project.prompts.evaluation, config)
    if config.best_of_n != "off" and project.judge:
        template = Template(config.grades_template, "curate.grades_template")
        worse = await best_of_n(project.judge, template, remaining(answers, verdicts))
        verdicts += [Verdict(answer.completion_id, "not_best_of_n", why, config.best_of_n) for answer, why in worse]
    curation.replace(project.corpus, project.run_id, [verdict._asdict() for verdict in verdicts])
    if answers:
        say(f"curate: {told(answers, verdicts)}")
    if answers and not remaining(answers, verdicts):
        raise TrainingError(
            f"curate: all answers are dropped ({told(answers, verdicts)}); look at `from curation`, and set the rules "
            "of curate that are wrong here to flag or off"
        )
    return verdicts


def sampled(project: Project) -> list[Answer]:
    """The teacher's answers to the questions that `sample` asks under this config, in their order."""
    asked = project.asked_by_sample()
    found = project.corpus.answers(list(asked), logprobs=False)
    return [
        Answer(prompt, choice, _tokens(choice.usage) if len(found[key]) == 1 else None)
        for key, prompt in asked.items()
        for choice in found.get(key, ())
    ]


def _tokens(usage: Usage) -> int | None:
    """Of the answer itself; None where the endpoint does not say."""
    return max(usage.completion_tokens - usage.reasoning_tokens, 0) or None


def told(answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> str:
    """`3 of 120 answers dropped (2 near_duplicate, 1 refusal), 1 flagged (1 pii)`."""
    parts = []
    for action, done in (("drop", f"of {len(answers)} answers dropped"), ("flag", "flagged")):
        mine = [verdict for verdict in verdicts if verdict.action == action]
        number = len({verdict.completion_id for verdict in mine})
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(v.reason for v in mine).most_common())
        if mine or action == "drop":
            parts.append(f"{number} {done} ({reasons})" if mine else f"{number} {done}")
    return ", ".join(parts)


def show(project: Project, result: dict[str, Any]) -> None:
    """A line for each reason."""
    print(f"{result['kept']} of {result['answers']} answers are learnt, {result['flagged']} of them are flagged")
    if result["reasons"]:
        rows = [(r["action"], r["reason"], r["answers"], r["completion_id"][:8], r["detail"][:SHOWN],
                 " ".join(r["text"].split())[:SHOWN]) for r in result["reasons"]]  # fmt: skip
        show_table(["action", "reason", "answers", "such as", "because", "text"], rows)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("curate", __doc__, run, argv, show=show)


if __name__ == "__main__":
    sys.exit(main())
