"""How often a judge finds the student's greedy answer the better one of two.

`win_rate_vs_teacher`   beside the teacher's greedy answer to the same prompt.
`win_rate_vs_previous`  beside the greedy answer of the checkpoint before (of `sft`: the base model).
`judge_failed`          share of the comparisons of this checkpoint without two verdicts that can be read.

A judge tends to prefer what it sees first (Zheng et al. 2023, 2306.05685): it is asked in both orders, and a comparison
counts the mean of the two verdicts, each 1 for a win, 0.5 for a tie, 0 for a loss. Equal answers are a tie that nobody
is asked about. A comparison without two verdicts is left out, and counted. The judge is `evaluate.judge`: neither the
teacher by accident, nor the judge whose grades the student learns from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from blackbox_kd import judging
from blackbox_kd.judging import usable_text
from blackbox_kd.progress import say
from blackbox_kd.prompts import Template
from blackbox_kd.settings import JudgedConfig
from blackbox_kd.teachers.teacher import Questions, Teacher
from blackbox_kd.types import Completion, Interval, Prompt, Request, SamplingParams
from blackbox_kd.yardstick import FIXED_SPLITS, Metrics, interval

Answers = Mapping[str, str]
"""prompt_id -> a whole answer, stripped."""


class Pair(NamedTuple):
    """What is compared."""

    prompt: Prompt
    ours: str
    theirs: str


class Pairwise:
    """The question which of two answers is better."""

    def __init__(self, config: JudgedConfig, judge: Questions) -> None:
        """Raises:
        ConfigError: a template that cannot be read.
        """
        self._template, self._judge = Template(config.pairwise_template, "evaluate.pairwise_template"), judge
        self._sampling = SamplingParams(temperature=0.0, max_completion_length=config.judge_max_completion_length)

    def requests(self, pair: Pair) -> tuple[Request, Request] | None:
        """With our answer first, and with theirs first; None where both are the same."""
        if pair.ours == pair.theirs:
            return None
        ours_first, theirs_first = [pair.ours, pair.theirs], [pair.theirs, pair.ours]
        return self._request(pair.prompt, ours_first), self._request(pair.prompt, theirs_first)

    def _request(self, prompt: Prompt, answers: list[str]) -> Request:
        text = self._template.render(prompt=judging.conversation(prompt.messages), answers=answers)
        messages = [{"role": "user", "content": text}]
        form = {"response_format": judging.better_format()}
        return self._judge.request(prompt, "win_rate", self._sampling, messages=messages, parameters=form)


class WinRate:
    """Checkpoints in the order of training, each beside the teacher and the one before it."""

    def __init__(self, config: JudgedConfig, judge: Teacher, teacher: Answers) -> None:
        """`teacher`: its greedy answers to the fixed prompts."""
        self._asked, self._judge = Pairwise(config, judge), judge
        self._samples, self._teacher = config.bootstrap_samples, teacher
        self._previous: Answers | None = None

    async def measure(self, answers: Sequence[tuple[Prompt, str]], round_: int) -> Metrics:
        """Of a checkpoint's greedy answers to the fixed prompts."""
        others = {"win_rate_vs_teacher": self._teacher}
        if self._previous is not None:
            others["win_rate_vs_previous"] = self._previous
        self._previous = {prompt.prompt_id: text for prompt, text in answers}
        points = dict[str, list[float | None]]()
        for name, texts in others.items():
            pairs = [Pair(prompt, text, texts[prompt.prompt_id]) for prompt, text in answers]
            points[name] = await self._points(pairs, round_)
        found: Metrics = {}
        for split in FIXED_SPLITS:
            mine = [i for i, (prompt, _) in enumerate(answers) if prompt.split == split]
            if mine:
                found[split] = self._metrics({name: [own[i] for i in mine] for name, own in points.items()})
        return found

    async def _points(self, pairs: Sequence[Pair], round_: int) -> list[float | None]:
        """Ours of each pair; None without two verdicts."""
        asked = [self._asked.requests(pair) for pair in pairs]
        requests = [request for both in asked if both for request in both]
        replies = await self._judge.answers(requests, round_=round_, description="which answer is better")
        points = [verdict(both, replies) if both else 0.5 for both in asked]
        if failed := points.count(None):
            say(f"evaluate.judge: {failed} of {len(points)} comparisons without two clear verdicts are left out")
        return points

    def _metrics(self, points: Mapping[str, Sequence[float | None]]) -> dict[str, Interval]:
        clear = {name: [p for p in own if p is not None] for name, own in points.items()}
        found = {name: interval(own, self._samples) for name, own in clear.items() if own}
        failed = [float(p is None) for own in points.values() for p in own]
        return found | {"judge_failed": interval(failed, self._samples)}


def verdict(both: tuple[Request, Request], replies: Mapping[str, Completion]) -> float | None:
    """The mean of ours where it stands first and where it stands second; two wins of one place cancel out."""
    first, second = (judging.read_better(usable_text(replies.get(each.request_key)) or "") for each in both)
    return None if first is None or second is None else (first + 1 - second) / 2


def most_questions(prompts: int, checkpoints: int) -> int:
    """To the judge of a run: both orders, beside the teacher and, but for the first, the checkpoint before."""
    return 2 * prompts * max(0, 2 * checkpoints - 1)
