"""The whole config of a project. The unions of teachers and algorithms meet here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from blackbox_kd.algorithms import algorithms
from blackbox_kd.algorithms.base import AlgorithmConfig
from blackbox_kd.curation.config import CurateConfig
from blackbox_kd.sections import (
    EvaluateConfig,
    PromptsConfig,
    SampleConfig,
    Section,
    SftConfig,
    StudentConfig,
    UpdateConfig,
    VllmConfig,
)
from blackbox_kd.teachers import providers
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.teachers.budget import BudgetConfig
from blackbox_kd.types import SamplingParams

if TYPE_CHECKING:
    TeacherChoice = TeacherConfig
    JudgeChoice = TeacherConfig | None
    AlgorithmChoice = AlgorithmConfig
else:  # a discriminated union is the registry: it validates, dispatches, and names what there is
    TeacherChoice = Annotated[reduce(or_, providers()), Field(discriminator="provider")]
    JudgeChoice = Annotated[reduce(or_, providers()) | None, Field(discriminator="provider")]
    AlgorithmChoice = Annotated[reduce(or_, algorithms()), Field(discriminator="name")]


class OnPolicyConfig(Section):
    """The student writes, the teacher scores or relabels, the student is updated on its own samples."""

    algorithm: AlgorithmChoice
    """How the teacher teaches: see the table of algorithms."""
    rounds: int = Field(2, ge=0)
    """Times the loop goes round: rollout, feedback, update."""
    prompts_per_round: int = Field(32, ge=1)
    """Train prompts; those that `sample` did not use come first."""
    temperature: float = Field(1.0, ge=0)
    """Of the student's rollouts."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(256, ge=1)
    """Tokens of a rollout."""
    rollout_batch_size: int = Field(16, ge=1)
    vllm: VllmConfig | None = None
    """Who writes the rollouts; null: the model that is trained, by transformers."""
    max_staleness: int = Field(0, ge=0, le=1)
    """0: a round's samples are of the policy that they update. 1: of the one before it, so that the student writes and
    learns while the teacher works."""
    replay: float = Field(0.25, ge=0, lt=1)
    """Share of teacher rows of the sequence-level stage in each update."""
    max_failed_feedback: float = Field(0.2, ge=0, le=1)
    """A round with a larger share of unusable feedback stops the run."""
    max_judge_divergence: float = Field(0.1, ge=0)
    """With `evaluate.judge`: how far its mean reward may fall while that of `judge` rises (both are 0 to 1); beyond it
    the judge is being gamed, and the run stops."""
    update: UpdateConfig = UpdateConfig()

    @model_validator(mode="after")
    def _groups_differ(self) -> OnPolicyConfig:
        if self.algorithm.rollouts_per_prompt > 1 and self.temperature == 0:
            raise ValueError(
                f"onpolicy.temperature: {self.algorithm.name} compares samples of one prompt, and at 0 all are the same"
            )
        return self

    @property
    def sampling(self) -> SamplingParams:
        """As the student takes them."""
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, max_completion_length=self.max_completion_length
        )


class JudgedConfig(EvaluateConfig):
    """How checkpoints are compared, and who looks over the judge's shoulder."""

    judge: JudgeChoice = None
    """Another endpoint than `judge`, that grades a part of each round and is never trained on. It also says which of
    two answers is better, for `win_rate_vs_teacher` and `win_rate_vs_previous`; null: there are none."""
    judge_is_teacher: bool = False
    """Whether `judge` may be the teacher's own model; `judge: {same_as: teacher}` says so, too."""
    pairwise_template: str = "prompts/pairwise.md.j2"
    """Jinja file of the question which answer is better; it may use {{ prompt }} and {{ answers }}."""
    judge_max_completion_length: int = Field(1024, ge=1)
    """Tokens of its reply, reasoning included."""


