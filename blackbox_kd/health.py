"""How a round went: numbers that show a loop going wrong before its loss does. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blackbox_kd.types import Rollout, TopK


def of_rollouts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the student wrote: length in tokens, mean logprob and entropy a token, share of different word pairs."""
    tokens = max(1, sum(len(r.completion_ids) for r in rollouts))
    return {
        "rollout_length": tokens / max(1, len(rollouts)),
        "rollout_logprob": sum(sum(r.logprobs) for r in rollouts) / tokens,
        "rollout_entropy": sum(float(entropy(r.top).sum()) for r in rollouts if r.top is not None) / tokens,
        "rollout_cut_off": sum(r.completion.finish_reason != "stop" for r in rollouts) / max(1, len(rollouts)),
        "distinct_2": distinct([r.completion.text for r in rollouts], 2),
    }


def entropy(top: TopK) -> np.ndarray:
    """(S,) nats: `- sum_k p_k log p_k` with all that is not among the K likeliest as one outcome.

    Never above the whole distribution's: merging outcomes loses entropy.
    """
    p_SK = np.exp(top.logprobs)
    rest_S = np.clip(1.0 - p_SK.sum(1), 0.0, 1.0)
    outcomes = np.concatenate([p_SK, rest_S[:, None]], axis=1)
    found: np.ndarray = -np.where(outcomes > 0, outcomes * np.log(np.maximum(outcomes, 1e-300)), 0.0).sum(1)
    return found


def overlap(one: TopK, other: TopK) -> float:
    """Mean over S places of the share of one's K likeliest tokens that is among the other's (2604.13016)."""
    shares = [
        len(set(a[np.isfinite(p)]) & set(b[np.isfinite(q)])) / max(1, np.isfinite(p).sum())
        for a, p, b, q in zip(one.ids, one.logprobs, other.ids, other.logprobs, strict=True)
    ]
    return float(np.mean(shares)) if shares else float("nan")


def by_depth(values: Sequence[np.ndarray], parts: int = 3) -> list[float]:
    """Mean over the first, ..., last part of each text's (S,) values; NaN is left out, and where nothing is left."""
    split = [np.array_split(each, parts) for each in values]
    pooled = [np.concatenate([each[i] for each in split] or [np.zeros(0)]) for i in range(parts)]
    return [float(np.nanmean(part)) if np.isfinite(part).any() else float("nan") for part in pooled]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams (Li et al. 2016, distinct-n); 1 where there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def kl(logprobs: Sequence[Sequence[float]], start: Sequence[Sequence[float]]) -> float:
    """Mean of `exp(d) - 1 - d` a token, d = start - logprobs: an estimate of KL(policy to start) on its samples."""
    d = np.concatenate([np.asarray(b) - np.asarray(a) for a, b in zip(logprobs, start, strict=True)] or [np.zeros(0)])
    return float(np.mean(np.exp(d) - 1 - d)) if len(d) else 0.0
