"""Train prompts that stand in an evaluation split, too: there a student would be measured on what it has learnt.

Equal: the same but for case, blanks and the mark at the end. Near: the Jaccard index of the word pairs, without those
that are the evaluation prompts' template. A sentence of a few of them is taken for a template only where a prompt says
enough besides, for it may as well be what these few have in common with the train prompt. The evaluation splits are
indexed, train prompts stream past.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from blackbox_kd.near import NearIndex, normalised, said, shingles, templates
from blackbox_kd.progress import counting
from blackbox_kd.types import Prompt

FEWEST_SHINGLES = 4
"""Of an evaluation prompt, beyond the template of all; a shorter one is looked for as a whole only."""
OWN_SHINGLES = 8
"""Of an evaluation prompt, beyond whatever may be a template, for that to be left out."""
SHOWN = 80
"""Characters of a prompt in a message."""


class Leak(NamedTuple):
    """A train prompt and the evaluation prompt that it is, or nearly is."""

    train: Prompt
    evaluation: Prompt
    jaccard: float
    """1 where they are equal."""


class Leaks:
    """What was found; empty is false."""

    def __init__(self) -> None:
        self.prompt_ids: set[str] = set()
        """Of train prompts."""
        self.splits: Counter[str] = Counter()
        """How many train prompts stand in each evaluation split."""
        self.example: Leak | None = None
        """The first."""

    def add(self, leak: Leak) -> None:
        """One more."""
        self.prompt_ids.add(leak.train.prompt_id)
        self.splits[leak.evaluation.split] += 1
        self.example = self.example or leak

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __str__(self) -> str:
        if not self.example:
            return "no train prompt is in an evaluation split"
        where = ", ".join(f"{count} in {split}" for split, count in sorted(self.splits.items()))
        train, other, near = self.example
        like = "is the same as" if near == 1 else f"is nearly (Jaccard {near:.2f})"
        return (
            f"{len(self)} train prompts are in an evaluation split, too ({where}), such as "
            f"{_short(train)} ({train.source}), which {like} {_short(other)} ({other.source})"
        )


def find_leaks(train: Iterable[Prompt], evaluation: Sequence[Prompt], threshold: float, total: int | None) -> Leaks:
    """The train prompts with an equal evaluation prompt, or one whose Jaccard index is at least `threshold`."""
    found = Leaks()
    if not evaluation:
        return found
    held_apart = HeldApart(evaluation, threshold)
    with counting("looking for leaks", total) as progress:
        for prompt in train:
            if leak := held_apart.leak(prompt):
                found.add(leak)
            progress.advance()
    return found


class HeldApart:
    """The evaluation prompts, indexed."""

    def __init__(self, prompts: Sequence[Prompt], threshold: float) -> None:
        self._prompts, self._threshold = prompts, threshold
        self._equal = {normalised(said(prompt)): prompt for prompt in reversed(prompts)}
        parts = [shingles(said(prompt)) for prompt in prompts]
        common, frequent = templates(parts, [prompt.split for prompt in prompts])
        own = {place: each - frequent for place, each in enumerate(parts) if len(each - frequent) >= OWN_SHINGLES}
        rest = {place: each - common for place, each in enumerate(parts) if place not in own}
        rest = {place: each for place, each in rest.items() if len(each) >= FEWEST_SHINGLES}
        self._beyond = [_Beyond(frequent, own, threshold), _Beyond(common, rest, threshold)]

    def leak(self, train: Prompt) -> Leak | None:
        """The evaluation prompt that it comes nearest to, if that is near enough."""
        if equal := self._equal.get(normalised(said(train))):
            return Leak(train, equal, 1.0)
        if self._threshold == 1:
            return None
        mine = shingles(said(train))
        found = [near for beyond in self._beyond for near in beyond.near(mine)]
        place, jaccard = max(found, key=lambda near: (near[1], -near[0]), default=(0, 0.0))
        return Leak(train, self._prompts[place], jaccard) if jaccard else None


class _Beyond:
    """Evaluation prompts, by their place, that are compared without the same template."""

    def __init__(self, template: set[int], texts: dict[int, set[int]], threshold: float) -> None:
        self._template, self._texts, self._threshold = template, texts, threshold
        self._all = set[int]().union(*texts.values())
        self._index: NearIndex | None = None

    def near(self, text: set[int]) -> Iterable[tuple[int, float]]:
        """(place, Jaccard index) of those that are near."""
        mine = text - self._template
        # A near one holds at least this share of its shingles: nearly all train prompts end here, without a MinHash.
        if not mine or len(mine & self._all) < self._threshold * len(mine):
            return ()
        return self._indexed().near(mine)

    def _indexed(self) -> NearIndex:
        if self._index is None:
            self._index = NearIndex(self._threshold)
            for place, parts in self._texts.items():
                self._index.add(place, parts)
        return self._index


def _short(prompt: Prompt) -> str:
    text = " ".join(prompt.text.split())
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
