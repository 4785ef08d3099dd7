"""Log-probabilities of given tokens from logits, in the memory of one gradient.

log_softmax keeps a (B, T, V) for backward and autograd adds two more. Here forward keeps the logits that are there
anyway and one number a row; backward fills the one gradient that the model needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from blackbox_kd.losses.base import at_least_float32, check_rows

Rows = tuple[torch.Tensor, ...]
"""Index tensors of length S, one for each leading dimension of the logits."""


def token_logprobs(
    logits_BTV: torch.Tensor,
    ids_BTK: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """(B, T, K) `log q_k = z_k / temperature - logsumexp_V(z / temperature)` in nats, differentiable once.

    Leading dimensions are free: (S, V) with (S, K) works, too. An id may stand twice in a row. No (B, T, V) is made but
    the gradient.

    Args:
        logits_BTV: z; any floating dtype.
        ids_BTK: token ids; behind the mask any id will do.
        mask_BT: rows where it is 0 are not computed: 0 comes out and no gradient goes in. None keeps all.
        temperature: of the softmax.

    Raises:
        AlignmentError: rows of the arguments do not match.
    """
    if mask_BT is None:
        mask_BT = torch.ones(logits_BTV.shape[:-1], dtype=torch.bool, device=logits_BTV.device)
    check_rows(logits_BTV.shape[:-1], ids_BTK=ids_BTK, mask_BT=mask_BT)
    kept_BT = mask_BT != 0
    logprobs_SK = kept_logprobs(logits_BTV, ids_BTK[kept_BT], kept_BT, temperature)
    return logprobs_SK.new_zeros(ids_BTK.shape).index_put(kept_BT.nonzero(as_tuple=True), logprobs_SK)


def kept_logprobs(
    logits_BTV: torch.Tensor, ids_SK: torch.Tensor, kept_BT: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """(S, K) of `token_logprobs` for the S rows where `kept_BT` is true, in their order."""
    rows: Rows = kept_BT.nonzero(as_tuple=True)
    if len(ids_SK) == kept_BT.numel() and logits_BTV.is_contiguous():  # then chunks are views, without a copy
        logits_BTV, rows = logits_BTV.view(-1, logits_BTV.shape[-1]), ()
    return _TokenLogprobs.apply(logits_BTV, ids_SK, temperature, *rows)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def kept_topk(logits_BTV: torch.Tensor, kept_BT: torch.Tensor, k: int) -> torch.Tensor:
    """(S, K) ids of the likeliest tokens where `kept_BT` is true, the likeliest first; K is at most V."""
    rows: Rows = kept_BT.nonzero(as_tuple=True)
    ids_SK = rows[0].new_empty(len(rows[0]), min(k, logits_BTV.shape[-1]))
    for part, chosen in _chunks(logits_BTV, len(ids_SK), rows) if k else ():
        ids_SK[part] = logits_BTV[chosen].topk(ids_SK.shape[1]).indices
    return ids_SK


class _TokenLogprobs(torch.autograd.Function):
    """d log q_k / d z_v = (1[k = v] - q_v) / temperature. Without `rows`, all of (S, V) logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTV: torch.Tensor, ids_SK: torch.Tensor, temperature: float, *rows: torch.Tensor
    ) -> Any:
        dtype = torch.float64 if logits_BTV.dtype == torch.float64 else torch.float32
        logprobs_SK = torch.empty(ids_SK.shape, dtype=dtype, device=logits_BTV.device)
        logsumexp_S1 = logprobs_SK.new_empty(len(ids_SK), 1)
        for part, chosen in _chunks(logits_BTV, len(ids_SK), rows):
            logits_CV = _scaled(logits_BTV[chosen], temperature)
            torch.logsumexp(logits_CV, -1, keepdim=True, out=logsumexp_S1[part])
            torch.gather(logits_CV, 1, ids_SK[part], out=logprobs_SK[part])
        ctx.save_for_backward(logits_BTV, ids_SK, logsumexp_S1, *rows)
        ctx.temperature = temperature
        return logprobs_SK.sub_(logsumexp_S1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SK: torch.Tensor) -> Any:
        logits_BTV, ids_SK, logsumexp_S1, *rows = ctx.saved_tensors
        grad_SK = grad_SK / ctx.temperature
        total_S1 = grad_SK.sum(-1, keepdim=True)
        grad_BTV = torch.zeros_like(logits_BTV) if rows else torch.empty_like(logits_BTV)
        for part, chosen in _chunks(logits_BTV, len(ids_SK), tuple(rows)):
            logprobs_CV = _scaled(logits_BTV[chosen], ctx.temperature) - logsumexp_S1[part]
            grad_CV = logprobs_CV.exp_().mul_(-total_S1[part])
            grad_BTV[chosen] = grad_CV.scatter_add_(1, ids_SK[part], grad_SK[part]).to(grad_BTV.dtype)
        return grad_BTV, None, None, *(None for _ in rows)


def _chunks(logits_BTV: torch.Tensor, count: int, rows: Rows) -> Iterator[tuple[slice, Rows | slice]]:
    """Where a chunk lies among the S rows, and in the logits (which need not be contiguous)."""
    size = max(1, _chunk_size(logits_BTV.device) // logits_BTV.shape[-1])
    for start in range(0, count, size):
        part = slice(start, start + size)
        yield part, tuple(index[part] for index in rows) or part


def _chunk_size(device: torch.device) -> int:
    """Logits worked on at once: one thread is fastest in its cache, several and accelerators with few large steps.

    Small steps on several threads cost little on idle cores, but five times as much on busy ones.
    """
    if device.type != "cpu":
        return 2**24
    return 2**18 if torch.get_num_threads() == 1 else 2**22


def _scaled(logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    """In the dtype of the computation; may be a view of the logits."""
    logits_CV = at_least_float32(logits_CV)
    return logits_CV if temperature == 1 else logits_CV / temperature