class Config(Section):
    """The whole YAML."""

    seed: int = 42
    """Of everything but the teacher's draws."""
    run_dir: Path
    """Checkpoints, metrics and the resolved config."""
    corpus: Path | None = None
    """The DuckDB file; null: <run_dir>/corpus.duckdb. Several runs may share one."""
    prompts: PromptsConfig
    teacher: TeacherChoice
    judge: JudgeChoice = None
    """Who grades: an endpoint with the keys of `teacher`. `{same_as: teacher}` stands for the teacher's own keys
    without its private prompt; keys beside it replace the teacher's."""
    sample: SampleConfig = SampleConfig()
    curate: CurateConfig = CurateConfig()
    student: StudentConfig
    sft: SftConfig = SftConfig()
    onpolicy: OnPolicyConfig
    evaluate: JudgedConfig = JudgedConfig()
    budget: BudgetConfig = BudgetConfig()
    report_to: str | list[str] = "none"
    """As in TRL: tensorboard, wandb, trackio, ..., several of them, or all; of `sft` and `onpolicy`."""

    @model_validator(mode="before")
    @classmethod
    def _same_as_teacher(cls, data: Any) -> Any:
        """Spelt out, so that the resolved config says whom a judge is."""
        if not isinstance(data, Mapping):
            return data
        found = dict(data)
        if "judge" in found:
            found["judge"] = _spelt_out(found["judge"], "judge", found.get("teacher"))
        if isinstance(section := found.get("evaluate"), Mapping) and "judge" in section:
            other = _spelt_out(section["judge"], "evaluate.judge", found.get("teacher"))
            told = isinstance(section["judge"], Mapping) and "same_as" in section["judge"]
            found["evaluate"] = {**section, "judge": other} | ({"judge_is_teacher": True} if told else {})
        return found

    @model_validator(mode="after")
    def _judges(self) -> Config:
        algorithm, judge, unseen = self.onpolicy.algorithm, self.judge, self.evaluate.judge
        if algorithm.needs_judge and judge is None:
            raise ValueError(
                f"onpolicy.algorithm {algorithm.name} needs a judge: set judge: {{provider: .., model: ..}}, or "
                "judge: {same_as: teacher} to let the teacher grade"
            )
        if unseen and unseen.is_the_same_as(self.teacher) and not self.evaluate.judge_is_teacher:
            raise ValueError(
                f"evaluate.judge: {unseen.model!r} is the teacher itself, which likes its own answers best; name "
                "another model, or say evaluate.judge: {same_as: teacher}"
            )
        if judge and unseen and judge.model == unseen.model:  # its answers would also be read back as the other's
            raise ValueError(f"evaluate.judge: {unseen.model!r} is the judge itself; name another model, or none")
        return self

    @model_validator(mode="after")
    def _somebody_chooses(self) -> Config:
        if self.curate.best_of_n != "off" and self.judge is None:
            raise ValueError("curate.best_of_n needs a judge: set judge: {provider: .., model: ..}, or turn it off")
        if self.curate.best_of_n != "off" and self.sample.draws == 1:
            raise ValueError("curate.best_of_n: there is one answer a prompt; raise sample.n, at a temperature above 0")
        return self

    @model_validator(mode="after")
    def _one_distribution(self) -> Config:
        """Soft labels are those of temperature 1, whatever the text was drawn at."""
        drawn = self.sample.temperature, self.sample.top_p
        wanted = self.sft.soft_labels and self.sample.top_logprobs
        if wanted and drawn != (1, 1) and not self.sft.allow_temperature_mismatch:
            raise ValueError(
                "sft.soft_labels: API logprobs are those of temperature 1 and top_p 1, but sample draws its text "
                f"at {drawn[0]:g} and {drawn[1]:g}; set sft.soft_labels to false, or "
                "sft.allow_temperature_mismatch to true"
            )
        return self

    @property
    def corpus_path(self) -> Path:
        """Where the corpus is."""
        return self.corpus or self.run_dir / "corpus.duckdb"

    def sections(self, *names: str) -> dict[str, Any]:
        """Sections as plain values: what a checkpoint depends on."""
        dumped = self.model_dump(mode="json")
        return {name: dumped[name] for name in names}


def _spelt_out(judge: Any, where: str, teacher: Any) -> Any:
    if not (isinstance(judge, Mapping) and "same_as" in judge):
        return judge
    if judge["same_as"] != "teacher":
        raise ValueError(f"{where}.same_as: it can only be teacher, it is {judge['same_as']!r}")
    shared = {key: value for key, value in teacher.items() if key != "prompt"} if isinstance(teacher, Mapping) else {}
    return shared | {key: value for key, value in judge.items() if key != "same_as"}
