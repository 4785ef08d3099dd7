"""A discriminator: how much a text looks like the teacher's, learnt from the teacher's text beside the student's.

A sequence classifier with one output, under a small LoRA and a head of its own. It is trained by TRL's RewardTrainer,
whose loss is that of GAD (2511.10643): the mean over pairs of `- log sigmoid(D(x, y_teacher) - D(x, y_student))`.
Each text is scored by itself, so that there is no order in a pair that could be learnt instead.
"""

from __future__ import annotations

import io
import math
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import numpy as np
import peft
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback
from transformers.utils import logging as hf_logging
from trl import RewardConfig, RewardTrainer

from blackbox_kd.config import DiscriminatorConfig, StudentConfig
from blackbox_kd.errors import ModelError, TrainingError
from blackbox_kd.student.load import model_source, pick_device, pick_dtype
from blackbox_kd.student.render import Renderer
from blackbox_kd.student.student import seeded
from blackbox_kd.student.trainer import Unreported


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
        """`state` is what an earlier `state()` gave; None starts with a random head under `seed`.

        Raises:
            ModelError: the model cannot be loaded as a classifier.
        """
        self.config, self._renderer, self.device = config, renderer, pick_device(student)
        # The precision of the update: RewardTrainer would make a state of its own, under the feet of the student's.
        Accelerator(cpu=self.device.type == "cpu")
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
                    dtype=pick_dtype(student, self.device),
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
        self.model.to(self.device).eval()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
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
        """The mean loss of so many optimiser steps on `pairs`, in a seeded order.

        Raises:
            TrainingError: it is not a number.
        """
        rows = {"chosen_ids": [self._read(p.teacher) for p in pairs],
                "rejected_ids": [self._read(p.student) for p in pairs]}  # fmt: skip
        with tempfile.TemporaryDirectory() as work, _all_seeded(seed, self.device):
            trainer = _Trainer(
                model=self.model,
                args=self._arguments(work, steps, seed),
                train_dataset=datasets.Dataset.from_dict(rows),
                processing_class=self._tokenizer,
                optimizers=(self.optimizer, None),
            )
            trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                loss = float(trainer.train().training_loss)
        self.model.eval()
        if not math.isfinite(loss):
            raise TrainingError(f"the discriminator's loss is {loss}: lower its learning_rate")
        return loss

    def _arguments(self, work: str, steps: int, seed: int) -> RewardConfig:
        return RewardConfig(
            output_dir=work,
            max_steps=steps,
            per_device_train_batch_size=self.config.batch_size,
            learning_rate=self.config.learning_rate,
            lr_scheduler_type="constant",
            max_length=None,
            seed=seed,
            bf16=False,
            use_cpu=self.device.type == "cpu",
            accelerator_config={"use_configured_state": True},
            activation_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=self.device.type != "cpu",
        )

    @torch.no_grad()
    def score(self, texts: Sequence[list[int]]) -> list[float]:
        """D of each text, in eval mode. Only differences under one prompt mean something: the loss sees no others."""
        scores: list[float] = []
        for start in range(0, len(texts), self.config.batch_size):
            rows = [torch.tensor(self._read(text)) for text in texts[start : start + self.config.batch_size]]
            ids = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            made = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            scores += made.logits.float().squeeze(-1).tolist()
        return scores

    def _read(self, ids: list[int]) -> list[int]:
        if self.config.model is None:
            return ids
        text = self._renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return list(self._tokenizer(text, truncation=True)["input_ids"])


class _Trainer(Unreported, RewardTrainer):  # type: ignore[misc]
    """TRL's, in silence."""


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


@contextmanager
def _all_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """`seeded`, with Python's and numpy's generators put back too: a trainer seeds them all."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with seeded(seed, device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
