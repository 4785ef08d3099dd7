"""TRL's SFT trainer, taught soft labels: a divergence from the teacher's top-k on every token that has one.

TRL's own loss runs inside a patched head that gives no logits, and its data pipeline drops columns that it does not
know. So loss, columns and collator are ours; everything else of a training run is TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from blackbox_kd.align import SoftLabels, check_not_shifted
from blackbox_kd.errors import AlignmentError, ConfigError
from blackbox_kd.losses import cross_entropy, mix, topk_kl
from blackbox_kd.sections import SoftLossConfig
from blackbox_kd.student.render import IGNORE, Rendered
from blackbox_kd.student.student import first_kept, logits_from

__all__ = ["DistillationTrainer", "SoftCollator", "TrlConfig", "check_soft", "dataset"]

TEACHER_COLUMNS = ("teacher_ids", "teacher_logprobs")
"""S * K numbers a row, for its S supervised tokens."""


def dataset(rows: Sequence[Rendered], soft: Sequence[SoftLabels | None]) -> datasets.Dataset:
    """Rows as TRL takes them, with the teacher's columns where any row has soft labels.

    Raises:
        AlignmentError: a row with another number of soft labels than supervised tokens.
    """
    columns: dict[str, Any] = {"input_ids": [r.input_ids for r in rows], "labels": [r.labels for r in rows]}
    k = max((labels.ids.shape[1] for labels in soft if labels is not None), default=0)
    if k:
        filled = [_filled(row, labels, k) for row, labels in zip(rows, soft, strict=True)]
        columns |= {name: [row[i] for row in filled] for i, name in enumerate(TEACHER_COLUMNS)}
    return datasets.Dataset.from_dict(columns)


def _filled(row: Rendered, soft: SoftLabels | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat (S * K) ids and logprobs; a row without soft labels is all empty slots."""
    supervised = sum(label != IGNORE for label in row.labels)
    ids = np.zeros((supervised, k), dtype=np.int64)
    logprobs = np.full((supervised, k), -np.inf, dtype=np.float32)
    if soft is not None:
        if len(soft.ids) != supervised:
            raise AlignmentError(f"{len(soft.ids)} soft labels for {supervised} supervised tokens")
        width = soft.ids.shape[1]
        ids[:, :width], logprobs[:, :width] = soft.ids, soft.logprobs
    return ids.reshape(-1), logprobs.reshape(-1)


