"""The on-policy update: weighted loss components on given tokens, an optimiser that lives over rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from blackbox_kd.errors import TrainingError
from blackbox_kd.hashing import file_hash
from blackbox_kd.progress import counting
from blackbox_kd.sections import UpdateConfig
from blackbox_kd.student.components import COMPONENTS, Rows
from blackbox_kd.student.ranks import Ranks
from blackbox_kd.student.samples import Unit, batches, check, pad, pair_numbers, stream, tensors, units
from blackbox_kd.student.student import Student, first_kept, logits_from, seeded
from blackbox_kd.types import TrainSample


class Updater:
    """AdamW on the adapter of a student, in one process or in several that share each step (`ranks`)."""

    def __init__(
        self,
        student: Student,
        config: UpdateConfig,
        state: Path | None = None,
        losses: Mapping[str, Mapping[str, Any]] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`state` is what an earlier `save` wrote, None starts afresh; `losses` are options of components by name.

        Raises:
            AlignmentError: the ranks do not start from the same.
        """
        self.student, self.config, self.losses, self.ranks = student, config, losses or {}, ranks or Ranks()
        self.ranks.agree("the policy that they start from", (student.policy, state and file_hash(state)))
        self.parameters = [p for p in student.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.rate, weight_decay=config.weight_decay)
        if state is not None:
            self.optimizer.load_state_dict(torch.load(state, map_location=student.device, weights_only=True))

    @property
    def steps(self) -> int:
        """Optimiser steps so far, those of earlier rounds among them."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def save(self, path: Path) -> None:
        """The optimiser's state."""
        torch.save(self.optimizer.state_dict(), path)

    def run(
        self, samples: Sequence[TrainSample], seed: int, after_step: Callable[[int], None] | None = None
    ) -> list[dict[str, float]]:
        """Metrics of each optimiser step on `samples`, of which every rank is given all.

        `after_step` is told the number of each step, from 1.

        Raises:
            TrainingError: nothing to learn from, or a loss that is not a number.
            AlignmentError: a stream that does not fit its tokens.
        """
        check(samples)
        steps = batches(samples, self.config.batch_size, self._max_steps(len(units(samples))), seed)
        self.student.model.train()
        with counting("updating", len(steps)) as progress, seeded(seed + self.ranks.rank, self.student.device):
            metrics = []
            for step in steps:
                metrics.append(self._step(step))
                progress.advance(note=f"loss {metrics[-1]['loss']:.3f}")
                if after_step:
                    after_step(len(metrics))
        self.student.model.eval()
        return metrics

    def _max_steps(self, count: int) -> int:
        return self.config.max_steps or self.config.num_epochs * math.ceil(count / self.config.batch_size)

    def _step(self, step: list[Unit]) -> dict[str, float]:
        """One optimiser step; the normalisers count the whole step, so micro-batches and ranks do not matter."""
        samples = [sample for unit in step for sample in unit]
        names = sorted({name for sample in samples for name in sample.weights})
        normalizers = {name: COMPONENTS[name].normalizer(samples, name) for name in names}
        counts = {name: COMPONENTS[name].counted(samples, name) for name in names}
        metrics: dict[str, float] = {}
        for part in self._micro_batches(step[self.ranks.rank :: self.ranks.size]):
            loss, found = self._loss(part, normalizers, counts)
            loss.backward()  # type: ignore[no-untyped-call]
            for key, value in found.items():
                metrics[key] = metrics.get(key, 0.0) + value
        metrics = self.ranks.add_up(metrics)
        self.ranks.add_up_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"loss {metrics['loss']} with gradient norm {float(norm)}: lower onpolicy.update.learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"grad_norm": float(norm)} | {f"{n}_count": float(counts[n]) for n in names}

    def _micro_batches(self, mine: list[Unit]) -> Iterable[list[TrainSample]]:
        """None where a rank has no unit of its own."""
        size = self.config.micro_batch_size
        for start in range(0, len(mine), size):
            yield [sample for unit in mine[start : start + size] for sample in unit]

    def _loss(
        self, samples: list[TrainSample], normalizers: dict[str, int], counts: dict[str, int]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        input_ids, mask = self.student.pad([s.input_ids for s in samples], "right")
        weights = {n: pad(stream(s.weights, n, len(s.input_ids)) for s in samples) for n in normalizers}
        first = first_kept(torch.stack([w != 0 for w in weights.values()]).any(0))
        first = min(first, input_ids.shape[1] - 1)  # without any weight: one row that nothing is learnt from
        logits_BTV = logits_from(self.student.model, input_ids, mask, first)
        ids, logprobs, old, ref = (each[:, first:].to(self.student.device) for each in tensors(samples))
        pairs = pair_numbers(samples).to(self.student.device)
        total = logits_BTV[:, :1, :1].float().sum() * 0.0
        metrics: dict[str, float] = {}
        for name, normalizer in normalizers.items():
            weights_BT = weights[name][:, first:].to(self.student.device)
            rows = Rows(logits_BTV, input_ids[:, first:], weights_BT, ids, logprobs, old, ref, pairs)
            out = COMPONENTS[name].loss(rows, normalizer=normalizer, **self.losses.get(name, {}))
            total = total + out.loss
            own = normalizer / max(1, counts[name])  # a mean over its own tokens, whatever else is in the step
            metrics |= {f"{name}_{key}": value * own for key, value in out.metrics.items()}
        return total, metrics | {"loss": float(total.detach())}
