"""Loss components by the name of their weight stream: what `losses` computes, fed from train samples.

A component sums over its weight stream and divides by its own normaliser, which counts the whole optimiser step:
supervised tokens, for `pair` pairs. So micro-batches and ranks do not change a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from blackbox_kd import losses
from blackbox_kd.losses import LossOut, Tail
from blackbox_kd.types import TrainSample


class Rows(NamedTuple):
    """A micro-batch of B samples; row t of each is about the same predicted token. N numbers the pairs."""

    logits_BTV: torch.Tensor
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor
    """Of the component that is computed."""
    teacher_ids_BTK: torch.Tensor
    teacher_logprobs_BTK: torch.Tensor
    """-inf in empty slots."""
    old_BT: torch.Tensor
    ref_BT: torch.Tensor
    pair_B: torch.Tensor
    """Number of a sample's pair, -1 for none."""


def ce(rows: Rows, *, normalizer: float) -> LossOut:
    """`losses.cross_entropy`."""
    return losses.cross_entropy(rows.logits_BTV, rows.targets_BT, rows.weights_BT, normalizer=normalizer)


def topk_kl(rows: Rows, *, normalizer: float, beta: float = 0.0, tail: Tail = "bucket") -> LossOut:
    """`losses.topk_kl`."""
    return losses.topk_kl(
        rows.logits_BTV,
        rows.teacher_ids_BTK,
        rows.teacher_logprobs_BTK,
        rows.weights_BT,
        beta=beta,
        tail=tail,
        normalizer=normalizer,
    )


def pg(rows: Rows, *, normalizer: float, clip: float | None = 0.2) -> LossOut:
    """`losses.policy_gradient`; the weights are the advantages."""
    return losses.policy_gradient(
        rows.logits_BTV,
        rows.targets_BT,
        rows.old_BT,
        rows.weights_BT,
        (rows.weights_BT != 0).float(),
        clip=clip,
        normalizer=normalizer,
    )


def pair(rows: Rows, *, normalizer: float, beta: float = 0.1) -> LossOut:
    """`losses.pair`; an NLL anchor is a `ce` stream on the chosen answer."""
    kept_BT = rows.weights_BT != 0
    logprobs_BT = losses.token_logprobs(rows.logits_BTV, rows.targets_BT.unsqueeze(-1), kept_BT).squeeze(-1)
    mine_B = kept_BT.any(1)
    pairs, number_B = torch.unique(rows.pair_B[mine_B], return_inverse=True)
    sums = []
    for values_BT in (logprobs_BT, rows.ref_BT):
        for side_BT in (rows.weights_BT > 0, rows.weights_BT < 0):
            sums_B = (values_BT * side_BT)[mine_B].sum(1)
            sums.append(sums_B.new_zeros(len(pairs)).index_add(0, number_B, sums_B))
    chosen, rejected, ref_chosen, ref_rejected = sums
    return losses.pair(chosen, rejected, ref_chosen, ref_rejected, beta=beta, normalizer=normalizer)


def count_tokens(samples: Sequence[TrainSample], name: str) -> int:
    """Tokens with a weight."""
    return sum(w != 0 for sample in samples for w in sample.weights.get(name, ()))


def count_taught(samples: Sequence[TrainSample], _: str) -> int:
    """Tokens that are taught by the text or by a soft label.

    Both losses are divided by all of them, as in `losses.mix`: each token weighs the same, however many have a label.
    """
    names = ("ce", "topk_kl")
    taught = ([sample.weights[name] for name in names if name in sample.weights] for sample in samples)
    return sum(any(token) for streams in taught for token in zip(*streams, strict=True))


def count_pairs(samples: Sequence[TrainSample], name: str) -> int:
    """Pairs in which anything has a weight."""
    return len({s.pair_id for s in samples if any(s.weights.get(name, ()))})


class Component(NamedTuple):
    """A loss that `student.update` can sum up."""

    loss: Callable[..., LossOut]
    normalizer: Callable[[Sequence[TrainSample], str], int]
    """Its normaliser over the samples of an optimiser step."""
    counted: Callable[[Sequence[TrainSample], str], int] = count_tokens
    """Of what its metrics are means, likewise."""


COMPONENTS: dict[str, Component] = {
    "ce": Component(ce, count_taught),
    "topk_kl": Component(topk_kl, count_taught),
    "pg": Component(pg, count_tokens),
    "pair": Component(pair, count_pairs, count_pairs),
}
"""By the name of the weight stream in `TrainSample.weights`."""
