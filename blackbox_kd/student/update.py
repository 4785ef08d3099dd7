"""The on-policy update: weighted loss components on given tokens, an optimiser that lives over rounds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence

from blackbox_kd.config import UpdateConfig
from blackbox_kd.errors import AlignmentError, TrainingError
from blackbox_kd.progress import counting
from blackbox_kd.student.components import COMPONENTS, Rows
from blackbox_kd.student.student import Student, first_kept, logits_from, seeded
from blackbox_kd.types import TrainSample

Unit = list[TrainSample]
"""A sample, or the two of a pair: what is shuffled, counted and split."""


def batches(samples: Sequence[TrainSample], batch_size: int, max_steps: int, seed: int) -> list[list[Unit]]:
    """Optimiser steps: epochs in a seeded order that starts from sample_id, so that it repeats exactly.

    The last, smaller batch of an epoch is kept: no row is dropped.
    """
    order = units(samples)
    rng = random.Random(seed)
    steps: list[list[Unit]] = []
    while len(steps) < max_steps:
        rng.shuffle(order)
        steps += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return steps[:max_steps]


def units(samples: Sequence[TrainSample]) -> list[Unit]:
    """By sample_id; the samples of a pair together."""
    order = sorted(samples, key=lambda s: (s.pair_id or s.sample_id, s.sample_id))
    numbered = groupby(enumerate(order), key=lambda item: item[1].pair_id or item[0])
    return [[sample for _, sample in unit] for _, unit in numbered]


class Updater:
    """AdamW on the adapter of a student, through accelerate (one process, several GPUs, FSDP, DeepSpeed)."""

    def __init__(
        self,
        student: Student,
        config: UpdateConfig,
        state: Path | None = None,
        losses: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`state` is what an earlier `save` wrote, None starts afresh; `losses` are options of components by name."""
        self.student, self.config, self.losses = student, config, losses or {}
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
        """Metrics of each optimiser step on `samples`, of which every rank is given all.

        `after_step` is told the number of each step, from 1.

        Raises:
            TrainingError: nothing to learn from, or a loss that is not a number.
            AlignmentError: a stream that does not fit its tokens.
        """
        check(samples)
        steps = batches(samples, self.config.batch_size, self._max_steps(len(units(samples))), seed)
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

    def _max_steps(self, count: int) -> int:
        return self.config.max_steps or self.config.num_epochs * math.ceil(count / self.config.batch_size)

    def _step(self, step: list[Unit]) -> dict[str, float]:
        """One optimiser step; the normalisers count the whole step, so micro-batches and ranks do not matter."""
        samples = [sample for unit in step for sample in unit]
        names = sorted({name for sample in samples for name in sample.weights})
        normalizers = {name: COMPONENTS[name].normalizer(samples, name) for name in names}
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = list(self._micro_batches(step[rank::ranks], step[0]))
        metrics: dict[str, float] = {}
        for i, part in enumerate(parts):
            last = i == len(parts) - 1  # the ranks meet once, however many micro-batches each of them has
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, found = self._loss(part, normalizers)
                self.accelerator.backward(loss * ranks)  # data parallelism averages gradients, our loss is a sum
            for key, value in found.items():
                metrics[key] = metrics.get(key, 0.0) + value
        metrics = self._over_ranks(metrics)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"loss {metrics['loss']} with gradient norm {float(norm)}: lower onpolicy.learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"grad_norm": float(norm)} | {f"{n}_count": float(normalizers[n]) for n in names}

    def _micro_batches(self, mine: list[Unit], spare: Unit) -> Iterable[list[TrainSample]]:
        """At least one: a rank without a unit of its own takes part with one that weighs nothing."""
        size = self.config.micro_batch_size
        for start in range(0, len(mine), size):
            yield [sample for unit in mine[start : start + size] for sample in unit]
        if not mine:
            yield [weightless(sample) for sample in spare]

    def _over_ranks(self, metrics: dict[str, float]) -> dict[str, float]:
        """Sums; all ranks have the same names, since all have the same normalisers."""
        values = torch.tensor([metrics[key] for key in sorted(metrics)], device=self.accelerator.device)
        return dict(zip(sorted(metrics), self.accelerator.reduce(values, reduction="sum").tolist(), strict=True))

    def _loss(self, samples: list[TrainSample], normalizers: dict[str, int]) -> tuple[torch.Tensor, dict[str, float]]:
        input_ids, mask = self.student.pad([s.input_ids for s in samples], "right")
        weights = {n: _pad(_stream(s.weights, n, len(s.input_ids)) for s in samples) for n in normalizers}
        first = first_kept(torch.stack([w != 0 for w in weights.values()]).any(0))
        first = min(first, input_ids.shape[1] - 1)  # of weightless samples: one row that nothing is learnt from
        logits_BTV = logits_from(self.model, input_ids, mask, first)
        ids, logprobs, old, ref = (each[:, first:].to(self.student.device) for each in tensors(samples))
        pairs = pair_numbers(samples).to(self.student.device)
        total = logits_BTV[:, :1, :1].float().sum() * 0.0
        metrics: dict[str, float] = {}
        for name, normalizer in normalizers.items():
            weights_BT = weights[name][:, first:].to(self.student.device)
            rows = Rows(logits_BTV, input_ids[:, first:], weights_BT, ids, logprobs, old, ref, pairs)
            out = COMPONENTS[name].loss(rows, normalizer=normalizer, **self.losses.get(name, {}))
            total = total + out.loss
            metrics |= {f"{name}_{key}": value for key, value in out.metrics.items()}
        return total, metrics | {"loss": float(total.detach())}


