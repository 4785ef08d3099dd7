"""Rows with soft labels that are made by hand, in the tokens of the tiny student."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch

from blackbox_kd.align import SoftLabels
from blackbox_kd.sft_trainer import Row
from blackbox_kd.student.render import IGNORE, Rendered
from blackbox_kd.student.student import Student

TEXTS = ["one", "one two three", "yes no yes no yes", "eight seven six five four three two one", "two", "yes two",
         "three four five", "no"]  # fmt: skip


def rendered(student: Student, text: str, prompt: str = "Say it") -> Rendered:
    return student.renderer.render([{"role": "user", "content": prompt}], text)


def targets(row: Rendered) -> list[int]:
    return [label for label in row.labels if label != IGNORE]


def soft_labels(ids: np.ndarray, logprobs: np.ndarray) -> SoftLabels:
    """With the masses that belong to them."""
    labelled = (logprobs > -np.inf).any(1)
    mapped = float(np.exp(logprobs).sum() / max(1, labelled.sum()))
    return SoftLabels(
        ids.astype(np.int32), logprobs.astype(np.float32), float(labelled.mean()), mapped, mapped, 0.0, 0.0
    )


def teacher_of(
    row: Rendered, *, mass: float = 0.9, k: int = 3, without: Collection[int] = (), seed: int = 0
) -> SoftLabels:
    """`mass` on the tokens that stand there, the rest but 2% on k - 1 others; tokens `without` have no label."""
    rng = np.random.default_rng([seed, *row.input_ids])
    real = targets(row)
    ids = np.array([[i, *rng.choice([j for j in range(300) if j != i], k - 1, replace=False)] for i in real])
    others = rng.dirichlet(np.ones(k - 1), len(real)) * (0.98 - mass)
    logprobs = np.log(np.concatenate([np.full((len(real), 1), mass), others], 1))
    ids[list(without)], logprobs[list(without)] = 0, -np.inf
    return soft_labels(ids, logprobs)


def own_labels(student: Student, row: Rendered, k: int = 5) -> SoftLabels:
    """The student's own top-k distribution at every supervised token."""
    logprobs = logprobs_of(student, row)
    top = logprobs.topk(k, -1)
    return soft_labels(top.indices.numpy(), top.values.numpy())


def logprobs_of(student: Student, row: Rendered) -> torch.Tensor:
    """(S, V) log-probabilities at the supervised tokens, by the plain forward pass of the model alone."""
    with torch.no_grad():
        logits = student.model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    kept = torch.tensor(row.labels[1:]) != IGNORE
    return logits[:-1][kept].log_softmax(-1)


def kl_with_bucket(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    """sum p (log p - log q) over the candidates, and once more for all that is left on both sides."""
    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    rest_p, rest_q = 1 - sum(p), 1 - sum(q)
    return sum(a * math.log(a / b) for a, b in zip([*p, rest_p], [*q, rest_q], strict=True))


def row_of(student: Student, text: str, **changes: object) -> Row:
    made = rendered(student, text)
    return Row(made, teacher_of(made, **changes))  # type: ignore[arg-type]
