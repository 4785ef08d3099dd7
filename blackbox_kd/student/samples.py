"""Train samples on their way to the loss: checked, put into steps, padded to tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from blackbox_kd.errors import AlignmentError, TrainingError
from blackbox_kd.student.components import COMPONENTS
from blackbox_kd.types import TrainSample

Unit = list[TrainSample]
"""A sample, or the two of a pair: what is shuffled, counted and split."""


def batches(samples: Sequence[TrainSample], batch_size: int, max_steps: int, seed: int) -> list[list[Unit]]:
    """Optimiser steps: epochs in a seeded order that starts from the given one, so that it repeats exactly.

    Not from ids: those of rollouts depend on every bit of the policy, and a rounding error would make other batches.
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
    """In the given order; the samples of a pair together, where its first one stands."""
    found: dict[str | int, Unit] = {}
    for i, sample in enumerate(samples):
        found.setdefault(sample.pair_id or i, []).append(sample)
    return list(found.values())


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
    old, ref = (pad(stream(s.logprobs, name, len(s.input_ids)) for s in samples) for name in ("old", "ref"))
    return ids, logprobs, old, ref


def pair_numbers(samples: Sequence[TrainSample]) -> torch.Tensor:
    """(B,) 0, 1, ... by pair; -1 for a sample of its own."""
    number = {pair_id: i for i, pair_id in enumerate(dict.fromkeys(s.pair_id for s in samples if s.pair_id))}
    return torch.tensor([number.get(s.pair_id or "", -1) for s in samples])


def stream(streams: Mapping[str, list[float]], name: str, size: int) -> list[float]:
    """One number a token; zeros where a sample has no such stream."""
    return streams.get(name) or [0.0] * size


def pad(streams: Iterable[Sequence[float]]) -> torch.Tensor:
    """(B, T), zeros behind."""
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