def tensors(samples: Sequence[TrainSample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher's ids and logprobs (B, T, K), `old` and `ref` logprobs (B, T); empty where a sample has none."""
    size = max(len(s.input_ids) for s in samples)
    k = max((s.soft.ids.shape[1] for s in samples if s.soft is not None), default=1)
    ids = torch.zeros(len(samples), size, k, dtype=torch.long)
    logprobs = torch.full((len(samples), size, k), -math.inf)
    for b, sample in enumerate(samples):
        if sample.soft is not None:
            places = torch.tensor(sample.weights["topk_kl"]).nonzero().squeeze(1)
            width = sample.soft.ids.shape[1]
            ids[b, places, :width] = torch.from_numpy(sample.soft.ids).long()
            logprobs[b, places, :width] = torch.from_numpy(sample.soft.logprobs).float()
    old, ref = (_pad(_stream(s.logprobs, name, len(s.input_ids)) for s in samples) for name in ("old", "ref"))
    return ids, logprobs, old, ref


def pair_numbers(samples: Sequence[TrainSample]) -> torch.Tensor:
    """(B,) 0, 1, ... by pair; -1 for a sample of its own."""
    number = {pair_id: i for i, pair_id in enumerate(dict.fromkeys(s.pair_id for s in samples if s.pair_id))}
    return torch.tensor([number.get(s.pair_id or "", -1) for s in samples])


def weightless(sample: TrainSample) -> TrainSample:
    """The same tokens, and nothing to learn from them."""
    zeros = [0.0] * len(sample.input_ids)
    return TrainSample(
        sample_id=sample.sample_id,
        input_ids=sample.input_ids,
        weights=dict.fromkeys(sample.weights, zeros),
        pair_id=sample.pair_id,
    )


def _stream(streams: Mapping[str, list[float]], name: str, size: int) -> list[float]:
    return streams.get(name) or [0.0] * size


def _pad(streams: Iterable[Sequence[float]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(stream) for stream in streams], batch_first=True)


def check(samples: Sequence[TrainSample]) -> None:
    """Streams fit their tokens, every component is known and has what it needs, and something is learnt."""
    for sample in samples:
        for kind, streams in (("weights", sample.weights), ("logprobs", sample.logprobs)):
            for name, stream in streams.items():
                if len(stream) != len(sample.input_ids):
                    raise AlignmentError(
                        f"{sample.sample_id}: {len(stream)} {name} {kind} for {len(sample.input_ids)} tokens"
                    )
        for name, weights in sample.weights.items():
            if name not in COMPONENTS:
                raise AlignmentError(f"no loss component {name!r}; there are {', '.join(COMPONENTS)}")
            if weights and weights[0] != 0:
                raise AlignmentError(
                    f"{sample.sample_id}: the first token has a {name} weight, but nothing predicts it"
                )
            if (missing := _missing(sample, name)) and any(weights):
                raise AlignmentError(f"{sample.sample_id}: {name} weights without {missing}")
    _check_pairs(samples)
    if not any(w != 0 for s in samples for stream in s.weights.values() for w in stream):
        raise TrainingError(f"{len(samples)} samples without one supervised token: this update would change nothing")


def _missing(sample: TrainSample, name: str) -> str:
    """What the component cannot do without."""
    if name == "topk_kl":
        wanted = sum(w != 0 for w in sample.weights[name])
        given = 0 if sample.soft is None else len(sample.soft.ids)
        return "" if given == wanted else f"as many soft targets ({wanted} tokens, {given} targets)"
    needed = {"pg": "old", "pair": "ref"}.get(name)
    if needed and needed not in sample.logprobs:
        return f"the logprobs {needed!r}"
    return "a pair_id" if name == "pair" and sample.pair_id is None else ""


def _check_pairs(samples: Sequence[TrainSample]) -> None:
    sides: dict[str, set[bool]] = {}
    for sample in samples:
        for w in sample.weights.get("pair", ()):
            if w and sample.pair_id:
                sides.setdefault(sample.pair_id, set()).add(w > 0)
    if half := [pair_id for pair_id, found in sides.items() if len(found) < 2]:
        raise AlignmentError(f"{len(half)} pairs without a chosen or a rejected answer, such as {half[0]}")
