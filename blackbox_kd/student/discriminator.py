"""A discriminator: how much a text looks like the teacher's, learnt from the teacher's text beside the student's.

A sequence classifier with one output, under a small LoRA and a head of its own, trained as GAD does (2511.10643): the
mean over pairs of `- log sigmoid(D(x, y_teacher) - D(x, y_student))`. Each text is scored by itself, so that there is
no order in a pair that could be learnt instead.

A step is that of TRL's RewardTrainer (a test compares them), which cannot be used itself: under `accelerate launch` it
waits for all ranks, and only the first has a discriminator; and it seeds every generator of the process.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import peft
import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from blackbox_kd.errors import ModelError, TrainingError
from blackbox_kd.losses import bradley_terry
from blackbox_kd.progress import counting
from blackbox_kd.sections import DiscriminatorConfig, StudentConfig
from blackbox_kd.student.load import model_source, pick_device, pick_dtype
from blackbox_kd.student.render import Renderer
from blackbox_kd.student.student import seeded

MAX_GRAD_NORM = 1.0
"""As in TRL."""


class Pair(NamedTuple):
    """Two texts under one prompt, as the student's chat template renders them, in the student's tokens."""

    teacher: list[int]
    student: list[int]


class Discriminator:
    """`D(x, y)` for texts in the student's tokens; its optimiser lives over rounds.

    Another model than the student's base reads the same rendered text in its own tokens, the end of it where it is
    longer than the model allows.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        student: StudentConfig,
        renderer: Renderer,
        *,
        seed: int,
        state: bytes | None = None,
    ) -> None:
        """`state` is what an earlier `state()` gave under the same seed; None starts afresh.

        What the model's file lacks is random under `seed`: the head, and an encoder's pooler, which is not in `state`.

        Raises:
            ModelError: the model cannot be loaded as a classifier.
        """
        self.config, self._renderer, self.device = config, renderer, pick_device(student)
        self._dtype = pick_dtype(student, self.device)
        name = config.model or student.model
        source = model_source(name)
        hf_logging.set_verbosity_error()  # that the head is new is known
        hf_logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            with seeded(seed, self.device):
                base = AutoModelForSequenceClassification.from_pretrained(
                    source,
                    num_labels=1,
                    dtype=self._dtype,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
                self.model = _with_lora(base, config)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"discriminator {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._tokenizer.truncation_side = "left"
        self._tokenizer.model_max_length = min(self._tokenizer.model_max_length, student.max_length)
        base.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id  # the score is read before it
        base.config.use_cache = False
        self.model.to(self.device).eval()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()  # the head too: small steps are lost in bfloat16
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        if state is not None:
            kept = torch.load(io.BytesIO(state), map_location=self.device, weights_only=True)
            peft.set_peft_model_state_dict(self.model, kept["adapter"])
            self.optimizer.load_state_dict(kept["optimizer"])

    def state(self) -> bytes:
        """LoRA, head and optimiser."""
        file = io.BytesIO()
        adapter = peft.get_peft_model_state_dict(self.model)
        torch.save({"adapter": adapter, "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def train(self, pairs: Sequence[Pair], *, steps: int, seed: int) -> float:
        """The mean loss of so many optimiser steps on `pairs`, in a seeded order; no dropout, as in TRL.

        Raises:
            TrainingError: it is not a number.
        """
        losses, parameters = [], self.optimizer.param_groups[0]["params"]
        with counting("discriminator", steps) as progress:
            for batch in islice(_batches(pairs, self.config.batch_size, seed), steps):
                scores_B = self._scores([*(pair.teacher for pair in batch), *(pair.student for pair in batch)])
                loss = bradley_terry(*scores_B.chunk(2)).loss
                loss.backward()  # type: ignore[no-untyped-call]
                clip_grad_norm_(parameters, MAX_GRAD_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(float(loss.detach()))
                progress.advance(note=f"loss {losses[-1]:.3f}")
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            raise TrainingError(f"the discriminator's loss is {mean}: lower its learning_rate")
        return mean

    @torch.no_grad()
    def score(self, texts: Sequence[list[int]]) -> list[float]:
        """D of each text. Only differences under one prompt mean something: the loss sees no others."""
        size = self.config.batch_size
        return [d for i in range(0, len(texts), size) for d in self._scores(texts[i : i + size]).tolist()]

    def _scores(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """(B,) float32."""
        rows = [torch.tensor(self._read(text)) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            made = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        scores_B: torch.Tensor = made.logits.float().squeeze(-1)
        return scores_B

    def _read(self, ids: list[int]) -> list[int]:
        if self.config.model is None:
            return ids
        text = self._renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return list(self._tokenizer(text, truncation=True)["input_ids"])


def _with_lora(base: Any, config: DiscriminatorConfig) -> Any:
    """A classifier's head is called `score` (or `classifier`); it is random, and learns in full."""
    lora = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        modules_to_save=["score"],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's
        return peft.get_peft_model(base, lora)


def _batches(pairs: Sequence[Pair], size: int, seed: int) -> Iterator[Sequence[Pair]]:
    """Without end, each epoch in an order of its own."""
    order, rng = list(pairs), random.Random(seed)
    while order:
        rng.shuffle(order)
        yield from (order[i : i + size] for i in range(0, len(order), size))
