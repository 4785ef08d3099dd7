"""Teacher rows of the sequence-level stage, mixed into each on-policy update and learnt as that stage learns them."""

from __future__ import annotations

import random
from typing import Any

from blackbox_kd.algorithms.base import AlgorithmConfig, ce_sample
from blackbox_kd.hashing import phase_seed
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.sections import SftConfig, SoftLossConfig
from blackbox_kd.soft_labels import label
from blackbox_kd.student.render import Renderer
from blackbox_kd.types import TrainSample, scorer


def losses(sft: SftConfig, algorithm: AlgorithmConfig) -> dict[str, dict[str, Any]]:
    """Options of the loss components of an update: the algorithm's, and for soft labels else those of `sft`."""
    return {"topk_kl": options(sft.soft)} | algorithm.losses


def options(soft: SoftLossConfig) -> dict[str, Any]:
    """Of `topk_kl`."""
    return {"beta": soft.beta, "tail": soft.tail}


class Replay:
    """The rows, with the labels that `sft` gave them.

    An algorithm that learns soft labels by another divergence than `sft` has its rows replayed by their text alone:
    one update has one `topk_kl`.
    """

    def __init__(self, project: Project, renderer: Renderer) -> None:
        config = project.config
        self._seed, self._share, self._renderer = config.seed, config.onpolicy.replay, renderer
        self._soft, longest = config.sft.soft, config.student.max_length
        rows = project.training_rows() if self._share else []
        self._rows = [row for row in rows if len(renderer.render(row[0].messages, row[2]).input_ids) <= longest]
        same = options(SoftLossConfig()) | losses(config.sft, config.onpolicy.algorithm)["topk_kl"]
        texts = [(completion_id, text) for _, completion_id, text in self._rows]
        if not config.sft.soft_labels or same != options(self._soft):
            texts = []
        model = config.teacher.model
        found = label(project.corpus, renderer, model, scorer(model, project.teacher.context.context_hash), texts)
        self._labels = dict(zip((completion_id for completion_id, _ in texts), found.labels, strict=True))

    def draw(self, targets: int, round_: int) -> list[TrainSample]:
        """So many rows that they are the share `replay` of an update with so many targets."""
        wanted = round(targets * self._share / (1 - self._share))
        rng = random.Random(phase_seed(self._seed, round_, "replay"))
        chosen = rng.sample(self._rows, min(wanted, len(self._rows)))
        if len(chosen) < wanted:
            say(f"replay: only {len(chosen)} teacher rows for {wanted} places")
        return [
            ce_sample(i, self._renderer.render(prompt.messages, text), self._labels.get(i), self._soft)
            for prompt, i, text in chosen
        ]
