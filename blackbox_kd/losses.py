"""Loss components: pure functions of tensors. B batch, T tokens, V vocabulary.

Row t of every input is about the same predicted token: the caller shifts. Each component has its own weight stream
and its own normaliser, so that one batch of 8 gives the gradient of eight of 1.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F


class LossOut(NamedTuple):
    """A scalar to differentiate, and numbers to log (sums and counts are the caller's to combine)."""

    loss: torch.Tensor
    metrics: dict[str, float]


class Component(Protocol):
    """A loss that `student.update` can sum up."""

    def __call__(
        self,
        logits_BTV: torch.Tensor,
        targets_BT: torch.Tensor,
        weights_BT: torch.Tensor,
        *,
        normalizer: float,
    ) -> LossOut:
        """`logits_BTV[b, t]` predicts `targets_BT[b, t]`; the sum over `weights_BT` is divided by `normalizer`."""
        ...


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
    kept = weights_BT != 0
    nll_S = F.cross_entropy(logits_BTV[kept].float(), targets_BT[kept], reduction="none")
    loss = (nll_S * weights_BT[kept]).sum() / normalizer
    return LossOut(loss, {"nll": float(nll_S.detach().sum()) / normalizer})


COMPONENTS: dict[str, Component] = {"ce": cross_entropy}
"""By the name of the weight stream in `TrainSample.weights`."""
