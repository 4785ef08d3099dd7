"""What every component returns, and how it is normalised."""

from __future__ import annotations

from typing import NamedTuple

import torch

from blackbox_kd.errors import AlignmentError


class LossOut(NamedTuple):
    """A scalar to differentiate, and numbers to log (sums and counts are the caller's to combine)."""

    loss: torch.Tensor
    metrics: dict[str, float]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def counted(mask_BT: torch.Tensor, normalizer: float | None) -> float:
    """`normalizer`, or the rows that the mask keeps (1 where it keeps none: the loss is 0, not 0/0)."""
    return float(mask_BT.count_nonzero().clamp(min=1)) if normalizer is None else float(normalizer)


def means(normalizer: float, **sums: torch.Tensor) -> dict[str, float]:
    """Sums over `normalizer`, fetched from the device in one go."""
    values = torch.stack([each.detach().sum().float() for each in sums.values()]).tolist()
    return {name: value / normalizer for name, value in zip(sums, values, strict=True)}


def check_rows(rows: torch.Size, **tensors: torch.Tensor) -> None:
    """The shape of every tensor begins with `rows`.

    Raises:
        AlignmentError: one does not, and would be broadcast.
    """
    for name, tensor in tensors.items():
        if tensor.shape[: len(rows)] != rows:
            raise AlignmentError(f"{name} has shape {tuple(tensor.shape)} for rows {tuple(rows)}: shift and pad alike")
