"""The plain sections of the YAML: keys, limits and help.

Sections with a choice inside (`teacher`, `onpolicy.algorithm`) live beside what they configure; `settings.Config` puts
all of it together. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from blackbox_kd.errors import ConfigError
from blackbox_kd.types import SamplingParams, Split


class Section(BaseModel):
    """A part of the YAML: unknown keys are errors, values do not change, attribute docstrings are the help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # it may hold a secret
        allow_inf_nan=False,
    )


class PromptsConfig(Section):
    """The conversations to answer: only what the student sees."""

    path: str
    """A folder with train.jsonl, heldout.jsonl, ood.jsonl and holdback.jsonl, or one .jsonl with a `split` key."""
    limits: dict[Split, NonNegativeInt] = {}
    """The first so many prompts of a split; a split that is not named is taken whole."""
    leaks: Literal["stop", "drop", "allow"] = "stop"
    """Where train prompts are in an evaluation split, too, or nearly: no training; these train prompts are left out; or
    nobody looks."""
    leak_jaccard: float = Field(0.8, gt=0, le=1)
    """Of the word pairs, from where two prompts are nearly the same; 1: only equal ones (but for case and blanks)."""


class SampleConfig(Section):
    """What is asked of the teacher for the sequence-level stage."""

    n: int = Field(1, ge=1)
    """Answers per prompt."""
    max_prompts: int | None = Field(None, ge=1)
    """The first so many train prompts; the rest is fresh ground for the on-policy stage. None: all."""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(256, ge=1)
    """Tokens."""
    top_logprobs: int | None = Field(20, ge=0)
    """Alternatives a token (hosted APIs allow up to 20); null asks for no logprobs."""
    batch: bool = False
    """Ask by the Batch API of the endpoint: for half the price, within a day."""
    batch_poll_s: float = Field(60.0, gt=0)
    """Seconds from one look at the open batches to the next."""
    batch_max_requests: int = Field(50_000, ge=1)
    """Questions of one batch; a provider's limit, as 200 MB are."""

    @property
    def draws(self) -> int:
        """Questions a prompt: at temperature 0 there is only one answer."""
        return self.n if self.temperature > 0 else 1

    @property
    def sampling(self) -> SamplingParams:
        """As the teacher takes them."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_completion_length=self.max_completion_length,
            top_logprobs=self.top_logprobs,
        )


class LoraSection(Section):
    """Passed to peft.LoraConfig."""

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    layers_to_transform: list[NonNegativeInt] | None = Field(None, min_length=1)
    """Only these layers; no backward pass below the lowest. None: all."""

    @model_validator(mode="after")
    def _layers_of_names(self) -> Self:
        pattern = isinstance(self.target_modules, str) and not self.all_linear
        if pattern and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names or as all-linear")
        return self

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer but the head gets an adapter."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"


class StudentConfig(Section):
    """The model that learns."""

    model: str
    """A hub id, a folder, a .gguf file, or `package:file.gguf` for one that a Python package carries."""
    lora: LoraSection = LoraSection()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU that has it, float32 elsewhere (bfloat16 is many times slower on most CPUs)."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt plus completion, in tokens; a longer row is left out of training and counted."""


class SoftLossConfig(Section):
    """How soft labels are learnt."""

    alpha: float = Field(0.0, ge=0, le=1)
    """Share of the hard label on tokens that have a soft one; tokens without one are hard only."""
    beta: float = Field(0.0, ge=0, le=1)
    """0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence (as in TRL)."""
    tail: Literal["bucket", "renormalise", "none"] = "bucket"
    """What becomes of the mass outside the top-k: one more outcome, divided away, or left out."""

    @model_validator(mode="after")
    def _teacher_is_the_least(self) -> Self:
        if self.beta == 1 and self.tail == "none":  # sum_k q_k (log q_k - log p_k) over a part
            raise ValueError("beta 1 with tail none is least at q = p / e, not at the teacher's p; take another tail")
        return self


class SftConfig(Section):
    """The sequence-level stage."""

    soft_labels: bool = True
    """Learn the teacher's top-logprobs where an answer has them; false learns the text alone."""
    soft: SoftLossConfig = SoftLossConfig()
    allow_temperature_mismatch: bool = False
    """API logprobs are those of temperature 1: text drawn otherwise has another distribution than its soft labels."""
    dev_fraction: float = Field(0.15, ge=0, lt=1)
    """Share of the sampled train prompts kept aside; training stops early on their loss. 0 trains to the end."""
    early_stopping_patience: int = Field(1, ge=1)
    """Evaluations without a better dev loss before training stops; the best checkpoint is kept."""
    trainer: dict[str, Any] = {}
    """Goes to trl.SFTConfig untouched (learning_rate, which is 3e-4 unless it is given, num_train_epochs, ...)."""


