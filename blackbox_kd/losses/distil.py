"""Distillation on given tokens: hard labels, the teacher's top-k, and their mixture."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from blackbox_kd.errors import AlignmentError, ConfigError
from blackbox_kd.losses.base import LossOut, at_least_float32, check_rows, counted, means
from blackbox_kd.losses.logprobs import kept_logprobs

Tail = Literal["bucket", "renormalise", "none"]
TAILS: tuple[Tail, ...] = get_args(Tail)

SMALLEST_TAIL = 1e-7
"""Mass of a tail below which rounding decides in float32; also TRL's bound."""


def cross_entropy(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, weights_BT: torch.Tensor, *, normalizer: float
) -> LossOut:
    """`- sum_t w_t log q(y_t) / normalizer`: sequence-level distillation (Kim & Rush 2016, eq. 4) on given tokens.

    Args:
        logits_BTV: student logits for the token in the same row of `targets_BT`.
        targets_BT: token ids.
        weights_BT: 0 leaves a token out; nothing is computed for it.
        normalizer: supervised tokens of the whole optimiser step, over all micro-batches and ranks.

    The mean NLL is in nats per supervised token.
    """
    check_rows(logits_BTV.shape[:-1], targets_BT=targets_BT, weights_BT=weights_BT)
    kept_BT = weights_BT != 0
    nll_S = -kept_logprobs(logits_BTV, targets_BT[kept_BT].unsqueeze(-1), kept_BT).squeeze(-1)
    return LossOut((nll_S * weights_BT[kept_BT]).sum() / normalizer, means(normalizer, nll=nll_S))


def topk_kl(
    student_logits_BTV: torch.Tensor,
    teacher_ids_BTK: torch.Tensor,
    teacher_logprobs_BTK: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    beta: float,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    normalizer: float | None = None,
) -> LossOut:
    """`sum_t w_t D_beta(p_t, q_t) / normalizer` between the teacher's top-k p and the student q; see `divergence`.

    Args:
        student_logits_BTV: logits for the token that the same row of the teacher is about.
        teacher_ids_BTK: the teacher's candidates in the student's ids, unique within a row; id 0 in an empty slot.
        teacher_logprobs_BTK: their log p in nats at temperature 1; -inf in an empty slot.
        mask_BT: w, usually 0 or 1. Rows where it is 0 are not computed, and may hold anything.
        beta: as in TRL: 0 is the forward KL(p||q), 1 the reverse KL(q||p), between them the generalized JSD
            (Agarwal et al. 2024, eq. 1).
        tail: what becomes of the mass outside the top-k, see `divergence`.
        temperature: divides the student's logits and the teacher's log p. What the tail's mass would be at another
            temperature than 1 cannot be known from a top-k, so `bucket` refuses; under `none` the teacher's p^(1/t)
            lack the tail's part of their normaliser. The loss is not multiplied by temperature^2.
        normalizer: rows of the whole optimiser step; None: those that `mask_BT` keeps.

    Metrics are unweighted sums over the kept rows / normaliser: `kl` (the divergence, in nats), `teacher_mass` (of the
    top-k, at temperature 1) and `student_mass` (on the same ids, at `temperature`).

    Raises:
        ConfigError: beta, tail or temperature (a ValueError, too).
        AlignmentError: shapes do not match, or the mask keeps a row without any candidate.
    """
    _check(beta, tail, temperature)
    check_rows(student_logits_BTV.shape[:-1], teacher_ids=teacher_ids_BTK, mask=mask_BT)
    check_rows(teacher_ids_BTK.shape, teacher_logprobs=teacher_logprobs_BTK)
    kept_BT = mask_BT != 0
    teacher_SK = at_least_float32(teacher_logprobs_BTK[kept_BT])
    student_SK = kept_logprobs(student_logits_BTV, teacher_ids_BTK[kept_BT], kept_BT, temperature)
    kl_S = divergence(teacher_SK / temperature, student_SK, beta=beta, tail=tail)
    normalizer = counted(mask_BT, normalizer)
    student_mass_SK = student_SK.exp().where(teacher_SK > -math.inf, 0.0)
    return LossOut(
        (kl_S * mask_BT[kept_BT]).sum() / normalizer,
        means(normalizer, kl=kl_S, teacher_mass=teacher_SK.exp(), student_mass=student_mass_SK),
    )


