"""Loss components against numbers worked by hand, and the invariances that the update rests on."""

from __future__ import annotations

import math

import pytest
import torch

from blackbox_kd.losses import COMPONENTS, cross_entropy


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


@pytest.mark.parametrize("name", COMPONENTS)
def test_one_batch_of_eight_is_eight_of_one(name: str) -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(8, 6, 11, dtype=torch.float64, requires_grad=True)
    targets_BT = torch.randint(11, (8, 6))
    weights_BT = torch.rand(8, 6, dtype=torch.float64) * torch.randint(2, (8, 6))
    normalizer = float((weights_BT != 0).sum())
    whole = COMPONENTS[name](logits_BTV, targets_BT, weights_BT, normalizer=normalizer)
    (gradient,) = torch.autograd.grad(whole.loss, logits_BTV)
    parts = [
        COMPONENTS[name](logits_BTV[i : i + 1], targets_BT[i : i + 1], weights_BT[i : i + 1], normalizer=normalizer)
        for i in range(8)
    ]
    (summed,) = torch.autograd.grad(torch.stack([part.loss for part in parts]).sum(), logits_BTV)
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-6)
    torch.testing.assert_close(summed, gradient)


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    torch.manual_seed(1)
    targets_BT, weights_BT = torch.randint(4, (2, 3)), torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 2.0]]).double()

    class Double(torch.nn.Module):  # the component computes in float32, which gradcheck cannot resolve
        def forward(self, logits_BTV: torch.Tensor) -> torch.Tensor:
            return COMPONENTS[name](logits_BTV, targets_BT, weights_BT, normalizer=4).loss

    logits_BTV = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Double(), (logits_BTV,), eps=1e-3, atol=1e-3)
