"""Soft labels of one completion, and a check of a whole training set of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blackbox_kd.align.vocab import UNMAPPABLE
from blackbox_kd.errors import AlignmentError

SIGMAS = 5.0
SLACK = 0.05
"""Share of the rows by which hits may miss what the labels promise, beyond SIGMAS standard deviations."""
NO_ID = 1 << 22
"""Above every token id."""


class SoftLabels(NamedTuple):
    """Row s is about student token s; masses are means over the rows at a shared cut (0 where there is none)."""

    ids: np.ndarray
    """(S, K + 1) int32 student ids, unique in a row; empty slots are id 0 with -inf."""
    logprobs: np.ndarray
    """(S, K + 1) float32 nats."""
    coverage: float
    """Share of student tokens that have a label."""
    captured: float
    """Mass that the endpoint showed: mapped + ambiguous + unmapped."""
    mapped: float
    """Mass in the labels."""
    ambiguous: float
    """Mass of candidates that a longer student token may swallow."""
    unmapped: float
    """Mass of candidates without an image: special tokens, unknown bytes."""


def check_not_shifted(labels: Sequence[SoftLabels], targets: Sequence[Sequence[int]]) -> None:
    """Whether labels belong to their tokens, over a whole training set: 0.9 of mass must hold the token 9 times in 10.

    A row with mapped mass m has the real token among its labels with a probability of at least m (it is drawn from the
    teacher; drawn at a lower temperature it is there more often), so hits >= sum m - 5 sd - 5% of the rows.

    Args:
        labels: of each completion.
        targets: the student's tokens of each completion, S each.

    Raises:
        AlignmentError: lengths differ, or there are fewer hits than that: labels are shifted or of another text.
    """
    hits, rows, promised, variance = 0, 0, 0.0, 0.0
    for label, ids in zip(labels, targets, strict=True):
        if len(label.ids) != len(ids):
            raise AlignmentError(f"a completion of {len(ids)} tokens has soft labels for {len(label.ids)}: align again")
        mass = np.minimum(np.exp(label.logprobs.astype(np.float64)).sum(1), 1.0)
        filled = label.logprobs > -np.inf
        rows += int(filled.any(1).sum())
        hits += int(((label.ids == np.asarray(ids).reshape(-1, 1)) & filled).any(1).sum())
        promised += float(mass.sum())
        variance += float((mass * (1 - mass)).sum())
    if hits < promised - SIGMAS * variance**0.5 - SLACK * rows:
        raise AlignmentError(
            f"the real token is among its soft labels in {hits} of {rows} rows where their mass promises "
            f"{promised:.0f}: the labels are shifted or belong to other texts, so nothing is trained on them"
        )


def soft_labels(size: int, rows: np.ndarray, image: np.ndarray, ambiguous: np.ndarray, p: np.ndarray) -> SoftLabels:
    """Adds up the masses of one image, by sorting each row by image."""
    count, width = image.shape
    ids, logprobs = np.zeros((size, width), np.int32), np.full((size, width), -np.inf, np.float32)
    unmapped = image == UNMAPPABLE
    kept = ~unmapped & ~ambiguous & (p > 0)
    shift = width.bit_length()
    key = np.sort(np.where(kept, image << shift | np.arange(width), NO_ID << shift), axis=1)
    sorted_image = key >> shift
    taken = np.where(kept, p, 0.0)[np.arange(count)[:, None], key & (1 << shift) - 1]
    new = np.concatenate([np.ones((count, 1), bool), sorted_image[:, 1:] != sorted_image[:, :-1]], 1)
    if count:
        mass = np.zeros(count * width)
        at = np.flatnonzero(new)
        mass[at] = np.add.reduceat(taken.ravel(), at)
        mass = mass.reshape(count, width)
        mass[sorted_image == NO_ID] = 0.0
        ids[rows] = np.where(mass > 0, sorted_image, 0)
        with np.errstate(divide="ignore"):
            logprobs[rows] = np.log(mass)
    labelled = np.count_nonzero((logprobs > -np.inf).any(1))
    captured, mapped, unclear, lost = (
        float(np.where(which, p, 0.0).sum() / max(count, 1)) for which in (True, kept, ambiguous & ~unmapped, unmapped)
    )
    return SoftLabels(ids, logprobs, labelled / max(size, 1), captured, mapped, unclear, lost)
