"""The rules, in the order in which they are asked; an answer that one of them drops is not shown to the next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from blackbox_kd.curation import patterns
from blackbox_kd.curation.answer import Answer, Reason, Verdict
from blackbox_kd.curation.config import CurateConfig
from blackbox_kd.curation.duplicates import duplicates
from blackbox_kd.near import said, templates, words
from blackbox_kd.progress import counting
from blackbox_kd.types import Prompt

FEWEST_LENGTHS = 20
"""Answers of which one may be called an outlier."""
MAD = 1.4826
"""Makes the median absolute deviation that of a normal distribution."""
SHORTEST_OVERLAP = 8
"""Words of an evaluation prompt that is looked for (GPT-3 looked for 8 to 13, 2005.14165, appendix C)."""

Found = Iterator[tuple[Answer, str]]
"""Answers that a rule finds, each with what it rests on."""
Rule = Callable[[Sequence[Answer], Sequence[Prompt], CurateConfig], Found]
"""Whole answers to train prompts, in the prompts' order; evaluation prompts; the config."""


def judged(answers: Sequence[Answer], evaluation: Sequence[Prompt], config: CurateConfig) -> list[Verdict]:
    """What there is to say of answers to train prompts, given in the prompts' order."""
    found = [verdict for answer in answers if (verdict := _not_whole(answer))]
    kept = remaining(answers, found)
    with counting("curate", len(RULES) * len(answers)) as progress:
        for reason, rule in RULES.items():
            if (action := getattr(config, reason)) != "off":
                hits = rule(kept, evaluation, config)
                new = [Verdict(answer.completion_id, reason, why, action) for answer, why in hits]
                found += new
                kept = remaining(kept, new)
            progress.advance(len(answers), note=reason)
    return found


def remaining(answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> list[Answer]:
    """Those that are not dropped."""
    dropped = {verdict.completion_id for verdict in verdicts if verdict.action == "drop"}
    return [answer for answer in answers if answer.completion_id not in dropped]


def _not_whole(answer: Answer) -> Verdict | None:
    """What is never learnt, whatever the config says: it has no end, or nothing before it."""
    finish_reason = answer.completion.finish_reason
    if finish_reason != "stop":
        reason: Reason = "refusal" if finish_reason in ("refusal", "content_filter") else "truncated"
        return Verdict(answer.completion_id, reason, f"finish_reason {finish_reason}", "drop")
    return None if answer.text else Verdict(answer.completion_id, "degenerate", "empty", "drop")


def refusal(answers: Sequence[Answer], evaluation: Sequence[Prompt], config: CurateConfig) -> Found:
    """It begins as refusals do."""
    own = [patterns.opening(phrase) for phrase in config.refusal_phrases]
    for answer in answers:
        if phrase := patterns.refusal(answer.text, own):
            yield answer, f"begins with {phrase!r}"


def degenerate(answers: Sequence[Answer], evaluation: Sequence[Prompt], config: CurateConfig) -> Found:
    """It is a loop."""
    for answer in answers:
        if repeated := patterns.loop(answer.text):
            yield answer, repeated


def pii(answers: Sequence[Answer], evaluation: Sequence[Prompt], config: CurateConfig) -> Found:
    """It has personal data or a secret in it."""
    for answer in answers:
        if kinds := patterns.pii(answer.text):
            yield answer, kinds


def eval_overlap(answers: Sequence[Answer], evaluation: Sequence[Prompt], config: CurateConfig) -> Found:
    """Words in a row of an evaluation prompt, other than those of a template that many of these share."""
    shortest = min(SHORTEST_OVERLAP, config.overlap_ngram)
    grams = [_ngrams(words(said(prompt)), config.overlap_ngram, shortest) for prompt in evaluation]
    template = templates(grams, [prompt.split for prompt in evaluation]).frequent
    beginning = defaultdict[tuple[str, ...], dict[tuple[str, ...], Prompt]](dict)
    for prompt, own in zip(evaluation, grams, strict=True):
        for gram in own:
            if gram not in template:
                beginning[gram[:shortest]].setdefault(gram, prompt)
    for answer in answers if beginning else ():
        if hit := _overlap(words(f"{answer.asked}\n{answer.text}"), beginning, shortest):
            gram, prompt = hit
            yield answer, f"{prompt.split} prompt {prompt.prompt_id}: {patterns.quoted(gram, said(prompt))}"


def length_outlier(answers: Sequence[Answer], evaluation: Sequence[Prompt], config: CurateConfig) -> Found:
    """Robust z of the log of its tokens (Iglewicz and Hoaglin, 1993); none where most answers have one length."""
    measured = [answer for answer in answers if answer.tokens]
    if len(measured) < FEWEST_LENGTHS:
        return
    logs = np.log([answer.tokens or 1 for answer in measured])
    middle = float(np.median(logs))
    if not (deviation := MAD * float(np.median(np.abs(logs - middle)))):
        return
    for answer, value in zip(measured, logs.tolist(), strict=True):
        if abs(z := (value - middle) / deviation) > config.length_z:
            yield answer, f"{answer.tokens} tokens, z {z:.1f}, median {math.exp(middle):.0f}"


def near_duplicate(answers: Sequence[Answer], evaluation: Sequence[Prompt], config: CurateConfig) -> Found:
    """Prompt and answer are nearly those of an earlier one."""
    return duplicates(answers, config.jaccard)


RULES: dict[Reason, Rule] = {
    "refusal": refusal,
    "degenerate": degenerate,
    "pii": pii,
    "eval_overlap": eval_overlap,
    "length_outlier": length_outlier,
    "near_duplicate": near_duplicate,
}


def _ngrams(found: list[str], size: int, shortest: int) -> list[tuple[str, ...]]:
    """Those of `size` words; of a shorter text the whole, where it has at least `shortest`."""
    if len(found) < size:
        return [tuple(found)] if len(found) >= shortest else []
    return [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]


def _overlap(
    said: list[str], beginning: dict[tuple[str, ...], dict[tuple[str, ...], Prompt]], shortest: int
) -> tuple[tuple[str, ...], Prompt] | None:
    """The first n-gram that stands in the text, found by its first words."""
    for place, begin in enumerate(zip(*(said[i:] for i in range(shortest)), strict=False)):
        for gram, prompt in beginning.get(begin, {}).items():
            if tuple(said[place : place + len(gram)]) == gram:
                return gram, prompt
    return None
