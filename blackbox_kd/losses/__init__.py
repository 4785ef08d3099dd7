"""Losses: pure functions of tensors. B batch, T tokens, V vocabulary, K top-k, S kept tokens.

Row t of every input is about the same predicted token: the caller shifts (the ids, not the logits: a slice of logits
costs autograd another (B, T, V)). Each takes its own weights and its own normaliser, so that one batch of 8 gives the
gradient of eight of 1 (`student.components`). Computed in float32 (float64 for float64 logits), whatever the dtype of
the model.

    base       LossOut, masks and normalisers
    logprobs   log q of given tokens, without a second (B, T, V)
    distil     cross_entropy, topk_kl and their mixture
    policy     policy_gradient, group_advantages
    preference pair, bradley_terry
"""

from blackbox_kd.losses.base import LossOut
from blackbox_kd.losses.distil import TAILS, Tail, cross_entropy, divergence, mix, topk_kl
from blackbox_kd.losses.logprobs import kept_logprobs, kept_topk, token_logprobs
from blackbox_kd.losses.policy import group_advantages, policy_gradient
from blackbox_kd.losses.preference import bradley_terry, pair

__all__ = [
    "TAILS", "LossOut", "Tail", "bradley_terry", "cross_entropy", "divergence", "group_advantages", "kept_logprobs",
    "kept_topk", "mix", "pair", "policy_gradient", "token_logprobs", "topk_kl",
]  # fmt: skip
