"""Several processes on one update: rank 0 runs the loop, the others follow its updates.

    accelerate launch --multi_gpu --num_processes 4 -m blackbox_kd.onpolicy --config quickstart

Data parallelism: each rank holds the whole student, takes its share of a step's samples, and the gradients are added
up. The model is not wrapped: the gradients of an adapter are few, and with one sum after the last micro-batch a rank
may be without a sample, and a parameter without a gradient. Shards of a student (FSDP, DeepSpeed) would need all ranks
wherever rank 0 writes or scores.

When a rank ends, so do the others: the launcher ends them, or their next word to each other fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed

from blackbox_kd.errors import AlignmentError, ConfigError, TrainingError
from blackbox_kd.sections import StudentConfig
from blackbox_kd.student.load import pick_device

PATIENCE = timedelta(days=30)
"""Rank 0 may wait for its teacher for hours, and the others for it; torch gives up after minutes."""

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class PeerGone(Exception):
    """Another rank has ended, and this one, which has no word of its own to say, goes with it."""


class Ranks:
    """The processes that train together, and which of them this is; a process alone is rank 0 of 1.

    All methods but for a process alone are collective: every rank calls them in the same order, from one thread.
    """

    def __init__(self, rank: int = 0, size: int = 1, words: Any = None) -> None:
        """`words` is the process group that objects go through; gradients go through the default one."""
        self.rank, self.size, self._words = rank, size, words

    @classmethod
    def join(cls, config: StudentConfig) -> Ranks:
        """As the launcher says in the environment; waits for the others. Each rank has a GPU of its own from then on.

        Raises:
            ConfigError: the launcher was told to shard the model.
        """
        if sharding := [name for name in SHARDING if parse_flag_from_env(f"ACCELERATE_USE_{name}")]:
            raise ConfigError(f"{sharding[0]} shards the student, which rank 0 writes with alone; launch without it")
        state = PartialState(cpu=pick_device(config).type == "cpu")
        if state.num_processes == 1:
            return cls()
        words = distributed.new_group(backend="gloo", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, words)

    def share(self, word: Any = None) -> Any:
        """What rank 0 says; what the others say does not matter."""
        said = [word]
        if self.size > 1:
            with self._together():
                distributed.broadcast_object_list(said, src=0, group=self._words)
        return said[0]

    def gather(self, word: Any) -> list[Any]:
        """What each rank says."""
        said = [word] * self.size
        if self.size > 1:
            with self._together():
                distributed.all_gather_object(said, word, group=self._words)
        return said

    def agree(self, what: str, value: Any) -> None:
        """Raises:
        AlignmentError: the ranks do not have the same value.
        """
        said = self.gather(value)
        if any(other != value for other in said):
            raise AlignmentError(f"the ranks differ in {what}: {said}; they need the same run_dir, models and config")

    def add_up(self, metrics: dict[str, float]) -> dict[str, float]:
        """Sums over ranks; a rank may lack some."""
        said = self.gather(metrics)
        return {name: sum(one.get(name, 0.0) for one in said) for name in dict.fromkeys(n for one in said for n in one)}

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Every gradient becomes its sum over ranks; one that is not there counts as zero."""
        if self.size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = torch.cat([grad.flatten() for grad in grads])
        with self._together():
            distributed.all_reduce(total)
        parts = torch.split(total, [p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p).to(p.dtype)

    def leave(self) -> None:
        """The end of it; rank 0 has said so before."""
        if self.size > 1:
            PartialState().destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that gloo and NCCL raise
            if self.rank:
                raise PeerGone from error
            raise TrainingError("another process of this run has ended; what it said stands above") from error
