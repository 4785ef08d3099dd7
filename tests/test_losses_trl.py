"""Our losses beside TRL's own code: the same inputs, the same values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket

from blackbox_kd.losses import Tail, group_advantages, pair, policy_gradient, token_logprobs, topk_kl
from tests.tiny import make_tiny

BETAS = [0.0, 0.3, 0.5, 1.0]

OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True}

pytestmark = pytest.mark.filterwarnings(  # TRL asks transformers by its old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def draw(k: int, vocab: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher logits (2, 5, V), a mask, and labels as TRL masks them."""
    torch.manual_seed(k)
    student, teacher = torch.randn(2, 5, vocab, requires_grad=True), 2 * torch.randn(2, 5, vocab)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    return student, teacher, mask, torch.where(mask == 1, 7, -100)


def same(ours: torch.Tensor, theirs: torch.Tensor, inputs: torch.Tensor) -> None:
    """Value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs)[0] for loss in (ours, theirs)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("tail", "temperature"), [("bucket", 1.0), ("renormalise", 1.0), ("none", 1.0),
                                                   ("renormalise", 2.0)])  # fmt: skip
def test_generalized_jsd_loss(beta: float, tail: Tail, temperature: float) -> None:
    student, teacher, mask, labels = draw(40)
    logprobs, ids = teacher.log_softmax(-1).topk(40)
    ours = topk_kl(student, ids, logprobs, mask, beta=beta, tail=tail, temperature=temperature).loss
    same(ours, GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature), student)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 5])
def test_generalized_jsd_loss_of_the_top_k_with_a_tail_bucket(beta: float, k: int) -> None:
    student, teacher, mask, labels = draw(k)
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    ours = topk_kl(student, ids, logprobs, mask, beta=beta).loss
    chosen = student.log_softmax(-1).gather(-1, ids)
    full = torch.ones_like(ids, dtype=torch.bool)
    bucketed = [_add_tail_bucket(each, full)[0] for each in (chosen, logprobs)]
    same(ours, GKDTrainer.generalized_jsd_loss(*bucketed, labels, beta), student)


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def gradients(loss: torch.Tensor, model: PreTrainedModel) -> Iterator[torch.Tensor]:
    yield from torch.autograd.grad(loss, list(model.parameters()))


def answer_logprobs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) log q of each completion."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ids, mask = batch["input_ids"].roll(-1, 1)[..., None], batch["completion_mask"].roll(-1, 1)
    mask[:, -1] = 0  # nothing comes after the last token
    return token_logprobs(logits, ids, mask).sum((1, 2))


@pytest.mark.parametrize(("loss_type", "weights"), [(["sigmoid"], [1.0]), (["sigmoid", "sft"], [1.0, 0.7])])
def test_dpo_trainer(tiny_model: Path, tmp_path: Path, loss_type: list[str], weights: list[float]) -> None:
    datasets.disable_progress_bars()
    model, tokenizer = load(tiny_model)
    reference, _ = load(make_tiny(tmp_path / "reference", seed=1))
    rows = [{"prompt": f"Say {i}", "chosen": " one two" * (i + 1), "rejected": " three" * (4 - i)} for i in range(3)]
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path),
            loss_type=loss_type,
            loss_weights=weights,
            beta=0.3,
            per_device_train_batch_size=3,
            **OPTIONS,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))  # chosen, then rejected
    theirs = trainer.compute_loss(model, dict(batch))
    halves = [*answer_logprobs(model, batch).chunk(2), *answer_logprobs(reference, batch).chunk(2)]
    chosen_tokens = float(batch["completion_mask"][:3].sum())
    out = pair(*halves, beta=0.3, anchor=weights[1] if weights[1:] else 0.0, chosen_tokens=chosen_tokens)
    torch.testing.assert_close(out.loss, theirs)
    for ours, their in zip(gradients(out.loss, model), gradients(theirs, model), strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-5)
    assert out.metrics["margin"] == pytest.approx(trainer._metrics["eval"]["rewards/margins"][0], rel=1e-4)


@pytest.fixture
def grpo(tiny_model: Path, tmp_path: Path) -> GRPOTrainer:
    """Two groups of four answers; `rewards` is what was given for them, None where the judge failed."""
    datasets.disable_progress_bars()

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i == 1 else float(i * i % 7) for i, _ in enumerate(completions)]

    model, tokenizer = load(tiny_model)
    args = GRPOConfig(
        output_dir=str(tmp_path), loss_type="bnpo", beta=0.0, epsilon=0.2, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=6, seed=1, **OPTIONS
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "Say 1"}, {"prompt": "Say 2"}])
    trainer = GRPOTrainer(model=model, reward_funcs=[reward], args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()
    return trainer


REWARDS = [[0.0, float("nan"), 4.0, 2.0], [2.0, 4.0, 1.0, 0.0]]  # i * i % 7


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages(grpo: GRPOTrainer, scale: Any) -> None:
    grpo.scale_rewards = scale
    scored = grpo._generate_and_score_completions([{"prompt": f"Say {1 + i // 4}"} for i in range(8)])
    torch.testing.assert_close(group_advantages(REWARDS, scale=scale).flatten(), scored["advantages"])


def test_grpo_policy_loss(grpo: GRPOTrainer) -> None:
    scored = grpo._generate_and_score_completions([{"prompt": f"Say {1 + i // 4}"} for i in range(8)])
    ids = torch.cat([scored["prompt_ids"], scored["completion_ids"]], 1)
    attention = torch.cat([scored["prompt_mask"], scored["completion_mask"]], 1)
    start, targets, mask = scored["prompt_ids"].shape[1], scored["completion_ids"], scored["completion_mask"]
    logits = grpo.model(input_ids=ids, attention_mask=attention).logits[:, start - 1 : -1]
    old = token_logprobs(logits, targets[..., None])[..., 0].detach() + 0.4 * torch.randn(targets.shape)
    grpo.current_gradient_accumulation_steps = 1  # its training loop sets it
    theirs = grpo._compute_loss(grpo.model, scored | {"old_per_token_logps": old})
    out = policy_gradient(logits, targets, old, scored["advantages"][:, None].expand_as(old), mask, clip=0.2)
    assert 0.1 < out.metrics["clipped"] < 0.9
    torch.testing.assert_close(out.loss, theirs)
    for ours, their in zip(gradients(out.loss, grpo.model), gradients(theirs, grpo.model), strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-5)
