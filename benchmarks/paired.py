"""The interval of one arm minus another, over seeds and prompts that both share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 4000


def minus(
    arm: Sequence[Sequence[float]], other: Sequence[Sequence[float]], weights: Sequence[float]
) -> tuple[float, float, float]:
    """Mean of `arm - other` with its 95% interval: seeds and prompts drawn with replacement, each by itself.

    All seeds are measured on the same prompts, so a draw of prompts is one for all of its seeds: drawn for each seed
    anew, prompts that are hard for every one of them would count as independent evidence.
    `arm` and `other` are (seeds, prompts) of sums over a prompt's tokens, `weights` how many tokens a prompt has.
    """
    apart, over = np.asarray(arm) - np.asarray(other), np.asarray(weights, dtype=float)
    if apart.shape[1:] != over.shape:
        raise ValueError(f"{apart.shape[1:]} prompts with {over.shape} weights")
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, len(apart), (DRAWS, len(apart)))
    prompts = rng.integers(0, len(over), (DRAWS, 1, len(over)))
    drawn = apart[seeds[..., None], prompts].sum(2) / over[prompts].sum(2)
    lo, hi = np.percentile(drawn.mean(1), [2.5, 97.5])
    return float((apart.sum(1) / over.sum()).mean()), float(lo), float(hi)
