"""Runs of tokens that spell the same in two tokenisations of a text: between two neighbouring common cuts. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Tokens of both sides, from the first to behind the last."""

    student: slice
    teacher: slice


def common_spans(student_starts: np.ndarray, teacher_starts: np.ndarray, size: int) -> list[Span]:
    """Spans of a text of `size` bytes whose tokens start at these bytes, in order; what starts at its end is in none.

    A token whose length is not known shares its start with the one before: then the cut between them is none.
    """
    cuts = np.append(np.intersect1d(student_starts, teacher_starts), size)
    cuts = np.unique(cuts[(cuts >= 0) & (cuts <= size)])
    sides = [np.searchsorted(starts, cuts).tolist() for starts in (student_starts, teacher_starts)]
    return [Span(slice(*s), slice(*t)) for s, t in zip(*map(pairwise, sides), strict=True)]