@dataclass
class SoftCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Pads as TRL does; the teacher's columns become (B, T, K), row t about token t of `input_ids`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch.

        Raises:
            AlignmentError: TRL cut or repacked a row, so that its soft labels belong to other tokens.
        """
        batch: dict[str, Any] = super().torch_call(examples)
        if TEACHER_COLUMNS[0] not in examples[0]:
            return batch
        kept_BT = batch["labels"] != IGNORE
        sizes = [(len(e[TEACHER_COLUMNS[0]]), n) for e, n in zip(examples, kept_BT.sum(1).tolist(), strict=True)]
        k = sizes[0][0] // max(1, sizes[0][1])
        if wrong := [(slots, n) for slots, n in sizes if slots != k * n]:
            raise AlignmentError(
                f"{wrong[0][0]} alternatives for {wrong[0][1]} supervised tokens, where a token has {k}: TRL changed a "
                "row; set sft.trainer back to defaults"
            )
        for name, empty in zip(TEACHER_COLUMNS, (0, float("-inf")), strict=True):
            values_SK = torch.cat([torch.tensor(e[name]) for e in examples]).view(-1, k)
            whole_BTK = torch.full((*kept_BT.shape, values_SK.shape[1]), empty, dtype=values_SK.dtype)
            whole_BTK[kept_BT] = values_SK
            batch[name] = whole_BTK
        return batch


class DistillationTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose rows may carry soft labels, and whose `eval_loss` is a mean over tokens, not over batches.

    loss = 1/N sum_t [ hard_t NLL_t + (1 - alpha) soft_t D_beta(teacher_t || student_t) ], with N supervised tokens in
    the optimiser step; soft_t is 1 where token t has a soft label; hard_t is alpha there and 1 elsewhere. Under
    `tail: renormalise` a label of one candidate says nothing, and is none.
    """

    def __init__(self, *args: Any, soft_loss: SoftLossConfig, **kwargs: Any) -> None:
        """Raises:
        AlignmentError: the soft labels of a set, as they reach the loss, are not about its tokens.
        ConfigError: there are soft labels, and the router of the model has a loss of its own.
        """
        super().__init__(*args, **kwargs)
        if isinstance(self.data_collator, SoftCollator):
            self.data_collator.pad_to_multiple_of = self.args.pad_to_multiple_of
        self.model_accepts_loss_kwargs = (
            True  # `compute_loss` counts the whole step, whatever the model's forward takes
        )
        self._soft_loss = soft_loss
        self._eval_sums: dict[str, float] = {}
        self._eval_tokens = 0.0
        for rows in (self.train_dataset, self.eval_dataset):
            if rows is not None and TEACHER_COLUMNS[0] in rows.column_names:
                if self.aux_loss_enabled:
                    raise ConfigError(
                        f"the router's loss (coefficient {self.router_aux_loss_coef}) does not go with soft labels: "
                        "set sft.trainer.router_aux_loss_coef to 0, or sft.soft_labels to false"
                    )
                check_collated(self.data_collator, rows)

    def _send_telemetry(self) -> None:
        """TRL reports each trainer that is built; nobody asked for it.

        An environment variable would be heard only by whoever is the first to import huggingface_hub.
        """

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = list(dict.fromkeys([*self._signature_columns, *TEACHER_COLUMNS]))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A scalar; see the class."""
        if return_outputs:
            raise NotImplementedError("the logits of a whole evaluation are not kept")
        tokens = (inputs["labels"] != IGNORE).sum()
        if TEACHER_COLUMNS[0] in inputs:
            loss, metrics = self._soft(model, inputs, tokens if num_items_in_batch is None else num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # data parallelism averages gradients, our loss is a sum
        else:
            loss, metrics = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch), {}
            if not self.model.training and self._is_nll():
                metrics["nll"] = float(loss.detach())
        if not self.model.training:
            for name, value in ({"loss": float(loss.detach())} | metrics).items():
                self._eval_sums[name] = self._eval_sums.get(name, 0.0) + value * float(tokens)
            self._eval_tokens += float(tokens)
        elif metrics:  # TRL logs their mean over micro-batches; each holds its part of the mean over the step's tokens
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            for name, value in metrics.items():
                self._metrics["train"][name].append(value * parts * self.accelerator.num_processes)
        return loss

    def _is_nll(self) -> bool:
        """Whether TRL's loss is the plain NLL."""
        return self.args.loss_type == "nll" and not self.args.label_smoothing_factor and not self.aux_loss_enabled

    def _soft(self, model: Any, inputs: Mapping[str, Any], normalizer: Any) -> tuple[torch.Tensor, dict[str, float]]:
        labels_BT = inputs["labels"]
        first = first_kept(labels_BT != IGNORE)
        logits_BTV = logits_from(model, inputs["input_ids"], inputs["attention_mask"], first)
        labels_BT, ids_BTK, logprobs_BTK = (inputs[n][:, first:] for n in ("labels", *TEACHER_COLUMNS))
        loss, n = self._soft_loss, float(normalizer)
        kept_BT = labels_BT != IGNORE
        labelled_BT = kept_BT & (logprobs_BTK.isfinite().sum(-1) >= (2 if loss.tail == "renormalise" else 1))
        hard_BT, _ = mix(loss.alpha, kept_BT, labelled_BT)
        hard = cross_entropy(logits_BTV, labels_BT.clamp_min(0), hard_BT, normalizer=n)
        with torch.set_grad_enabled(torch.is_grad_enabled() and loss.alpha < 1):  # at alpha 1 it is only looked at
            soft = topk_kl(logits_BTV, ids_BTK, logprobs_BTK, labelled_BT, beta=loss.beta, tail=loss.tail, normalizer=n)
        with torch.no_grad():
            nll = cross_entropy(logits_BTV, labels_BT.clamp_min(0), kept_BT, normalizer=n)
        return hard.loss + (1 - loss.alpha) * soft.loss, {"nll": float(nll.loss), "topk_kl": soft.metrics["kl"]}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with means over all supervised tokens of the set."""
        self._eval_sums, self._eval_tokens = {}, 0.0
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        names = sorted(self._eval_sums)
        sums = torch.tensor([*(self._eval_sums[name] for name in names), self._eval_tokens])
        *totals, tokens = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
        output.metrics.update({f"{prefix}_{name}": total / tokens for name, total in zip(names, totals, strict=True)})
        return output


NO_SOFT = "leave it out, or set sft.soft_labels to false"


def check_soft(args: TrlConfig) -> None:
    """Soft labels stay beside their tokens, and have a loss of their own.

    Raises:
        ConfigError: a key of `sft.trainer` that would drop them, or that their loss does not know.
    """
    for key in ("padding_free", "label_smoothing_factor"):
        if value := getattr(args, key):
            raise ConfigError(f"sft.trainer.{key} is {value}, and soft labels do not go with it; {NO_SOFT}")
    if args.loss_type != "nll":
        raise ConfigError(f"sft.trainer.loss_type is {args.loss_type!r}, and soft labels are learnt by nll; {NO_SOFT}")


def check_collated(collator: Any, rows: datasets.Dataset) -> None:
    """Whether the soft labels are about the tokens beside them, seen at the last place before the loss."""
    soft, targets = [], []
    for example in rows:
        batch = collator([example])
        kept_T = batch["labels"][0] != IGNORE
        ids, logprobs = (batch[name][0][kept_T].numpy() for name in TEACHER_COLUMNS)
        soft.append(SoftLabels(ids, logprobs, *[0.0] * 5))
        targets.append(batch["labels"][0][kept_T].tolist())
    check_not_shifted(soft, targets)
