"""Rewards and pairs: numbers worked by hand, gradients, and what may not change the loss."""

from __future__ import annotations

import math

import pytest
import torch

from blackbox_kd.errors import AlignmentError
from blackbox_kd.losses import bradley_terry, group_advantages, pair, policy_gradient

ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("advantage", "clip", "loss", "clipped", "gradient"),
    [
        # q(y) = 1/2, q_old(y) = 1/4: r = 2, and d r / d z_y = r (1 - q) = 1
        (1.0, None, -2.0, 0.0, -1.0),
        (1.0, 0.2, -1.2, 1.0, 0.0),  # min(2, 1.2): already far enough in the right direction
        (-1.0, 0.2, 2.0, 0.0, 1.0),  # min(-2, -1.2): in the wrong direction, and still pulled back
        (1.0, 1.5, -2.0, 0.0, -1.0),  # within 1 +- 1.5
    ],
)
def test_policy_gradient_of_worked_numbers(
    advantage: float, clip: float | None, loss: float, clipped: float, gradient: float
) -> None:
    logits_BTV = torch.zeros(1, 1, 2, requires_grad=True)
    old = torch.tensor([[0.25]]).log()
    out = policy_gradient(logits_BTV, torch.tensor([[1]]), old, advantage * ONE, ONE / 2, clip=clip, normalizer=2)
    out.loss.backward()
    assert 4 * out.loss.item() == pytest.approx(loss)
    assert logits_BTV.grad is not None
    assert 4 * logits_BTV.grad[0, 0, 1].item() == pytest.approx(gradient)
    # metrics know no weights; 2 - 1 - log 2 = 0.306853
    assert out.metrics == pytest.approx({"ratio": 1.0, "clipped": clipped / 2, "old_kl": 0.306853 / 2}, abs=1e-6)


def test_on_policy_it_is_the_score_function() -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets_BT, advantages_BT = torch.randint(7, (2, 3)), torch.randn(2, 3).double()
    logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    for clip in (None, 0.2):
        out = policy_gradient(logits_BTV, targets_BT, logprobs_BT, advantages_BT, torch.ones(2, 3), clip=clip)
        (found,) = torch.autograd.grad(out.loss, logits_BTV)
        expected = torch.autograd.grad(-(advantages_BT * logprobs_BT).mean(), logits_BTV, retain_graph=True)
        torch.testing.assert_close(found, expected[0])
        assert out.metrics == pytest.approx({"ratio": 1.0, "clipped": 0.0, "old_kl": 0.0})


def batch(rows: int = 8) -> tuple[torch.Tensor, ...]:
    """Logits, targets, old logprobs (near the new), advantages and a mask, (B, 6)."""
    torch.manual_seed(1)
    logits_BTV, targets_BT = torch.randn(rows, 6, 11, dtype=torch.float64), torch.randint(11, (rows, 6))
    old_BT = logits_BTV.log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0] + 0.3 * torch.randn(rows, 6).double()
    return logits_BTV.requires_grad_(), targets_BT, old_BT, torch.randn(rows, 6).double(), torch.randint(2, (rows, 6))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_policy_gradient_of_eight_is_eight_of_one(clip: float | None) -> None:
    rows = batch()
    normalizer = float(rows[-1].sum())
    whole = policy_gradient(*rows, clip=clip, normalizer=normalizer)
    parts = [policy_gradient(*(each[i : i + 1] for each in rows), clip=clip, normalizer=normalizer) for i in range(8)]
    summed = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(summed, whole.loss)
    torch.testing.assert_close(*(torch.autograd.grad(loss, rows[0])[0] for loss in (summed, whole.loss)))
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, abs=1e-6)


def test_policy_gradient_does_not_see_what_is_masked() -> None:
    logits_BTV, targets_BT, old_BT, advantages_BT, mask_BT = batch(2)
    expected = policy_gradient(logits_BTV, targets_BT, old_BT, advantages_BT, mask_BT, clip=0.2)
    out_BT = mask_BT == 0
    spoilt = (
        logits_BTV.detach().masked_fill(out_BT[..., None], math.nan).requires_grad_(),
        targets_BT.masked_fill(out_BT, -100),
        *(each.masked_fill(out_BT, math.nan) for each in (old_BT, advantages_BT)),
    )
    found = policy_gradient(*spoilt, mask_BT, clip=0.2)
    assert found == expected
    assert torch.autograd.grad(found.loss, spoilt[0])[0].isfinite().all()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradcheck_of_policy_gradient(clip: float | None) -> None:
    logits_BTV, *others = batch(2)
    assert torch.autograd.gradcheck(lambda z: policy_gradient(z, *others, clip=clip).loss, (logits_BTV,))


def test_a_step_raises_what_was_rewarded() -> None:
    logits_BTV = torch.zeros(1, 2, 4, requires_grad=True)
    targets_BT, old_BT = torch.tensor([[1, 2]]), torch.full((1, 2), 1 / 4).log()
    policy_gradient(
        logits_BTV, targets_BT, old_BT, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), clip=None
    ).loss.backward()
    assert logits_BTV.grad is not None
    after = (logits_BTV - logits_BTV.grad).softmax(-1)[0]
    assert after[0, 1] > 1 / 4 > after[1, 2]


