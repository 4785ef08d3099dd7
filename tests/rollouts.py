"""Rollouts made by hand, and what an algorithm works with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from blackbox_kd.algorithms.base import Tools
from blackbox_kd.lane import Lane
from blackbox_kd.sections import SoftLossConfig, StudentConfig
from blackbox_kd.student.render import Renderer
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Prompt, Rollout, TopK


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return Renderer(tokenizer, [tokenizer.eos_token_id])


def top_of(ids: Sequence[int], sure: Sequence[float]) -> TopK:
    """The drawn token with the probability `sure`, token 0 with what is left of it but 1%."""
    p = np.array(sure)[:, None]
    return TopK(np.array([[i, 0] for i in ids]), np.log(np.concatenate([p, 0.99 - p], 1)))


def rollout(
    renderer: Renderer, question: str, draft: str, logprob: float = -1.0, sure: Sequence[float] | None = None
) -> Rollout:
    prompt = Prompt(messages=[{"role": "user", "content": question}], split="train", source="t")
    completion = Completion(
        request_key=prompt.prompt_id,
        prompt_id=prompt.prompt_id,
        author="student",
        model="s",
        policy="p",
        text=draft,
        finish_reason="stop",
    )
    ids = renderer.completion(draft)
    return Rollout(
        prompt=prompt,
        completion=completion,
        prompt_ids=renderer.prompt(prompt.messages),
        completion_ids=ids,
        logprobs=[logprob] * len(ids),
        top=top_of(ids, sure or [0.9] * len(ids)),
    )


def tools(
    teacher: Teacher,
    renderer: Renderer,
    student: StudentConfig | None = None,
    judge: Teacher | None = None,
    unseen: Teacher | None = None,
    soft: SoftLossConfig | None = None,
) -> Tools:
    return Tools(teacher, renderer, student or StudentConfig(model="none"), Lane(), 1, judge, unseen, soft)