class VllmConfig(Section):
    """A vLLM server with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, which sees the run directory."""

    base_url: str = Field(min_length=1)
    """Up to and including /v1."""
    model: str
    """What it calls the student's base."""
    api_key_env: str | None = None
    """Environment variable with the key; null for a server without one."""
    concurrency: int = Field(64, ge=1)
    """Most rollouts in flight at once."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds for one rollout."""


class UpdateConfig(Section):
    """The on-policy update: AdamW on the adapter, at a constant rate, its state handed from round to round."""

    learning_rate: float | None = Field(None, gt=0)
    """null: the algorithm's own."""
    batch_size: int = Field(8, ge=1)
    """Samples (or pairs) per optimiser step, over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Samples (or pairs) per forward pass; changes memory, never the gradient."""
    num_epochs: int = Field(1, ge=1)
    """Passes over a round's samples."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps of a round; overrides num_epochs."""
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    @property
    def rate(self) -> float:
        """The learning rate, which a project takes from its algorithm where it is null.

        Raises:
            ConfigError: it is null, and there is no project.
        """
        if self.learning_rate is None:
            raise ConfigError("onpolicy.update.learning_rate is null, and no algorithm says what it is")
        return self.learning_rate


class DiscriminatorConfig(Section):
    """A classifier that tells the teacher's text from the student's: a LoRA and a head, AdamW at a constant rate."""

    model: str | None = None
    """As `student.model`, or a small encoder; null: the student's own base, a second time in memory."""
    r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    batch_size: int = Field(8, ge=1)
    """Pairs per optimiser step; texts per forward pass when it scores."""
    warmup_steps: int = Field(40, ge=1)
    """Optimiser steps of the first round."""
    steps: int = Field(10, ge=1)
    """Of each later round."""
    heldout_fraction: float = Field(0.25, gt=0, lt=1)
    """Share of prompts that it never learns from; its accuracy is measured there."""


class LmEvalConfig(Section):
    """Tasks of lm-evaluation-harness, for the base model and the last checkpoint: `pip install 'blackbox-kd[lm-eval]'`.

    Most of them fetch their data sets from the hub.
    """

    tasks: list[str] = Field(min_length=1)
    """Names of tasks or groups; `lm-eval ls tasks` lists them."""
    limit: int | None = Field(None, ge=1)
    """The first so many questions of each task; null: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question; null: as the task says."""
    include_path: str | None = None
    """A folder with task files of your own."""


class EvaluateConfig(Section):
    """How checkpoints are compared."""

    max_completion_length: int = Field(256, ge=1)
    """Tokens, for the teacher's fixed answers and the student's greedy ones."""
    top_logprobs: int | None = Field(20, ge=0)
    """Alternatives kept with the teacher's fixed temperature-1 answers."""
    batch_size: int = Field(32, ge=1)
    bootstrap_samples: int = Field(2000, ge=100)
    every_steps: int | None = Field(50, ge=1)
    """Optimiser steps of `sft`, or of a round of `onpolicy`, from one look at the fixed set to the next; null: none."""
    diversity_prompts: int = Field(64, ge=0)
    """The first so many prompts of heldout and of ood: checkpoints answer them at temperature 1, too."""
    tasks: dict[str, str] = {}
    """What must not be forgotten: a name and a JSONL file of prompts with checkers, for each task."""
    lm_eval: LmEvalConfig | None = None
    gate: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """By task: how far the last checkpoint's share of right answers may be below the base model's; beyond it the
    command ends with exit code 5."""

    @model_validator(mode="after")
    def _gates_have_tasks(self) -> Self:
        harness = self.lm_eval.tasks if self.lm_eval else []
        if twice := sorted(self.tasks.keys() & set(harness)):
            raise ValueError(f"{twice[0]!r} is a task in tasks and in lm_eval.tasks; rename the one in tasks")
        names = {*self.tasks, *harness}
        if drops := sorted(name for name in names if name.removesuffix("_drop") in names - {name}):
            raise ValueError(f"task {drops[0]!r}: so the drop of another one is called; rename it")
        if unknown := sorted(self.gate.keys() - self.tasks.keys() - set(harness)):
            known = ", ".join([*self.tasks, *harness]) or "none"
            raise ValueError(f"gate: there is no task {unknown[0]!r} (known: {known})")
        return self