def test_advantages_of_worked_numbers() -> None:
    # (1, 2, 3): mean 2, deviation 1; all alike: 0; one judged answer has nobody to be compared with
    rewards = [[1.0, 2.0, math.nan, 3.0], [5.0, 5.0, 5.0, 5.0], [math.nan, 7.0, math.nan, math.nan], [math.nan] * 4]
    assert group_advantages(rewards).tolist() == [
        pytest.approx([-1 / 1.0001, 0, 0, 1 / 1.0001]), [0.0] * 4, [0.0] * 4, [0.0] * 4
    ]  # fmt: skip
    assert group_advantages(rewards, scale="none")[0].tolist() == [-1, 0, 0, 1]
    # about 33/8: (9.765625 + 4.515625 + 1.265625 + 4 * 0.765625 + 8.265625) / 7 = 3.839286, root 1.959410
    assert group_advantages(rewards, scale="batch")[0].tolist() == pytest.approx([-0.510332, 0, 0, 0.510332], abs=1e-6)


def logprobs(pairs: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [-20 * torch.rand(pairs, dtype=torch.float64) for _ in range(4)]


def test_pair_of_worked_numbers() -> None:
    rows = [torch.tensor([value], requires_grad=True) for value in (-2.0, -3.0, -2.5, -2.6)]
    out = pair(*rows, beta=0.5, anchor=0.1, normalizer=2, chosen_tokens=4)
    # rewards 0.5 (-2 + 2.5) = 0.25 and 0.5 (-3 + 2.6) = -0.2, margin 0.45; log(1 + e^-0.45) = 0.493248
    # loss = 0.493248 / 2 + 0.1 * 2 / 4 = 0.296624
    assert out.loss.item() == pytest.approx(0.296624, abs=1e-6)
    expected = {"margin": 0.225, "accuracy": 0.5, "chosen_reward": 0.125, "rejected_reward": -0.1, "nll": 0.5}
    assert out.metrics == pytest.approx(expected)
    out.loss.backward()
    # -0.5 sigmoid(-0.45) / 2 - 0.1 / 4 = -0.097340 - 0.025, the rejected without the anchor; none for the reference
    gradients = [row.grad for row in rows]
    assert [each.item() for each in gradients[:2] if each is not None] == pytest.approx([-0.122340, 0.097340], abs=1e-6)
    assert gradients[2:] == [None, None]


def test_pairs_of_eight_are_eight_of_one() -> None:
    rows = logprobs()
    options = {"beta": 0.3, "anchor": 0.2, "normalizer": 8, "chosen_tokens": 61}
    parts = [pair(*(row[i : i + 1] for row in rows), **options) for i in range(8)]  # type: ignore[arg-type]
    whole = pair(*rows, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.stack([part.loss for part in parts]).sum(), whole.loss)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_gradcheck_of_pair(anchor: float) -> None:
    chosen, rejected, *reference = (row.requires_grad_() for row in logprobs())
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: pair(
            chosen, rejected, *reference, beta=0.1, anchor=anchor, chosen_tokens=9
        ).loss, (chosen, rejected)
    )  # fmt: skip


def test_at_the_reference_a_pair_pulls_apart() -> None:
    rows = [torch.full((3,), -5.0, requires_grad=True) for _ in range(4)]
    out = pair(*rows, beta=0.1)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2))
    # -+ beta / 2 / P
    assert [row.grad.tolist() for row in rows[:2] if row.grad is not None] == [
        pytest.approx([-0.05 / 3] * 3), pytest.approx([0.05 / 3] * 3)
    ]  # fmt: skip


def test_what_would_go_wrong_silently_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"anchor is 0.1, chosen_tokens None"):
        pair(*logprobs(), beta=0.1, anchor=0.1)
    with pytest.raises(AlignmentError, match=r"ref_chosen has shape \(1,\) for rows \(8,\)"):
        pair(*logprobs()[:2], torch.zeros(1), torch.zeros(8), beta=0.1)
    with pytest.raises(AlignmentError, match="advantages has shape"):
        policy_gradient(torch.randn(2, 3, 4), *(torch.zeros(2, 3).long(),) * 2, torch.zeros(2, 1), ONE, clip=None)


def test_bradley_terry_is_of_differences_and_of_the_whole_step() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5], requires_grad=True), torch.tensor([0.0, 3.0, 0.5])
    whole = bradley_terry(chosen, rejected)
    assert float(whole.loss.detach()) == pytest.approx(
        sum(math.log1p(math.exp(-m)) for m in (1.0, -5.0, 0.0)) / 3, rel=1e-6
    )
    assert whole.metrics == {"margin": pytest.approx(-4 / 3), "accuracy": pytest.approx(1 / 3)}
    torch.testing.assert_close(bradley_terry(chosen + 7, rejected + 7).loss, whole.loss)
    parts = [bradley_terry(chosen[i : i + 1], rejected[i : i + 1], normalizer=3).loss for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole.loss)
    with pytest.raises(AlignmentError):
        bradley_terry(chosen, rejected[:2])
