"""How a round went: numbers that show a loop going wrong before its loss does. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from blackbox_kd.types import Rollout, TopK

SMALLEST = 1e-7
"""Mass that a tail is taken to have at least: logprobs are rounded."""


def of_rollouts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the student wrote: length in tokens, logprob and entropy a token, share of different word pairs, ..."""
    tokens = max(1, sum(len(r.completion_ids) for r in rollouts))
    return {
        "rollout_length": tokens / max(1, len(rollouts)),
        "rollout_logprob": sum(sum(r.logprobs) for r in rollouts) / tokens,
        "rollout_entropy": sum(float(entropy(r.top).sum()) for r in rollouts if r.top is not None) / tokens,
        "rollout_cut_off": sum(r.completion.finish_reason != "stop" for r in rollouts) / max(1, len(rollouts)),
        "rollout_logprob_gap": logprob_gap(rollouts),
        "distinct_2": distinct([r.completion.text for r in rollouts], 2),
    }


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last quarter of an update's losses: a batch by itself is mostly noise."""
    quarter = max(1, len(losses) // 4)
    return float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:]))


def logprob_gap(rollouts: Sequence[Rollout]) -> float:
    """Mean of a token: how far the log-probs that it was kept with are from those of the student that is trained.

    Rounding where the student drew it itself; a server draws with other kernels, or from another policy by mistake.
    """
    kept = [token.logprob for rollout in rollouts for token in rollout.completion.logprobs or ()]
    now = [logprob for rollout in rollouts if rollout.completion.logprobs for logprob in rollout.logprobs]
    return float(np.abs(np.subtract(kept, now)).mean()) if kept else 0.0


def entropy(top: TopK) -> np.ndarray:
    """(S,) nats: `- sum_k p_k log p_k` with all that is not among the K likeliest as one outcome.

    Never above the whole distribution's: merging outcomes loses entropy.
    """
    p_SK = np.exp(top.logprobs.astype(np.float64))
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


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams (Li et al. 2016, distinct-n); 1 where there are none."""
    grams = sum((grams_of(text, n) for text in texts), Counter[tuple[str, ...]]())
    return len(grams) / grams.total() if grams else 1.0


def grams_of(text: str, n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram of words stands in a text."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def of_rewards(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> dict[str, float]:
    """How groups were rewarded: mean, deviation within a group, and share of groups whose rewards are all equal.

    `reward_length_correlation` is that within groups (both less their group's mean), left out where either never
    differs. A judge that pays for length shows here first.
    """
    groups = [np.asarray(group, dtype=float) for group in rewards]
    found = {
        "reward": float(np.mean(np.concatenate(groups))),
        "reward_spread": float(np.mean([group.std() for group in groups])),
        "groups_equal": float(np.mean([np.ptp(group) == 0 for group in groups])),
    }
    correlation = _correlation(_centred(rewards), _centred(lengths))
    return found if correlation is None else found | {"reward_length_correlation": correlation}


def agreement(judge: Sequence[Sequence[float]], unseen: Sequence[Sequence[float]]) -> dict[str, float]:
    """Two judges on the same groups: their means, the mean difference, and how alike they rank within a group.

    `judge_rank_correlation` is Spearman's of the rewards less their group's mean; it is left out where a judge finds
    no difference anywhere.
    """
    one, other = np.concatenate([*map(np.asarray, judge)]), np.concatenate([*map(np.asarray, unseen)])
    found = {
        "judge_reward": float(one.mean()),
        "unseen_reward": float(other.mean()),
        "judge_difference": float((one - other).mean()),
    }
    correlation = _correlation(_ranks(_centred(judge)), _ranks(_centred(unseen)))
    return found if correlation is None else found | {"judge_rank_correlation": correlation}


def divergence(rounds: Sequence[tuple[float, float]]) -> float:
    """How far the unseen judge's mean reward fell, since the round that it liked best, while the judge's own rose.

    Args:
        rounds: (judge, unseen) of each round, in order; the last one is asked about. 0 where they do not part.
    """
    if len(rounds) < 2:
        return 0.0
    judge, unseen = rounds[-1]
    then_judge, then_unseen = max(rounds[:-1], key=lambda pair: pair[1])
    return max(0.0, then_unseen - unseen) if judge > then_judge else 0.0


def _centred(groups: Sequence[Sequence[float]]) -> np.ndarray:
    """All values, each less its group's mean; rounded, so that equal ones stay equal."""
    return np.round(np.concatenate([np.asarray(group, dtype=float) - np.mean(group) for group in groups]), 9)


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return ranks


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's; None where either is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if len(x) and np.ptp(x) > 0 and np.ptp(y) > 0 else None


def kl(logprobs: Sequence[Sequence[float]], start: Sequence[Sequence[float]]) -> float:
    """Mean of `exp(d) - 1 - d` a token, d = start - logprobs: an estimate of KL(policy to start) on its samples."""
    d = np.concatenate([np.asarray(b) - np.asarray(a) for a, b in zip(logprobs, start, strict=True)] or [np.zeros(0)])
    return float(np.mean(np.exp(d) - 1 - d)) if len(d) else 0.0


def by_depth(name: str, values: Sequence[float], depths: Sequence[float]) -> dict[str, float]:
    """Means in the first, middle and last third of texts; late tokens get noisier signals (2604.13016)."""
    third = np.minimum((np.asarray(depths) * 3).astype(int), 2)
    parts = {f"{name}_{part}": np.asarray(values)[third == i] for i, part in enumerate(("first", "middle", "last"))}
    return {key: float(part.mean()) for key, part in parts.items() if len(part)}


def least_kl(teacher: TopK, student: TopK) -> np.ndarray:
    """(S,) nats: the least KL(teacher to student) that both top-k allow. Never above the whole distributions'.

    Tokens that both show are compared as they are; those that only the teacher shows, as one outcome of mass a; all the
    rest as another. The student's mass b of the first outcome is not known, only that it is no more than what is
    outside its own top-k: of all b, the one with the least divergence counts. Merging outcomes only loses.
    """
    rows = zip(teacher.ids, teacher.logprobs, student.ids, student.logprobs, strict=True)
    return np.array([_least_kl(*row) for row in rows])


def _least_kl(ids: np.ndarray, log_p: np.ndarray, own_ids: np.ndarray, own: np.ndarray) -> float:
    known = {int(i): float(np.exp(q)) for i, q in zip(own_ids, own, strict=True) if np.isfinite(q)}
    shown = [(float(np.exp(p)), known.get(int(i))) for i, p in zip(ids, log_p, strict=True) if np.isfinite(p)]
    both = [(p, q) for p, q in shown if q is not None]
    a = sum(p for p, q in shown if q is None)
    rest_p = max(0.0, 1.0 - a - sum(p for p, _ in both))
    left_q = max(0.0, 1.0 - sum(q for _, q in both))
    hidden_q = max(0.0, 1.0 - sum(known.values()))
    b = min(hidden_q, left_q * a / (a + rest_p)) if a else 0.0
    outcomes = [*both, (a, max(b, SMALLEST)), (rest_p, max(left_q - b, SMALLEST))]
    return sum(p * float(np.log(p / q)) for p, q in outcomes if p > 0)
