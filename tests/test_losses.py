"""Hard labels and log-probabilities of tokens: numbers worked by hand, and the invariances that the update rests on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blackbox_kd.errors import AlignmentError
from blackbox_kd.losses import cross_entropy, kept_topk, token_logprobs


def test_cross_entropy_of_worked_numbers() -> None:
    # q = (1/4, 3/4) at row 0 and (1/2, 1/2) at row 1; targets 1 and 0, weights 1 and 2, normaliser 3
    logits_BTV = torch.tensor([[[math.log(1.0), math.log(3.0)], [0.0, 0.0]]])
    out = cross_entropy(logits_BTV, torch.tensor([[1, 0]]), torch.tensor([[1.0, 2.0]]), normalizer=3)
    # loss = (1 * -log 3/4 + 2 * -log 1/2) / 3 = (0.287682 + 1.386294) / 3 = 0.557992
    assert out.loss.item() == pytest.approx(0.557992, abs=1e-6)
    # the metric is unweighted: (0.287682 + 0.693147) / 3 = 0.326943
    assert out.metrics == {"nll": pytest.approx(0.326943, abs=1e-6)}


def test_a_weight_of_zero_leaves_a_token_out() -> None:
    logits_BTV = torch.randn(2, 3, 5, requires_grad=True)
    targets_BT = torch.randint(5, (2, 3))
    weights_BT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    cross_entropy(logits_BTV, targets_BT, weights_BT, normalizer=3).loss.backward()
    assert logits_BTV.grad is not None
    assert (logits_BTV.grad.abs().sum(-1) > 0).tolist() == [[True, False, True], [False, False, True]]


def test_a_target_behind_a_zero_weight_may_be_anything() -> None:
    logits_BTV = torch.randn(1, 2, 5)
    loss = [
        cross_entropy(logits_BTV, torch.tensor([[2, other]]), torch.tensor([[1.0, 0.0]]), normalizer=1).loss.item()
        for other in (0, 4)
    ]
    assert loss[0] == loss[1]


def test_the_gradient_raises_the_target() -> None:
    logits_BTV = torch.zeros(1, 1, 4, requires_grad=True)
    cross_entropy(logits_BTV, torch.tensor([[2]]), torch.ones(1, 1), normalizer=1).loss.backward()
    assert logits_BTV.grad is not None
    # softmax - onehot = (1/4, 1/4, -3/4, 1/4)
    assert logits_BTV.grad.flatten().tolist() == pytest.approx([0.25, 0.25, -0.75, 0.25])


def test_one_batch_of_eight_is_eight_of_one() -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(8, 6, 11, dtype=torch.float64, requires_grad=True)
    targets_BT = torch.randint(11, (8, 6))
    weights_BT = torch.rand(8, 6, dtype=torch.float64) * torch.randint(2, (8, 6))
    normalizer = float((weights_BT != 0).sum())
    whole = cross_entropy(logits_BTV, targets_BT, weights_BT, normalizer=normalizer)
    (gradient,) = torch.autograd.grad(whole.loss, logits_BTV)
    parts = [
        cross_entropy(logits_BTV[i : i + 1], targets_BT[i : i + 1], weights_BT[i : i + 1], normalizer=normalizer)
        for i in range(8)
    ]
    (summed,) = torch.autograd.grad(torch.stack([part.loss for part in parts]).sum(), logits_BTV)
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-6)
    torch.testing.assert_close(summed, gradient)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(1)
    targets_BT, weights_BT = torch.randint(4, (2, 3)), torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 2.0]]).double()
    logits_BTV = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits_BTV: cross_entropy(logits_BTV, targets_BT, weights_BT, normalizer=4).loss, (logits_BTV,)
    )


def dense(logits_BTV: torch.Tensor, ids_BTK: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits_BTV / temperature).log_softmax(-1).gather(-1, ids_BTK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_logprobs_are_those_of_log_softmax(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(2)
    logits_BTV = torch.randn(2, 3, 50, dtype=dtype, requires_grad=True)
    ids_BTK = torch.randint(50, (2, 3, 7))  # an id may stand twice
    ids_BTK[0, 0] = 4
    grad_BTK = torch.randn(2, 3, 7, dtype=dtype)
    ours = token_logprobs(logits_BTV, ids_BTK, temperature=temperature)
    theirs = dense(logits_BTV, ids_BTK, temperature)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(out, logits_BTV, grad_BTK)[0] for out in (ours, theirs)))


def test_token_logprobs_take_any_leading_dimensions_and_strides() -> None:
    logits_BTV, ids_BTK = torch.randn(3, 4, 9), torch.randint(9, (3, 4, 2))
    expected = token_logprobs(logits_BTV, ids_BTK)
    torch.testing.assert_close(token_logprobs(logits_BTV[1], ids_BTK[1]), expected[1])
    torch.testing.assert_close(token_logprobs(logits_BTV[:, :-1], ids_BTK[:, :-1]), expected[:, :-1])
    turned = token_logprobs(logits_BTV.transpose(0, 1), ids_BTK.transpose(0, 1))
    torch.testing.assert_close(turned, expected.transpose(0, 1))


def test_what_is_masked_is_not_computed() -> None:
    logits_BTV = torch.randn(2, 3, 9).masked_fill(torch.tensor([[[False], [True], [False]]] * 2), math.nan)
    logits_BTV.requires_grad_()
    ids_BTK, mask_BT = torch.randint(9, (2, 3, 2)), torch.tensor([[1, 0, 1], [0, 0, 1]])
    ids_BTK[:, 1] = -100
    logprobs_BTK = token_logprobs(logits_BTV, ids_BTK, mask_BT)
    assert (logprobs_BTK.abs().sum(-1) > 0).int().tolist() == mask_BT.tolist()
    (gradient,) = torch.autograd.grad(logprobs_BTK.sum(), logits_BTV)
    assert (gradient.abs().sum(-1) > 0).int().tolist() == mask_BT.tolist()
    assert token_logprobs(logits_BTV, ids_BTK, torch.zeros(2, 3)).tolist() == torch.zeros(2, 3, 2).tolist()


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits_BTV = torch.randn(1, 2, 4096).bfloat16().requires_grad_()
    ids_BTK = torch.randint(4096, (1, 2, 3))
    logprobs_BTK = token_logprobs(logits_BTV, ids_BTK)
    torch.testing.assert_close(logprobs_BTK, dense(logits_BTV.float(), ids_BTK))
    (gradient,) = torch.autograd.grad(logprobs_BTK.sum(), logits_BTV)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("vocabulary", [7, 50_000])  # in one chunk, and in several
def test_the_likeliest_tokens_of_the_kept_rows(vocabulary: int) -> None:
    logits_BTV = torch.randn(3, 6, vocabulary, generator=torch.Generator().manual_seed(0))
    kept_BT = torch.arange(18).reshape(3, 6) % 5 != 0
    expected = logits_BTV[kept_BT].topk(4).indices
    assert torch.equal(kept_topk(logits_BTV, kept_BT, 4), expected)
    assert torch.equal(kept_topk(logits_BTV.transpose(0, 1).contiguous().transpose(0, 1), kept_BT, 4), expected)
    assert kept_topk(logits_BTV, kept_BT, 0).shape == (len(expected), 0)
    assert kept_topk(logits_BTV, torch.zeros_like(kept_BT), 4).shape == (0, 4)
    assert kept_topk(logits_BTV, kept_BT, 10**6).shape == (len(expected), vocabulary)


def test_gradcheck_of_token_logprobs() -> None:
    logits_BTV = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    ids_BTK, mask_BT = torch.randint(6, (2, 3, 4)), torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, ids_BTK, mask_BT, temperature=0.7), (logits_BTV,))


class Large(TorchDispatchMode):
    """Storages of results as large as the logits, other than theirs."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.storages = logits, set[int]()
        self.alive: list[torch.Tensor] = []  # so that no address is given out twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.logits.numel():
            self.storages.add(out.untyped_storage().data_ptr())
            self.storages.discard(self.logits.untyped_storage().data_ptr())
            self.alive.append(out)
        return out


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_gradient_is_the_only_large_tensor(share: float) -> None:
    logits_BTV = torch.randn(2, 40, 2**16, requires_grad=True)  # several chunks
    ids_BTK, mask_BT = torch.randint(2**16, (2, 40, 5)), torch.rand(2, 40) <= share
    with Large(logits_BTV) as forward:
        loss = token_logprobs(logits_BTV, ids_BTK, mask_BT).sum()
    with Large(logits_BTV) as backward:
        torch.autograd.grad(loss, logits_BTV)
    assert (len(forward.storages), len(backward.storages)) == (0, 1)


def test_rows_that_do_not_match_are_an_error() -> None:
    with pytest.raises(AlignmentError, match=r"ids_BTK has shape \(2, 2, 1\) for rows \(2, 3\)"):
        token_logprobs(torch.randn(2, 3, 5), torch.zeros(2, 2, 1, dtype=torch.long))
    with pytest.raises(AlignmentError, match="weights_BT"):
        cross_entropy(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(1, 3), normalizer=1)
