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
    """Row s is about student token s; masses are means over the rows that have a label (0 where there is none)."""

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
    """Mass left out because a longer student token may swallow the candidate."""
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


def soft_labels(
    size: int, rows: np.ndarray, image_RW: np.ndarray, share_RW: np.ndarray, p_RW: np.ndarray
) -> SoftLabels:
    """Adds up the shares of the masses of one image, by sorting each row by image."""
    count, width = p_RW.shape
    unmapped = image_RW == UNMAPPABLE
    p_kept = np.where(unmapped, 0.0, p_RW * share_RW)
    kept = p_kept > 0
    shift = width.bit_length()
    key = np.sort((np.where(kept, image_RW, NO_ID) << shift) | np.arange(width), axis=1)
    image, column = key >> shift, key & ((1 << shift) - 1)
    new = np.ones((count, width), bool)
    np.not_equal(image[:, 1:], image[:, :-1], out=new[:, 1:])
    ids, logprobs = np.zeros((size, width), np.int32), np.full((size, width), -np.inf, np.float32)
    if count:
        at = np.flatnonzero(new)
        mass = np.add.reduceat(np.take(p_kept, column + width * np.arange(count)[:, None]).ravel(), at)
        at, mass = at[mass > 0], mass[mass > 0]
        places = rows[at // width] * width + at % width
        ids.ravel()[places] = image.ravel()[at]
        logprobs.ravel()[places] = np.log(mass)
    labelled_R = kept.any(1)
    captured, mapped, lost = (p[labelled_R].sum() for p in (p_RW, p_kept, np.where(unmapped, p_RW, 0.0)))
    labelled = int(labelled_R.sum())
    means = [float(total) / max(labelled, 1) for total in (captured, mapped, captured - mapped - lost, lost)]
    return SoftLabels(ids, logprobs, labelled / max(size, 1), *means)
