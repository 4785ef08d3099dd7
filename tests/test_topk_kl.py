"""Soft labels: numbers worked by hand, bounds, gradients, and what may not change the loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blackbox_kd.errors import AlignmentError, ConfigError
from blackbox_kd.losses import TAILS, Tail, cross_entropy, divergence, mix, topk_kl

EVERYTHING = [(beta, tail) for beta in (0.0, 0.3, 0.5, 1.0) for tail in TAILS]


def draw(
    rows: int, vocab: int, k: int, *, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Student logits (1, T, V), teacher log p (1, T, V), and its top-k: ids and log p (1, T, K)."""
    student, teacher = (scale * torch.randn(1, rows, vocab, dtype=dtype) for _ in range(2))
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return student, teacher.log_softmax(-1), ids, logprobs


def dense(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalized JSD of whole distributions, from its definition."""

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


# q = (1/2, 1/4, 1/8, 1/8); teacher: 0.6 on id 1, 0.2 on id 0, 0.2 elsewhere, where q has 1/4
STUDENT = torch.tensor([[[1 / 2, 1 / 4, 1 / 8, 1 / 8]]]).log()
IDS, LOGPROBS = torch.tensor([[[1, 0, 0]]]), torch.tensor([[[0.6, 0.2, 0.0]]]).log()  # the last slot is empty


@pytest.mark.parametrize(
    ("beta", "tail", "temperature", "loss"),
    [
        # 0.6 log(0.6/0.25) + 0.2 log(0.2/0.5) + 0.2 log(0.2/0.25) = 0.525281 - 0.183258 - 0.044629
        (0.0, "bucket", 1.0, 0.297394),
        # 0.25 log(0.25/0.6) + 0.5 log(0.5/0.2) + 0.25 log(0.25/0.2) = -0.218867 + 0.458145 + 0.055786
        (1.0, "bucket", 1.0, 0.295064),
        # m = (0.425, 0.35, 0.225): KL(p||m) = 0.206904 - 0.111923 - 0.023557 = 0.071424,
        # KL(q||m) = -0.132657 + 0.178337 + 0.026340 = 0.072020; half of each
        (0.5, "bucket", 1.0, 0.071722),
        # p = (3/4, 1/4), q = (1/3, 2/3): 0.75 log(9/4) + 0.25 log(3/8) = 0.608198 - 0.245207
        (0.0, "renormalise", 1.0, 0.362990),
        # as in the first line, without its last term
        (0.0, "none", 1.0, 0.342023),
        # roots: p = (0.633975, 0.366025), q = (0.414214, 0.585786): 0.269837 - 0.172124
        (0.0, "renormalise", 2.0, 0.097712),
        # q = roots / (0.707107 + 0.5 + 2 * 0.353553) = (0.261204, 0.369398), p = roots = (0.774597, 0.447214):
        # 0.774597 log(0.774597/0.261204) + 0.447214 log(0.447214/0.369398) = 0.842019 + 0.085490
        (0.0, "none", 2.0, 0.927509),
    ],
)
def test_worked_numbers(beta: float, tail: Tail, temperature: float, loss: float) -> None:
    mask = torch.ones(1, 1)
    out = topk_kl(STUDENT, IDS, LOGPROBS, mask, beta=beta, tail=tail, temperature=temperature, normalizer=4)
    assert 4 * out.loss.item() == pytest.approx(loss, abs=2e-6)
    assert 4 * out.metrics["kl"] == pytest.approx(loss, abs=2e-6)
    assert 4 * out.metrics["teacher_mass"] == pytest.approx(0.8)
    if temperature == 1:
        assert 4 * out.metrics["student_mass"] == pytest.approx(0.75)


@pytest.mark.parametrize(("beta", "tail"), EVERYTHING)
def test_with_the_whole_vocabulary_it_is_the_dense_divergence(beta: float, tail: Tail) -> None:
    torch.manual_seed(0)
    student, teacher, ids, logprobs = draw(20, 60, 60, dtype=torch.float32)
    out = topk_kl(student, ids, logprobs, torch.ones(1, 20), beta=beta, tail=tail)
    assert out.loss.item() == pytest.approx(dense(teacher, student.log_softmax(-1), beta).mean().item(), abs=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(2, 40),
    share=st.floats(0, 1),
    scale=st.floats(0, 15),
    beta=st.floats(0, 1) | st.sampled_from([0.0, 1.0]),
)
def test_a_bucket_is_never_above_the_true_divergence(
    seed: int, vocab: int, share: float, scale: float, beta: float
) -> None:
    torch.manual_seed(seed)
    student, teacher, ids, logprobs = draw(8, vocab, max(1, round(share * vocab)), scale=scale)
    log_q = student.log_softmax(-1)
    bucket = divergence(logprobs[0], log_q.gather(-1, ids)[0], beta=beta, tail="bucket")
    assert (bucket <= dense(teacher, log_q, beta)[0] + 1e-7).all()  # SMALLEST_TAIL / e is what clamping can add
    assert (bucket >= -1e-7).all()


def gradient(student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, beta: float, tail: Tail) -> torch.Tensor:
    student = student.detach().requires_grad_()
    out = topk_kl(student, ids, logprobs, torch.ones(student.shape[:-1]), beta=beta, tail=tail)
    return torch.autograd.grad(out.loss, student)[0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_one_candidate_is_enough_to_learn_from(beta: float) -> None:
    ids, logprobs = torch.tensor([[[2]]]), torch.tensor([[[0.7]]]).log()
    timid, bold = torch.zeros(1, 1, 8), torch.tensor([[[0.0, 0, 5, 0, 0, 0, 0, 0]]])  # q_2 = 0.125 and 0.955
    up, down = (gradient(student, ids, logprobs, beta, "bucket")[0, 0] for student in (timid, bold))
    assert up[2] < -0.01
    assert (up[torch.arange(8) != 2] > 0).all()
    assert down[2] > 0.01
    assert gradient(timid, ids, logprobs, beta, "renormalise").abs().max() < 1e-7  # as the docstring says


def test_the_gradient_of_the_forward_kl_by_hand() -> None:
    # -0.7 log q_0 - 0.3 log(1 - q_0) with q = 1/4: d/dz_0 = q_0 - 0.7; others: q_v - 0.3 q_v / (1 - q_0) = 1/4 - 0.1
    found = gradient(torch.zeros(1, 1, 4), torch.tensor([[[0]]]), torch.tensor([[[0.7]]]).log(), 0.0, "bucket")
    assert found.flatten().tolist() == pytest.approx([-0.45, 0.15, 0.15, 0.15], abs=1e-6)


@pytest.mark.parametrize(("beta", "tail"), [each for each in EVERYTHING if each[1] != "none"])
def test_at_the_teacher_there_is_nothing_to_learn(beta: float, tail: Tail) -> None:
    torch.manual_seed(3)
    _, teacher, ids, logprobs = draw(5, 30, 6)
    assert gradient(teacher, ids, logprobs, beta, tail).abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_a_step_lowers_the_true_divergence(beta: float) -> None:
    torch.manual_seed(4)
    student, teacher, ids, logprobs = draw(50, 30, 10)
    after = student - 0.5 * gradient(student, ids, logprobs, beta, "bucket")
    assert dense(teacher, after.log_softmax(-1), beta).mean() < dense(teacher, student.log_softmax(-1), beta).mean()


@pytest.mark.parametrize(("beta", "tail"), EVERYTHING)
def test_gradcheck(beta: float, tail: Tail) -> None:
    torch.manual_seed(5)
    student, _, ids, logprobs = draw(4, 7, 4)
    ids[0, 1, 2:], logprobs[0, 1, 2:] = 0, -math.inf  # fewer candidates
    mask, temperature = torch.tensor([[1.0, 1.0, 0.0, 0.5]]), 1.0 if tail == "bucket" else 1.7

    def loss(student: torch.Tensor) -> torch.Tensor:
        return topk_kl(student, ids, logprobs, mask, beta=beta, tail=tail, temperature=temperature, normalizer=3).loss

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize(("beta", "tail"), EVERYTHING)
def test_one_batch_of_eight_is_eight_of_one(beta: float, tail: Tail) -> None:
    torch.manual_seed(6)
    rows = [each.reshape(8, 6, -1) for each in draw(48, 30, 5)]
    mask = torch.randint(2, (8, 6))
    student = rows[0].requires_grad_()

    def loss(part: slice) -> torch.Tensor:
        return topk_kl(
            student[part], rows[2][part], rows[3][part], mask[part], beta=beta, tail=tail, normalizer=int(mask.sum())
        ).loss

    whole, parts = loss(slice(8)), torch.stack([loss(slice(i, i + 1)) for i in range(8)]).sum()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (parts, whole)))


@pytest.mark.parametrize("tail", TAILS)
def test_neither_padding_nor_what_is_masked_matters(tail: Tail) -> None:
    torch.manual_seed(7)
    student, _, ids, logprobs = draw(6, 30, 5)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    expected = topk_kl(student, ids, logprobs, mask, beta=0.3, tail=tail)
    student[:, [1, 4]], ids[:, [1, 4]], logprobs[:, [1, 4]] = math.nan, -1, -math.inf
    logits = torch.cat([student, torch.full((1, 3, 30), math.inf)], 1).requires_grad_()
    padded = (torch.nn.functional.pad(each, (0, 0, 0, 3), value=0) for each in (ids, logprobs))
    out = topk_kl(logits, *padded, torch.nn.functional.pad(mask, (0, 3)), beta=0.3, tail=tail)
    assert out == expected
    (found,) = torch.autograd.grad(out.loss, logits)
    assert (found.abs().sum(-1) > 0).int().tolist() == [[1, 0, 1, 1, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("tail", TAILS)
def test_empty_slots_do_not_matter(tail: Tail) -> None:
    torch.manual_seed(8)
    student, _, ids, logprobs = draw(6, 30, 5)
    expected = topk_kl(student, ids, logprobs, torch.ones(1, 6), beta=0.3, tail=tail)
    wider = torch.nn.functional.pad(ids, (0, 2)), torch.nn.functional.pad(logprobs, (0, 2), value=-math.inf)
    out = topk_kl(student, *wider, torch.ones(1, 6), beta=0.3, tail=tail)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert out.metrics == pytest.approx(expected.metrics)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_rounded_logprobs_and_a_sure_student_stay_finite(beta: float) -> None:
    student = torch.tensor([[[200.0, 0.0, 0.0], [0.0, 0.0, 200.0]]], requires_grad=True)
    logprobs = torch.tensor([[[0.001, -9999.0], [-0.3, -1.4]]])  # sum above 1; the sentinel of "very small"
    out = topk_kl(student, torch.tensor([[[0, 1], [0, 1]]]), logprobs, torch.ones(1, 2), beta=beta)
    out.loss.backward()
    assert math.isfinite(out.loss.item())
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_mask_that_keeps_nothing_gives_zero_with_a_gradient() -> None:
    student, ids = torch.randn(1, 2, 5, requires_grad=True), torch.zeros(1, 2, 3, dtype=torch.long)
    out = topk_kl(student, ids, torch.full((1, 2, 3), -math.inf), torch.zeros(1, 2), beta=0.0)
    out.loss.backward()
    assert out.loss.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() == 0


def test_a_kept_row_without_a_candidate_is_an_error() -> None:
    logprobs = torch.tensor([[[-1.0, -2.0], [-math.inf, -math.inf]]])
    with pytest.raises(AlignmentError, match="1 of 2 rows under the mask have no teacher logprob"):
        topk_kl(torch.randn(1, 2, 5), torch.zeros(1, 2, 2, dtype=torch.long), logprobs, torch.ones(1, 2), beta=0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 1.5}, "beta is 1.5"),
        ({"tail": "zero"}, "tail is 'zero': it is one of bucket, renormalise, none"),
        ({"temperature": 2.0}, "name how it is to be treated, tail renormalise or none"),
        ({"temperature": 0.0, "tail": "none"}, "temperature is 0.0"),
    ],
)
def test_wrong_options_are_an_error(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        topk_kl(STUDENT, IDS, LOGPROBS, torch.ones(1, 1), **{"beta": 0.0, **options})  # type: ignore[arg-type]


def test_shapes_that_would_be_broadcast_are_an_error() -> None:
    with pytest.raises(AlignmentError, match="mask has shape"):
        topk_kl(torch.randn(2, 1, 4), IDS.expand(2, 1, 3), LOGPROBS.expand(2, 1, 3), torch.ones(1, 1), beta=0.0)
    with pytest.raises(AlignmentError, match="teacher_logprobs has shape"):
        topk_kl(STUDENT, IDS, LOGPROBS[..., :1], torch.ones(1, 1), beta=0.0)


def test_hintons_mixture_by_token() -> None:
    # tokens: not learnt, learnt without a soft label, learnt with one, a soft label on what is not learnt
    hard, soft = mix(0.25, torch.tensor([[0, 1, 1, 0]]), torch.tensor([[False, False, True, True]]))
    assert hard.tolist() == [[0.0, 1.0, 0.25, 0.0]]
    assert soft.tolist() == [[0.0, 0.0, 0.75, 0.0]]
    for alpha, weights in ((1.0, ([[1.0, 1.0]], [[0.0, 0.0]])), (0.0, ([[0.0, 1.0]], [[1.0, 0.0]]))):
        found = mix(alpha, torch.ones(1, 2), torch.tensor([[True, False]]))
        assert tuple(each.tolist() for each in found) == weights
    with pytest.raises(ConfigError, match=r"alpha is 2.0"):
        mix(2.0, torch.ones(1, 2), torch.ones(1, 2))


def test_the_mixture_of_one_token_is_cross_entropy_and_kl() -> None:
    # targets 1: 0.25 * -log(1/4) + 0.75 * 0.297394 (the first worked number) = 0.346574 + 0.223046
    hard, soft = mix(0.25, torch.ones(1, 1), LOGPROBS.isfinite().any(-1))
    ce = cross_entropy(STUDENT, torch.tensor([[1]]), hard, normalizer=1)
    kl = topk_kl(STUDENT, IDS, LOGPROBS, soft, beta=0.0, normalizer=1)
    assert (ce.loss + kl.loss).item() == pytest.approx(0.569620, abs=2e-6)
