"""Stage `evaluate`: every checkpoint on the same fixed answers of the teacher, which are captured once.

    blackbox-kd evaluate --config quickstart --json

Reads   heldout, ood and holdback prompts, hold-back tasks, checkpoints/*.
Writes  the fixed set, the student's answers, a judge's verdicts, metrics, summary.json.
`teacher_nll`, `tail_kl` and what belongs to them: see `yardstick`.
`chrf`, `exact`: the student's greedy answer against the teacher's greedy answer (on holdback: against the base
model's). `length`: tokens of the student's greedy answer.
`distinct_1`, `distinct_2`, `repetition`, `entropy`: see `diversity`; the teacher has them, too.
`win_rate_vs_teacher`, `win_rate_vs_previous`: see `winrate`. `task_<name>`, `task_<name>_drop`: see `tasks`.
All with a 95% interval over prompts, by the bootstrap where nothing else is said. A task that falls by more than
`evaluate.gate` allows ends the command with exit code 5, after everything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from blackbox_kd import harness
from blackbox_kd.command import stage_main
from blackbox_kd.diversity import Diversity
from blackbox_kd.model_card import refresh_cards
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.run_dir import round_of
from blackbox_kd.tasks import AgainstBase, Tasks, gate_line, gates, passed
from blackbox_kd.types import Completion, Interval, Prompt, SamplingParams, Split
from blackbox_kd.winrate import Pairwise, WinRate
from blackbox_kd.yardstick import FIXED_SPLITS, FixedSet, Metrics, Yardstick, capture, interval

if TYPE_CHECKING:
    from blackbox_kd.rollout import Writer
    from blackbox_kd.student.student import Student

HOLDBACK: Split = "holdback"
SHOWN = ("teacher_nll", "tail_kl", "chrf", "exact", "win_rate_vs_teacher", "win_rate_vs_previous")
"""In the table for a person, with the tasks; the rest is in summary.json and `metrics`."""
SPREAD = ("distinct_1", "distinct_2", "repetition", "entropy")
"""In a table of their own, with the teacher's."""


async def run(project: Project) -> dict[str, Any]:
    """summary.json, as described in the README; whether its gates passed is for `tasks.passed` to say."""
    # torch is imported here, so that the table can be read without it
    from blackbox_kd.student.student import Student

    check(project)
    measures = Measures(project, await capture(project))
    checkpoints: list[dict[str, Any]] = []
    for name in (names := ["base", *project.run_dir.checkpoints()]):
        adapter = None if name == "base" else project.run_dir.checkpoint(name)
        student = Student(project.config.student, adapter=adapter)
        say(f"evaluate: {name}")
        found = await measures.take(student, name, harness_too=name in (names[0], names[-1]))
        checkpoints += logged(project, name, measures.fixed.set_id, found)
    summary = {
        "checkpoints": checkpoints,
        "teacher": logged(project, "teacher", measures.fixed.set_id, measures.diversity.teacher(student.renderer)),
        "spend": project.corpus.spend(project.run_id),
        "set_id": measures.fixed.set_id,
        "tail_kl_is_a_lower_bound": measures.tail_kl_is_a_lower_bound,
        "seed": project.config.seed,
        "run_id": project.run_id,
    }
    if limits := project.config.evaluate.gate:
        last = next(row for row in reversed(checkpoints) if row["split"] == HOLDBACK)
        summary["gate"] = gates(limits, last["name"], last["metrics"])
    project.run_dir.write_summary(summary)
    refresh_cards(project.run_dir, summary)
    return summary


def check(project: Project) -> None:
    """Whatever can be known to be wrong before a model is loaded or the teacher asked.

    Raises:
        ConfigError: a template or a package.
    """
    config = project.config.evaluate
    harness.check(config.lm_eval)
    if project.unseen:
        Pairwise(config, project.unseen)


def logged(project: Project, name: str, set_id: str, found: Metrics) -> list[dict[str, Any]]:
    """Of one checkpoint, as in summary.json; they are metric rows then."""
    rows = [{"name": name, "split": split, "metrics": msgspec.to_builtins(metrics)} for split, metrics in found.items()]
    where = {"checkpoint": name, "round": round_number(name), "set_id": set_id}
    project.log("evaluate", [
        {**where, "split": row["split"], "name": key, **value} for row in rows for key, value in row["metrics"].items()
    ])  # fmt: skip
    return rows


def round_number(name: str) -> int:
    """0 before the on-policy stage, and of the teacher."""
    return 0 if name == "teacher" else max(0, round_of(name))


