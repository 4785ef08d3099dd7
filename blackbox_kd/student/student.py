"""The model that learns: a base with one LoRA adapter. It writes, scores tokens, and is saved."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from blackbox_kd.align import SoftLabels
from blackbox_kd.errors import AlignmentError, ModelError
from blackbox_kd.losses import divergence, kept_logprobs, kept_topk
from blackbox_kd.progress import busy, counting
from blackbox_kd.run_dir import policy_of
from blackbox_kd.sections import LoraSection, StudentConfig
from blackbox_kd.student.load import base_id, end_ids, load_base
from blackbox_kd.student.render import IGNORE, Rendered, Renderer
from blackbox_kd.types import SamplingParams, TopK

OWN_ADAPTER, OTHER_ADAPTER = "default", "other"
"""PEFT's names of the adapter that learns, and of one that is only looked at."""


class TokenScores(NamedTuple):
    """A row's S supervised tokens under a student."""

    logprobs: np.ndarray
    """(S,) log p in nats."""
    tail_kl: np.ndarray
    """(S,) nats, see `yardstick`; NaN where a token has no soft label."""
    top: TopK
    """(S, K) of the student itself, the likeliest first."""


class Student:
    """`model` is a peft.PeftModel; `policy` says whose samples these are, see `policy_of`."""

    def __init__(self, config: StudentConfig, adapter: Path | None = None, *, seed: int = 0) -> None:
        """Load the base and `adapter`, or a fresh LoRA (which changes nothing until it is trained).

        Raises:
            ModelError: base or adapter cannot be loaded, or LoRA does not fit the base.
            AlignmentError: the chat template and the tokenizer do not agree, see `Renderer`.
        """
        self.config = config
        with busy(f"loading {config.model}"):
            base, tokenizer = load_base(config)
        self._base_id = base_id(config.model, base)
        self.renderer = Renderer(tokenizer, end_ids(base, tokenizer))
        # What a model ships (repetition penalty, top_k, ...) would make its samples draws from another policy.
        base.generation_config = GenerationConfig()
        self.tokenizer = tokenizer
        try:
            self.model = _with_lora(base, config, adapter, seed)
        except (ValueError, OSError, RuntimeError) as error:
            raise ModelError(f"LoRA on {config.model!r}: {str(error).splitlines()[0]}") from error
        self.model.eval()
        self.policy = self.policy_of(adapter)

    def policy_of(self, adapter: Path | None) -> str:
        """Hash of the base and of an adapter on it, `base:HASH` without one; the names of both are not in it."""
        return policy_of(self._base_id, adapter)

    @contextmanager
    def under(self, adapter: Path | None) -> Iterator[None]:
        """Another policy writes and scores inside the block: a saved adapter, or the base model without one."""
        policy, self.policy = self.policy, self.policy_of(adapter)
        try:
            if adapter is None:
                with self.model.disable_adapter():
                    yield
                return
            self.model.load_adapter(str(adapter), OTHER_ADAPTER, is_trainable=False)
            self.model.set_adapter(OTHER_ADAPTER)
            yield
        finally:
            self.policy = policy
            if OTHER_ADAPTER in self.model.peft_config:
                self.model.set_adapter(OWN_ADAPTER)
                self.model.delete_adapter(OTHER_ADAPTER)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(
        self,
        prompts_ids: Sequence[list[int]],
        sampling: SamplingParams,
        *,
        batch_size: int,
        seed: int,
        description: str,
    ) -> list[list[int]]:
        """Completions in the student's tokens, one for each prompt; the end token stands where it was drawn.

        Batches are left-padded and drawn in order under `seed`: the same call gives the same tokens.
        """
        completions: list[list[int]] = []
        with counting(description, len(prompts_ids)) as progress, seeded(seed, self.device):
            for start in range(0, len(prompts_ids), batch_size):
                batch = prompts_ids[start : start + batch_size]
                completions += self._generate_batch(batch, sampling)
                progress.advance(len(batch))
        return completions

    def _generate_batch(self, prompts_ids: Sequence[list[int]], sampling: SamplingParams) -> list[list[int]]:
        input_ids, mask = self.pad(prompts_ids, "left")
        draws: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            draws = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        end = self.renderer.end_id
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=end,
            pad_token_id=end,  # cut off below by the first end token, so its value does not matter
            **draws,
        )
        drawn: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in drawn]

    def logprobs(self, rows: Sequence[Rendered], *, batch_size: int) -> list[list[float]]:
        """log p of each supervised token in nats (temperature 1, eval mode), one list for each row."""
        scores = self.score(rows, batch_size=batch_size)
        return [each.logprobs.tolist() for each in scores]

    @torch.no_grad()
    def score(
        self, rows: Sequence[Rendered], soft: Sequence[SoftLabels | None] = (), *, batch_size: int, k: int = 0
    ) -> list[TokenScores]:
        """Each row's S supervised tokens at temperature 1 in eval mode, beside the teacher's soft labels of them.

        `k`: how many of the student's own likeliest tokens are given at each place.
        The mode that the model was in is put back: a trainer may be in the middle of its work.

        Raises:
            AlignmentError: a row with another number of soft labels than supervised tokens.
        """
        found: list[TokenScores] = []
        soft = soft or [None] * len(rows)
        with _evaluating(self.model), counting("student reads", len(rows)) as progress:
            for start in range(0, len(rows), batch_size):
                batch, labels = rows[start : start + batch_size], soft[start : start + batch_size]
                input_ids, mask = self.pad([row.input_ids for row in batch], "right")
                targets = [torch.tensor(row.labels) for row in batch]
                targets_BT = pad_sequence(targets, batch_first=True, padding_value=IGNORE)
                first = first_kept(targets_BT != IGNORE)
                logits_BTV = logits_from(self.model, input_ids, mask, first)
                targets_BT = targets_BT[:, first:].to(self.device)
                found += _scores(logits_BTV, targets_BT, labels, k)
                progress.advance(len(batch))
        return found

    def pad(self, rows: Sequence[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) ids and mask. Padding is told by the mask alone: the pad id may well be the end token."""
        tensors = [torch.tensor(row) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=self.renderer.end_id, padding_side=side)
        mask = pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True, padding_side=side)
        return ids.to(self.device), mask.to(self.device)

    def save(self, path: Path) -> None:
        """The adapter, as PEFT reads it."""
        self.model.save_pretrained(path, selected_adapters=[OWN_ADAPTER])


def _with_lora(base: Any, config: StudentConfig, adapter: Path | None, seed: int) -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft's, not ours
        if adapter is not None:
            return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **_lora_settings(base, config.lora)))


def _lora_settings(base: Any, lora: LoraSection) -> dict[str, Any]:
    settings = lora.model_dump()
    if lora.layers_to_transform is not None:
        layers = base.config.get_text_config().num_hidden_layers
        if max(lora.layers_to_transform) >= layers:
            raise ValueError(f"lora.layers_to_transform {lora.layers_to_transform}: its layers are 0 to {layers - 1}")
        if lora.all_linear:  # which peft does not take together with layers
            settings["target_modules"] = _linear_names(base)
    return settings


def _linear_names(base: Any) -> list[str]:
    """Of all linear modules but the head, e.g. [down_proj, gate_proj, ...]."""
    head = base.get_output_embeddings()
    linear = (name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def _scores(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, soft: Sequence[SoftLabels | None], k: int
) -> list[TokenScores]:
    """Of each row of a batch; the softmax of a token is made once for all that is asked of it."""
    kept_BT = targets_BT != IGNORE
    sizes = kept_BT.sum(1).tolist()
    top_SK = kept_topk(logits_BTV, kept_BT, k)
    labels_SL, teacher_SL = (each.to(logits_BTV.device) for each in _stacked(soft, sizes))
    ids = [targets_BT[kept_BT].unsqueeze(1), top_SK, labels_SL]
    logprobs = kept_logprobs(logits_BTV, torch.cat(ids, 1), kept_BT)
    drawn_S1, student_SK, student_SL = torch.split(logprobs, [each.shape[1] for each in ids], 1)
    labelled_S = teacher_SL.isfinite().any(1)
    tail_kl_S = torch.full_like(drawn_S1.squeeze(1), float("nan"))
    tail_kl_S[labelled_S] = divergence(teacher_SL[labelled_S], student_SL[labelled_S], beta=0.0, tail="bucket")
    found = (drawn_S1.squeeze(1), tail_kl_S, top_SK, student_SK)
    rows = zip(*(torch.split(each.cpu(), sizes) for each in found), strict=True)
    return [TokenScores(p.numpy(), kl.numpy(), TopK(ids.numpy(), q.numpy())) for p, kl, ids, q in rows]


def _stacked(soft: Sequence[SoftLabels | None], sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, L) ids and logprobs of all rows, L the widest; -inf in a slot without a label."""
    width = max((each.ids.shape[1] for each in soft if each is not None), default=0)
    ids_SL = torch.zeros(sum(sizes), width, dtype=torch.long)
    logprobs_SL = torch.full(ids_SL.shape, -math.inf)
    for each, size, end in zip(soft, sizes, itertools.accumulate(sizes), strict=True):
        if each is None:
            continue
        if len(each.ids) != size:
            raise AlignmentError(f"{len(each.ids)} soft labels for {size} supervised tokens")
        rows, columns = slice(end - size, end), slice(each.ids.shape[1])
        ids_SL[rows, columns] = torch.from_numpy(each.ids).long()
        logprobs_SL[rows, columns] = torch.from_numpy(each.logprobs)
    return ids_SL, logprobs_SL


def first_kept(kept_BT: torch.Tensor) -> int:
    """The earliest column that any row keeps. Column 0 never counts: nothing predicts the first token."""
    columns = kept_BT[:, 1:].any(0).nonzero()
    return 1 + int(columns[0]) if len(columns) else kept_BT.shape[1]


def logits_from(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, first: int) -> torch.Tensor:
    """(B, T - first, V): row t predicts token `first + t`, T tokens in all.

    The head does not run on the prompt: there its logits are the largest tensor of a step, and are thrown away. The
    last token predicts nothing, and is left out before the model: a slice behind it has another gradient of that size.
    """
    ids, mask, kept = input_ids[:, :-1], mask[:, :-1], input_ids.shape[1] - first
    made = model(input_ids=ids, attention_mask=mask, logits_to_keep=max(kept, 1), use_cache=False)
    logits: torch.Tensor = made.logits
    size = logits.shape[1]  # all of them from a model that takes no `logits_to_keep`
    return logits if size == kept else logits[:, size - kept :]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws under a seed, the state around it untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
