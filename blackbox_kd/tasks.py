"""Hold-back tasks under each checkpoint, compared with the base model question by question; and the gate.

`task_<name>`       share of right answers, 0 to 1.
`task_<name>_drop`  the base model's share less this checkpoint's, over the same questions; above 0 something is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blackbox_kd.checkers import Choice, Item, Written, load_task
from blackbox_kd.errors import AlignmentError, ConfigError, GateFailed
from blackbox_kd.sections import EvaluateConfig
from blackbox_kd.types import Interval
from blackbox_kd.yardstick import Metrics, interval

if TYPE_CHECKING:  # with torch
    from blackbox_kd.rollout import Writer
    from blackbox_kd.student.render import Rendered
    from blackbox_kd.student.student import Student

SLACK = 1e-9
"""Rounding of a mean: a drop of exactly the limit passes."""

Scores = Mapping[str, Sequence[float]]
"""By task, one number from 0 to 1 for each question."""


class Tasks:
    """Those of `evaluate.tasks`."""

    def __init__(self, config: EvaluateConfig) -> None:
        """Raises:
        ConfigError: see `load_task`.
        """
        tasks = {name: load_task(name, path) for name, path in config.tasks.items()}
        self._items = [(name, item) for name, items in tasks.items() for item in items]
        self._length = config.max_completion_length

    def scores(self, writer: Writer) -> dict[str, list[float]]:
        """1 for each right answer and 0 for each wrong one, in the order of the rows.

        A question that is longer than `student.max_length` allows is left out, under each checkpoint alike.
        """
        items = [item for _, item in self._items]
        right = by_writing(writer, items) | by_choosing(writer.student, items, writer.batch_size)
        found: dict[str, list[float]] = {name: [] for name, _ in self._items}
        for i, (name, _) in enumerate(self._items):
            if i in right:
                found[name].append(float(right[i]))
        return found

    def check(self, student: Student) -> None:
        """Before anything is paid.

        Raises:
            ConfigError: a task of which no question leaves room for an answer.
        """
        room = {name: False for name, _ in self._items}
        for name, item in self._items:
            room[name] |= fits(student, item, self._length)
        if none := [name for name, has in room.items() if not has]:
            raise ConfigError(
                f"evaluate.tasks.{none[0]}: every question is longer than student.max_length "
                f"({student.config.max_length}); raise that"
            )


def fits(student: Student, item: Item, length: int) -> bool:
    """Whether a question leaves room for an answer of `length` tokens, or for each of its choices."""
    before = student.renderer.prompt(item.prompt.messages)
    if isinstance(item.checker, Choice):
        longest = max(len(choice(student, before, text).input_ids) for text in item.checker.choices)
    else:
        longest = len(before) + length
    return longest <= student.config.max_length


def choice(student: Student, before: list[int], text: str) -> Rendered:
    """A prompt with a choice behind it, its end token not counted."""
    return student.renderer.join(before, student.renderer.completion(text)[:-1])


def by_writing(writer: Writer, items: Sequence[Item]) -> dict[int, bool]:
    """Place among the items -> whether the student's answer, a row like all others, is right."""
    prompts = [item.prompt for item in items if isinstance(item.checker, Written)]
    if not prompts:
        return {}
    writer.corpus.add_prompts(prompts)
    texts = {prompt.prompt_id: answer.text.strip() for prompt, answer in writer.answers(prompts)}
    return {
        i: checker.right(texts[prompt.prompt_id])
        for i, (prompt, checker) in enumerate(items)
        if isinstance(checker, Written) and prompt.prompt_id in texts
    }


def by_choosing(student: Student, items: Sequence[Item], batch_size: int) -> dict[int, bool]:
    """Place among the items -> whether the student takes the right choice."""
    rows, asked = [], list[tuple[int, Choice]]()
    for i, (prompt, checker) in enumerate(items):
        if isinstance(checker, Choice):
            before = student.renderer.prompt(prompt.messages)
            own = [choice(student, before, text) for text in checker.choices]
            if max(len(row.input_ids) for row in own) <= student.config.max_length:
                rows += own
                asked.append((i, checker))
    scores = iter(student.logprobs(rows, batch_size=batch_size))
    return {i: checker.taken([sum(next(scores)) for _ in checker.choices]) == checker.answer for i, checker in asked}


class AgainstBase:
    """Scores as metrics; the first scores of a task are the base model's."""

    def __init__(self, bootstrap_samples: int) -> None:
        self._samples, self._base = bootstrap_samples, dict[str, Sequence[float]]()

    def metrics(self, scores: Scores) -> Metrics:
        """See the module.

        Raises:
            AlignmentError: a task without a score, or another number of them than the base model had.
        """
        found = dict[str, Interval]()
        for name, own in scores.items():
            base = self._base.setdefault(name, own)
            if len(base) != len(own):
                raise AlignmentError(f"task {name}: {len(own)} answers, the base model gave {len(base)}")
            found[f"task_{name}"] = interval(own, self._samples)
            found[f"task_{name}_drop"] = interval([b - o for b, o in zip(base, own, strict=True)], self._samples)
        return {"holdback": found} if found else {}


def gates(limits: Mapping[str, float], checkpoint: str, metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each limit the drop of one checkpoint, and whether it passed: the point estimate decides, so that the same
    answers always get the same verdict; the interval says how much that verdict is worth.

    `metrics`: of its hold-back split, as they stand in summary.json.
    """
    found = {}
    for name, limit in limits.items():
        drop = metrics[f"task_{name}_drop"]
        passed = drop["value"] <= limit + SLACK
        found[name] = {"checkpoint": checkpoint, "drop": drop["value"], "lo": drop["lo"], "hi": drop["hi"],
                       "limit": limit, "passed": passed}  # fmt: skip
    return found


def gate_line(name: str, gate: Mapping[str, Any]) -> str:
    """One gate, for a person."""
    drop = f"{gate['drop']:.3g} [{gate['lo']:.3g}, {gate['hi']:.3g}]"
    return f"task {name}: {gate['checkpoint']} drops by {drop} from base, the limit is {gate['limit']:g}"


def passed(summary: Mapping[str, Any]) -> None:
    """Raises:
    GateFailed: a task fell by more than its limit.
    """
    if failed := [gate_line(name, gate) for name, gate in summary.get("gate", {}).items() if not gate["passed"]]:
        raise GateFailed(
            f"gate: {'; '.join(failed)}. Use an earlier checkpoint, train for less or with more onpolicy.replay, or "
            "raise evaluate.gate"
        )