class Measures:
    """Everything that a checkpoint is measured by; what it is compared with is the same for all of a run."""

    def __init__(self, project: Project, fixed: FixedSet) -> None:
        config = project.config.evaluate
        self._project, self.fixed = project, fixed
        self.diversity = Diversity(project, fixed)
        self._yardstick: Yardstick | None = None
        self._targets = {answer.prompt.prompt_id: answer.greedy.text.strip() for answer in fixed.answers}
        self._tasks, self._against_base = Tasks(config), AgainstBase(config.bootstrap_samples)
        self._wins = WinRate(config, project.unseen, dict(self._targets)) if project.unseen else None

    @property
    def tail_kl_is_a_lower_bound(self) -> bool:
        """See `Yardstick`."""
        return self._yardstick is not None and self._yardstick.bound

    async def take(self, student: Student, name: str, *, harness_too: bool) -> Metrics:
        """Of a checkpoint; the base model is the first."""
        config = self._project.config.evaluate
        self._yardstick = self._yardstick or Yardstick(self._project, student, self.fixed)
        greedy, sampled = (writer(self._project, student, name, temperature) for temperature in (0.0, 1.0))
        prompts = [a.prompt for a in self.fixed.answers] + self._project.prompts[HOLDBACK]
        answers = greedy.answers(prompts, scored=True)
        if name == "base":
            self._targets |= {p.prompt_id: c.text.strip() for p, c in answers if p.split == HOLDBACK}
        scores = self._tasks.scores(greedy)
        if harness_too:
            scores |= harness.scores(student, config.lm_eval, config.batch_size)
        parts = [
            self._yardstick.measure(student),
            against(self._targets, answers, config.bootstrap_samples),
            self.diversity.measure(sampled),
            self._against_base.metrics(scores),
        ]
        if self._wins:
            fixed = [(p, c.text.strip()) for p, c in answers if p.split in FIXED_SPLITS]
            parts.append(await self._wins.measure(fixed, round_number(name)))
        return merged(parts)


def writer(project: Project, student: Student, name: str, temperature: float) -> Writer:
    """A checkpoint that answers the prompts of the evaluation."""
    from blackbox_kd.rollout import Writer

    config = project.config.evaluate
    return Writer(
        student=student,
        sampling=SamplingParams(temperature=temperature, max_completion_length=config.max_completion_length),
        purpose="evaluate",
        round=round_number(name),
        seed=project.config.seed,
        batch_size=config.batch_size,
        corpus=project.corpus,
        run_id=project.run_id,
    )


def against(targets: Mapping[str, str], answers: Sequence[tuple[Prompt, Completion]], samples: int) -> Metrics:
    """Greedy answers against the targets of their prompts."""
    found: Metrics = {}
    for split in (*FIXED_SPLITS, HOLDBACK):
        written = [(c, c.text.strip(), targets[p.prompt_id]) for p, c in answers if p.split == split]
        if written:
            values = {
                "chrf": [chrf(ours, theirs) for _, ours, theirs in written],
                "exact": [float(ours == theirs) for _, ours, theirs in written],
                "length": [float(c.usage.completion_tokens) for c, _, _ in written],
            }
            found[split] = {key: interval(each, samples) for key, each in values.items()}
    return found


def merged(parts: Iterable[Metrics]) -> Metrics:
    """All metrics of each split, in the order of the splits."""
    found: dict[Split, dict[str, Interval]] = {split: {} for split in (*FIXED_SPLITS, HOLDBACK)}
    for part in parts:
        for split, metrics in part.items():
            found[split] |= metrics
    return {split: metrics for split, metrics in found.items() if metrics}


def chrf(hypothesis: str, reference: str) -> float:
    """chrF2 of one answer, 0 to 100 (Popovic 2015)."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(hypothesis, [reference]).score)


def table(summary: dict[str, Any], split: Split, names: Iterable[str] = SHOWN) -> list[str]:
    """One line a checkpoint, `value [lo, hi]` for each of these metrics that a split has."""
    rows = [c for c in [*summary.get("teacher", []), *summary["checkpoints"]] if c["split"] == split]
    there = [name for name in names if any(name in row["metrics"] for row in rows)]
    rows = [row for row in rows if any(name in row["metrics"] for name in there)]
    lines = [f"{split:<10}" + "".join(f"{name:>26}" for name in there)] if rows else []
    return lines + [f"  {row['name']:<8}" + "".join(f"{cell(row['metrics'], n):>26}" for n in there) for row in rows]


def cell(metrics: Mapping[str, Any], name: str) -> str:
    """`value [lo, hi]`, or a dash."""
    return "{value:.3g} [{lo:.3g}, {hi:.3g}]".format(**metrics[name]) if name in metrics else "-"


def show(project: Project, summary: dict[str, Any]) -> None:
    """All splits as tables, then the gates."""
    tasks = dict.fromkeys(name for c in summary["checkpoints"] for name in c["metrics"] if name.startswith("task_"))
    for split in (*FIXED_SPLITS, HOLDBACK):
        for line in [*table(summary, split, (*SHOWN, *tasks)), *table(summary, split, SPREAD)]:
            print(line)
    for name, gate in summary.get("gate", {}).items():
        print(f"gate      {'passed' if gate['passed'] else 'FAILED'}: {gate_line(name, gate)}")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("evaluate", __doc__, run, argv, show=show, verdict=passed)


if __name__ == "__main__":
    sys.exit(main())
