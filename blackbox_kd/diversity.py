"""How varied answers at temperature 1 are, a student's beside the teacher's: a collapse shows here, not in a loss.

`distinct_1`, `distinct_2`  different words, and pairs of words, over all of them in the answers of a split (Li et al.
                            2016). It falls with the number of answers: compare it over the same prompts only.
`repetition`                share of an answer's 4-grams of words that stand in it before, mean over answers (seq-rep-4
                            of Welleck et al. 2020, on words, so that teacher and student compare).
`entropy`                   nats a token of the writer's own next-token distribution along its answers. From the
                            `evaluate.top_logprobs` likeliest with all the rest as one outcome, of both alike: a lower
                            bound. Tokens of two tokenizers do not compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from blackbox_kd import health
from blackbox_kd.health import grams_of
from blackbox_kd.types import Completion, Interval, Prompt, TopK, scorer
from blackbox_kd.yardstick import FIXED_SPLITS, FixedSet, Metrics, interval

if TYPE_CHECKING:  # with torch
    from blackbox_kd.project import Project
    from blackbox_kd.rollout import Writer
    from blackbox_kd.student.render import Rendered, Renderer

REPEATED = 4
"""Words of what counts as repeated."""
TOP = 20
"""Of the student's likeliest tokens, where the teacher shows none."""
NORMAL_95 = 1.959964
"""Standard deviations on either side."""


class Diversity:
    """The first `evaluate.diversity_prompts` fixed prompts of each split, and what is measured on them."""

    def __init__(self, project: Project, fixed: FixedSet) -> None:
        self._project, self._config = project, project.config.evaluate
        most = self._config.diversity_prompts
        self._answers = {
            split: [answer for answer in fixed.answers if answer.prompt.split == split][:most] for split in FIXED_SPLITS
        }

    def measure(self, writer: Writer) -> Metrics:
        """Of a student that draws an answer to each; they are rows like all others."""
        drawn = writer.answers([answer.prompt for answers in self._answers.values() for answer in answers])
        rows = [scored_row(writer.student.renderer, prompt, completion) for prompt, completion in drawn]
        scores = writer.student.score(rows, batch_size=writer.batch_size, k=self._config.top_logprobs or TOP)
        return self._metrics([(p, c.text, each.top) for (p, c), each in zip(drawn, scores, strict=True)])

    def teacher(self, renderer: Renderer) -> Metrics:
        """Of the teacher's fixed answers; its `length` is that of the greedy ones in the student's tokens."""
        answers = [answer for own in self._answers.values() for answer in own]
        tops = self._tops([answer.sampled for answer in answers])
        found = self._metrics([(a.prompt, a.sampled.text, tops.get(a.sampled.completion_id)) for a in answers])
        for split, own in self._answers.items():
            if own:
                lengths = [float(len(renderer.completion(answer.greedy.text.strip()))) for answer in own]
                found[split]["length"] = interval(lengths, self._config.bootstrap_samples)
        return found

    def _tops(self, sampled: Sequence[Completion]) -> dict[str, TopK]:
        by = scorer(self._project.config.teacher.model, self._project.teacher.context.context_hash)
        scored = self._project.corpus.scored_tokens([completion.completion_id for completion in sampled], by)
        return {i: TopK(each.top_ids, each.top_logprobs) for i, each in scored.items() if each.top_ids.size}

    def _metrics(self, answers: Sequence[tuple[Prompt, str, TopK | None]]) -> Metrics:
        found: Metrics = {}
        for split in FIXED_SPLITS:
            if own := [(text, top) for prompt, text, top in answers if prompt.split == split]:
                found[split] = spread(own, self._config.bootstrap_samples)
        return found


def scored_row(renderer: Renderer, prompt: Prompt, completion: Completion) -> Rendered:
    """A prompt and its answer; the end of one that was cut off was not drawn, and does not count."""
    ids = renderer.completion(completion.text)
    return renderer.join(renderer.prompt(prompt.messages), ids if completion.finish_reason == "stop" else ids[:-1])


def spread(answers: Sequence[tuple[str, TopK | None]], samples: int) -> dict[str, Interval]:
    """See the module; `entropy` is left out where no answer has its likeliest tokens."""
    texts = [text for text, _ in answers]
    nats = [health.entropy(top) for _, top in answers if top is not None]
    found = {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": interval([repetition(text) for text in texts], samples),
    }
    if any(len(each) for each in nats):
        sums, counts = [float(each.sum()) for each in nats], [len(each) for each in nats]
        found["entropy"] = interval(sums, samples, weights=counts)
    return found


def repetition(text: str, n: int = REPEATED) -> float:
    """1 - different n-grams / n-grams of one text; 0 where it is shorter than n words."""
    grams = grams_of(text, n)
    return 1 - len(grams) / grams.total() if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> Interval:
    """Different n-grams over all n-grams of a set of texts, 1 where there are none; 95% interval by the jackknife.

    A bootstrap draws texts twice, and a text that stands there twice is less distinct than any that was written:
    its interval would not hold the value. The jackknife leaves each text out once (Efron 1982).
    """
    own = [grams_of(text, n) for text in texts]
    total = sum(own, Counter[tuple[str, ...]]())
    size = total.total()
    value = health.distinct(texts, n)
    without = [
        (len(total) - sum(total[gram] == count for gram, count in each.items())) / (size - each.total())
        for each in own
        if each.total() < size
    ]
    error = NORMAL_95 * float(np.sqrt((len(without) - 1) * np.var(without))) if without else 0.0
    return Interval(value=value, lo=max(0.0, value - error), hi=min(1.0, value + error))
