"""Learning from pairs."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from blackbox_kd.losses.base import LossOut, at_least_float32, check_rows, means


def pair(
    chosen_logprobs_P: torch.Tensor,
    rejected_logprobs_P: torch.Tensor,
    ref_chosen_logprobs_P: torch.Tensor,
    ref_rejected_logprobs_P: torch.Tensor,
    *,
    beta: float,
    anchor: float = 0.0,
    normalizer: float | None = None,
    chosen_tokens: float | None = None,
) -> LossOut:
    """`- sum_p log sigmoid(m_p) / normalizer - anchor sum_p log q(chosen_p) / chosen_tokens`.

    The margin is `m = beta (log q(chosen)/ref(chosen) - log q(rejected)/ref(rejected))`: DPO (Rafailov et al. 2023,
    eq. 7) plus the NLL of the chosen answer, which keeps its likelihood from falling (Pang et al. 2024, eq. 1; TRL's
    `loss_type=["sigmoid", "sft"]` with weights 1 and `anchor`). It needs given tokens alone, so there is no tail.

    Args:
        chosen_logprobs_P: log q of the whole answer in nats: the sum of `token_logprobs` over its supervised tokens.
        rejected_logprobs_P: the same of the other answer.
        ref_chosen_logprobs_P: the same under the frozen reference.
        ref_rejected_logprobs_P: the same under the frozen reference.
        beta: how fast the margin saturates, 1/nats; 0.1 is usual.
        anchor: weight of the NLL.
        normalizer: pairs of the whole optimiser step; None: P.
        chosen_tokens: supervised tokens of all chosen answers of the whole optimiser step; needed with an anchor.

    Metrics are sums over the pairs / normaliser: `margin`, `accuracy` (where it is above 0), `chosen_reward` and
    `rejected_reward` (the two halves of the margin); with an anchor also `nll`, in nats per chosen token.

    Raises:
        ValueError: an anchor without `chosen_tokens`.
        AlignmentError: shapes do not match.
    """
    if anchor and chosen_tokens is None:
        raise ValueError(f"anchor is {anchor}, chosen_tokens None: count the supervised tokens of the chosen answers")
    rows = chosen_logprobs_P.shape
    check_rows(
        rows, rejected=rejected_logprobs_P, ref_chosen=ref_chosen_logprobs_P, ref_rejected=ref_rejected_logprobs_P
    )
    chosen_P, rejected_P = at_least_float32(chosen_logprobs_P), at_least_float32(rejected_logprobs_P)
    rewards_P = beta * (chosen_P - ref_chosen_logprobs_P.detach())
    others_P = beta * (rejected_P - ref_rejected_logprobs_P.detach())
    margin_P = rewards_P - others_P
    normalizer = float(max(len(margin_P), 1)) if normalizer is None else normalizer
    loss = -logsigmoid(margin_P).sum() / normalizer
    metrics = means(
        normalizer, margin=margin_P, accuracy=margin_P > 0, chosen_reward=rewards_P, rejected_reward=others_P
    )
    if anchor and chosen_tokens is not None:
        loss = loss - anchor * chosen_P.sum() / chosen_tokens
        metrics |= means(chosen_tokens, nll=-chosen_P)
    return LossOut(loss, metrics)


def bradley_terry(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, normalizer: float | None = None) -> LossOut:
    """`- sum_p log sigmoid(chosen_p - rejected_p) / normalizer` on scores of P pairs (Bradley and Terry 1952).

    As a reward model learns it (Ouyang et al. 2022, eq. 1), and the discriminator of GAD (2511.10643). Scores have no
    zero: adding the same number to both changes nothing.

    Args:
        chosen_P: scores of the better texts.
        rejected_P: of the others.
        normalizer: pairs of the whole optimiser step; None: P.

    Metrics: `margin` and `accuracy` (where it is above 0), sums over the pairs / normaliser.

    Raises:
        AlignmentError: shapes do not match.
    """
    check_rows(chosen_P.shape, rejected=rejected_P)
    margin_P = at_least_float32(chosen_P) - at_least_float32(rejected_P)
    normalizer = float(max(len(margin_P), 1)) if normalizer is None else normalizer
    loss = -logsigmoid(margin_P).sum() / normalizer
    return LossOut(loss, means(normalizer, margin=margin_P, accuracy=margin_P > 0))