def divergence(
    teacher_logprobs_SK: torch.Tensor, student_logprobs_SK: torch.Tensor, *, beta: float, tail: Tail
) -> torch.Tensor:
    """(S,) generalized JSD in nats of each row, over the teacher's top-k.

        beta = 0        sum_k p_k (log p_k - log q_k)
        beta = 1        sum_k q_k (log q_k - log p_k)
        between them    beta KL(p||m) + (1 - beta) KL(q||m),  m = beta p + (1 - beta) q

    tail:
        bucket          one more term on both sides, `1 - sum_k` of each, at least 1e-7 (there its gradient ends). To
                        add up before comparing only loses (data-processing inequality): it is never above the
                        divergence of the whole distributions, and least at q = p.
        renormalise     p and q are divided by their mass on the top-k. Says nothing of the mass outside; 0 for k = 1.
        none            the tail is left out, nothing is renormalised. Can be negative; at beta = 0 it is least with all
                        of the student's mass on the top-k.

    Args:
        teacher_logprobs_SK: log p; -inf in an empty slot, whose student log q may be any finite number.
        student_logprobs_SK: log q of the same tokens, differentiable.

    Raises:
        AlignmentError: a row has no candidate.
    """
    filled_SK = teacher_logprobs_SK > -math.inf
    if not filled_SK.any(-1).all():
        empty = int((~filled_SK.any(-1)).sum())
        raise AlignmentError(f"{empty} of {len(filled_SK)} rows under the mask have no teacher logprob: mask them out")
    log_p, log_q = teacher_logprobs_SK, student_logprobs_SK.masked_fill(~filled_SK, -math.inf)
    if tail == "bucket":
        log_p, log_q = _with_bucket(log_p), _with_bucket(log_q)
    elif tail == "renormalise":
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    filled = log_p > -math.inf
    log_p, log_q = log_p.where(filled, 0.0), log_q.where(filled, 0.0)  # so that no gradient is 0 * inf
    return _generalized_jsd(log_p, log_q, beta).where(filled, 0.0).sum(-1)


def _with_bucket(logprobs_SK: torch.Tensor) -> torch.Tensor:
    """(S, K + 1): log of what is missing to 1 behind them. Rounded API logprobs can sum to more than 1."""
    mass_S1 = logprobs_SK.logsumexp(-1, keepdim=True).clamp(max=-SMALLEST_TAIL)
    return torch.cat([logprobs_SK, mass_S1.expm1().neg().log()], -1)


def _generalized_jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """The terms of the sum."""
    if beta == 0:
        return log_p.exp() * (log_p - log_q)
    if beta == 1:
        return log_q.exp() * (log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def _check(beta: float, tail: str, temperature: float) -> None:
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta is {beta}: it goes from 0 (forward KL) to 1 (reverse KL)")
    if tail not in TAILS:
        raise ConfigError(f"tail is {tail!r}: it is one of {', '.join(TAILS)}")
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}: it must be above 0")
    if temperature != 1 and tail == "bucket":
        raise ConfigError(
            f"temperature is {temperature}, but a tail of known mass has another one there: "
            "name how it is to be treated, tail renormalise or none, or keep temperature 1"
        )


def mix(alpha: float, supervised_BT: torch.Tensor, labelled_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) weights of `cross_entropy` and of `topk_kl` for Hinton's mixture (Hinton et al. 2015, section 2).

    A supervised token with a soft label has `alpha` of the hard label and `1 - alpha` of the soft one; without one it
    is hard only. Give both losses the count of supervised tokens as normaliser: then each token weighs 1.

    Args:
        alpha: share of the cross-entropy where there is a soft label, in [0, 1].
        supervised_BT: nonzero where a token is learnt.
        labelled_BT: nonzero where the teacher gave at least one candidate, as `(logprobs_BTK > -inf).any(-1)`.

    Raises:
        ConfigError: alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: it is the share of the hard labels, from 0 to 1")
    hard_BT = (supervised_BT != 0).float()
    soft_BT = hard_BT * (labelled_BT != 0)
    return hard_BT - (1 - alpha) * soft_BT, (1 - alpha) * soft_BT
