"""The algorithm-blind update: weighted loss components on given tokens, an optimiser that lives over rounds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence

from blackbox_kd.config import UpdateConfig
from blackbox_kd.errors import AlignmentError, TrainingError
from blackbox_kd.losses import COMPONENTS
from blackbox_kd.progress import counting
from blackbox_kd.student.student import Student, first_kept, logits_from, seeded
from blackbox_kd.types import TrainSample


def batches(samples: Sequence[TrainSample], batch_size: int, max_steps: int, seed: int) -> list[list[TrainSample]]:
    """Optimiser steps: epochs in a seeded order that starts from sample_id, so that it repeats exactly.

    The last, smaller batch of an epoch is kept: no row is dropped.
    """
    order = sorted(samples, key=lambda sample: sample.sample_id)
    rng = random.Random(seed)
    steps: list[list[TrainSample]] = []
    while len(steps) < max_steps:
        rng.shuffle(order)
        steps += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return steps[:max_steps]


class Updater:
    """AdamW on the adapter of a student, through accelerate (one process, several GPUs, FSDP, DeepSpeed)."""

    def __init__(self, student: Student, config: UpdateConfig, state: Path | None = None) -> None:
        """`state` is what an earlier `save` wrote; None starts the optimiser afresh."""
        self.student, self.config = student, config
        self.accelerator = Accelerator(cpu=student.device.type == "cpu")
        parameters = [p for p in student.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        if state is not None:
            optimizer.load_state_dict(torch.load(state, map_location=student.device, weights_only=True))
        self.model, self.optimizer = self.accelerator.prepare(student.model, optimizer)

    def save(self, path: Path) -> None:
        """The optimiser's state."""
        torch.save(self.optimizer.state_dict(), path)

    def run(
        self, samples: Sequence[TrainSample], seed: int, after_step: Callable[[int], None] | None = None
    ) -> list[dict[str, float]]:
        """Metrics of each optimiser step on `samples`; `after_step` is told the number of each, from 1.

        Raises:
            TrainingError: nothing to learn from, or a loss that is not a number.
            AlignmentError: a weight stream that does not fit its tokens.
        """
        check(samples)
        steps = batches(samples, self.config.batch_size, self._max_steps(len(samples)), seed)
        self.model.train()
        with counting("updating", len(steps)) as progress, seeded(seed, self.student.device):
            metrics = []
            for step in steps:
                metrics.append(self._step(step))
                progress.advance(note=f"loss {metrics[-1]['loss']:.3f}")
                if after_step:
                    after_step(len(metrics))
        self.model.eval()
        return metrics

    def _max_steps(self, samples: int) -> int:
        return self.config.max_steps or self.config.num_epochs * math.ceil(samples / self.config.batch_size)

    def _step(self, samples: list[TrainSample]) -> dict[str, float]:
        """One optimiser step; the normalisers count the whole step, so micro-batches and ranks do not matter."""
        names = sorted({name for sample in samples for name in sample.weights})
        normalizers = {n: sum(w != 0 for s in samples for w in s.weights.get(n, ())) for n in names}
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine, size = samples[rank::ranks], self.config.micro_batch_size
        metrics: dict[str, float] = {}
        for start in range(0, len(mine), size):
            loss, parts = self._loss(mine[start : start + size], normalizers)
            self.accelerator.backward(loss * ranks)  # data parallelism averages gradients, our loss is a sum
            for key, value in parts.items():
                metrics[key] = metrics.get(key, 0.0) + value
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"loss {metrics['loss']} with gradient norm {float(norm)}: lower onpolicy.learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"grad_norm": float(norm)} | {f"{n}_tokens": float(normalizers[n]) for n in names}

    def _loss(self, samples: list[TrainSample], normalizers: dict[str, int]) -> tuple[torch.Tensor, dict[str, float]]:
        device = self.student.device
        input_ids, mask = self.student.pad([s.input_ids for s in samples], "right")
        weights = {name: _pad([s.weights.get(name, [0.0] * len(s.input_ids)) for s in samples]) for name in normalizers}
        first = first_kept(torch.stack([w != 0 for w in weights.values()]).any(0))
        logits_BTV = logits_from(self.model, input_ids, mask, first)
        total = logits_BTV.new_zeros((), dtype=torch.float32)
        metrics: dict[str, float] = {}
        for name, normalizer in normalizers.items():
            weights_BT = weights[name][:, first:].to(device)
            out = COMPONENTS[name](logits_BTV, input_ids[:, first:], weights_BT, normalizer=normalizer)
            total = total + out.loss
            metrics |= {f"{name}_{key}": value for key, value in out.metrics.items()}
        return total, metrics | {"loss": float(total.detach())}


def _pad(streams: Sequence[Sequence[float]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(stream) for stream in streams], batch_first=True)


def check(samples: Sequence[TrainSample]) -> None:
    """Streams fit their tokens, every component is known, and something is learnt."""
    for sample in samples:
        for name, weights in sample.weights.items():
            if name not in COMPONENTS:
                raise AlignmentError(f"no loss component {name!r}; there are {', '.join(COMPONENTS)}")
            if len(weights) != len(sample.input_ids):
                raise AlignmentError(
                    f"{sample.sample_id}: {len(weights)} {name} weights for {len(sample.input_ids)} tokens"
                )
            if weights and weights[0] != 0:
                raise AlignmentError(
                    f"{sample.sample_id}: the first token has a {name} weight, but nothing predicts it"
                )
    if not any(w != 0 for s in samples for stream in s.weights.values() for w in stream):
        raise TrainingError(f"{len(samples)} samples without one supervised token: this update would change nothing")
