"""Learning from rewards: advantages within a group, and the policy gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from blackbox_kd.losses.base import LossOut, at_least_float32, check_rows, counted, means
from blackbox_kd.losses.logprobs import kept_logprobs


def policy_gradient(
    logits_BTV: torch.Tensor,
    targets_BT: torch.Tensor,
    old_logprobs_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip: float | None,
    normalizer: float | None = None,
) -> LossOut:
    """`- sum_t w_t min(r_t A_t, clamp(r_t, 1 - clip, 1 + clip) A_t) / normalizer`, with `r_t = q(y_t) / q_old(y_t)`.

    PPO's clipped objective (Schulman et al. 2017, eq. 7) for each token; `clip=None` is the importance-weighted policy
    gradient `- sum_t w_t r_t A_t / normalizer`. It needs the drawn token alone, so there is no tail.

    Args:
        logits_BTV: student logits for the token in the same row of `targets_BT`.
        targets_BT: the tokens that the student drew.
        old_logprobs_BT: their log q in nats under the policy that drew them.
        advantages_BT: A, without gradient.
        mask_BT: w, usually 0 or 1. Rows where it is 0 are not computed, and may hold anything.
        clip: how far from 1 a ratio is still pushed; 0.2 is usual.
        normalizer: tokens of the whole optimiser step; None: those that `mask_BT` keeps.

    Metrics are sums over the kept rows / normaliser: `ratio`, `clipped` (where the clip stops the gradient), and
    `old_kl`, the estimate `r - 1 - log r` of KL(q_old||q) in nats (never negative).

    Raises:
        AlignmentError: shapes do not match.
    """
    rows = logits_BTV.shape[:-1]
    check_rows(rows, targets=targets_BT, old_logprobs=old_logprobs_BT, advantages=advantages_BT, mask=mask_BT)
    kept_BT = mask_BT != 0
    logprobs_S = kept_logprobs(logits_BTV, targets_BT[kept_BT].unsqueeze(-1), kept_BT).squeeze(-1)
    log_ratio_S = logprobs_S - old_logprobs_BT[kept_BT].detach()
    ratio_S, advantages_S = log_ratio_S.exp(), advantages_BT[kept_BT].detach()
    gain_S = ratio_S * advantages_S
    clipped_S = torch.zeros_like(gain_S, dtype=torch.bool)
    if clip is not None:
        bounded_S = ratio_S.clamp(1 - clip, 1 + clip) * advantages_S
        clipped_S = bounded_S < gain_S
        gain_S = torch.minimum(gain_S, bounded_S)
    normalizer = counted(mask_BT, normalizer)
    return LossOut(
        -(gain_S * mask_BT[kept_BT]).sum() / normalizer,
        means(normalizer, ratio=ratio_S, clipped=clipped_S, old_kl=ratio_S - 1 - log_ratio_S),
    )


def group_advantages(
    rewards_PG: torch.Tensor | Sequence[Sequence[float]], *, scale: Literal["group", "batch", "none"] = "group"
) -> torch.Tensor:
    """(P, G) `(r - mean_G r) / (std r + 1e-4)` of GRPO (Shao et al. 2024, section 4.1.2), as TRL computes it.

    Args:
        rewards_PG: G rewards for each of P prompts. NaN is an answer that could not be judged (or fills up a smaller
            group): it counts in no mean, and its advantage is 0.
        scale: whose standard deviation divides (with n - 1): the group's, that of all rewards, or none
            (Liu et al. 2025, Dr. GRPO).
    """
    rewards_PG = at_least_float32(torch.as_tensor(rewards_PG))
    advantages_PG = rewards_PG - rewards_PG.nanmean(-1, keepdim=True)
    if scale != "none":
        spread = _nanstd(rewards_PG) if scale == "group" else _nanstd(rewards_PG.reshape(1, -1))
        advantages_PG = advantages_PG / (spread + 1e-4)
    return advantages_PG.masked_fill(advantages_PG.isnan(), 0.0)


def _nanstd(x_PG: torch.Tensor) -> torch.Tensor:
    """(P, 1) sample deviations; NaN where there is one number or none."""
    count_P1 = (~x_PG.isnan()).sum(-1, keepdim=True)
    squares_P1 = (x_PG - x_PG.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares_P1 / (count_P1 - 1)).sqrt()
