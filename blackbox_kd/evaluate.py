"""Stage `evaluate`: every checkpoint on the same fixed answers of the teacher, which are captured once.

    blackbox-kd evaluate --config quickstart --json

Reads   heldout, ood and holdback prompts, checkpoints/*.
Writes  the fixed set, the student's answers, metrics, summary.json.
`teacher_nll`, `tail_kl` and what belongs to them: see `yardstick`.
`chrf`, `exact`: the student's greedy answer against the teacher's greedy answer (on holdback: against the base
model's). `length`: tokens of the student's greedy answer. All with a bootstrap 95% interval over prompts.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec

from blackbox_kd.command import stage_main
from blackbox_kd.model_card import refresh_cards
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.run_dir import round_of
from blackbox_kd.types import Interval, SamplingParams, Split
from blackbox_kd.yardstick import FIXED_SPLITS, FixedSet, Yardstick, capture, interval

if TYPE_CHECKING:
    from blackbox_kd.student.student import Student

HOLDBACK: Split = "holdback"
SHOWN = ("teacher_nll", "tail_kl", "chrf", "exact")
"""In the table for a person; the rest is in summary.json and `metrics`."""


async def run(project: Project) -> dict[str, Any]:
    """summary.json, as described in the README."""
    # torch is imported here, so that the table can be read without it
    from blackbox_kd.student.student import Student

    fixed = await capture(project)
    yardstick: Yardstick | None = None
    reference: dict[str, str] = {}
    checkpoints: list[dict[str, Any]] = []
    for name in ["base", *project.run_dir.checkpoints()]:
        adapter = None if name == "base" else project.run_dir.checkpoint(name)
        student = Student(project.config.student, adapter=adapter)
        say(f"evaluate: {name}")
        yardstick = yardstick or Yardstick(project, student, fixed)
        measured = yardstick.measure(student)
        for split, metrics in answered(project, student, name, fixed, reference).items():
            shown = {key: msgspec.to_builtins(value) for key, value in (measured.get(split, {}) | metrics).items()}
            checkpoints.append({"name": name, "split": split, "metrics": shown})
            where = {"checkpoint": name, "round": max(0, round_of(name)), "split": split, "set_id": fixed.set_id}
            project.log("evaluate", [{**where, "name": key, **values} for key, values in shown.items()])
    summary = {
        "checkpoints": checkpoints,
        "spend": project.corpus.spend(project.run_id),
        "set_id": fixed.set_id,
        "tail_kl_is_a_lower_bound": yardstick is not None and yardstick.bound,
        "seed": project.config.seed,
        "run_id": project.run_id,
    }
    project.run_dir.write_summary(summary)
    refresh_cards(project.run_dir, summary)
    return summary


def answered(
    project: Project, student: Student, name: str, fixed: FixedSet, reference: dict[str, str]
) -> dict[Split, dict[str, Interval]]:
    """The student's greedy answers against the targets, by split. `reference` takes the base model's of holdback."""
    from blackbox_kd.rollout import Writer

    config = project.config.evaluate
    targets = {a.prompt.prompt_id: a.greedy.text.strip() for a in fixed.answers}
    writer = Writer(
        student=student,
        sampling=SamplingParams(temperature=0.0, max_completion_length=config.max_completion_length),
        purpose="evaluate",
        round=max(0, round_of(name)),
        seed=0,
        batch_size=config.batch_size,
        corpus=project.corpus,
        run_id=project.run_id,
    )
    answers = writer.answers([a.prompt for a in fixed.answers] + project.prompts[HOLDBACK], scored=True)
    if name == "base":
        reference |= {p.prompt_id: c.text.strip() for p, c in answers if p.split == HOLDBACK}
    targets |= reference
    found: dict[Split, dict[str, Interval]] = {}
    for split in (*FIXED_SPLITS, HOLDBACK):
        written = [(c, c.text.strip(), targets[p.prompt_id]) for p, c in answers if p.split == split]
        if written:
            values = {
                "chrf": [chrf(ours, theirs) for _, ours, theirs in written],
                "exact": [float(ours == theirs) for _, ours, theirs in written],
                "length": [float(c.usage.completion_tokens) for c, _, _ in written],
            }
            found[split] = {key: interval(each, config.bootstrap_samples) for key, each in values.items()}
    return found


def chrf(hypothesis: str, reference: str) -> float:
    """chrF2 of one answer, 0 to 100 (Popovic 2015)."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(hypothesis, [reference]).score)


def table(summary: dict[str, Any], split: Split) -> list[str]:
    """One line a checkpoint, `value [lo, hi]` for each metric of a split."""
    rows = [c for c in summary["checkpoints"] if c["split"] == split]
    names = [name for name in SHOWN if rows and name in rows[0]["metrics"]]
    lines = [f"{split:<10}" + "".join(f"{name:>26}" for name in names)] if rows else []
    for row in rows:
        cells = [f"{m['value']:.3g} [{m['lo']:.3g}, {m['hi']:.3g}]" for m in (row["metrics"][n] for n in names)]
        lines.append(f"  {row['name']:<8}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def show(project: Project, summary: dict[str, Any]) -> None:
    """All splits as tables."""
    for split in (*FIXED_SPLITS, HOLDBACK):
        for line in table(summary, split):
            print(line)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("evaluate", __doc__, run, argv, show=show)


if __name__ == "__main__":
    sys.exit(main())
