"""One project: its whole config, and what every stage starts from. The unions of teachers and algorithms meet here."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import reduce
from operator import or_
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import Field, model_validator

from blackbox_kd.algorithms import algorithms
from blackbox_kd.algorithms.base import AlgorithmConfig
from blackbox_kd.config import (
    EvaluateConfig,
    PromptsConfig,
    SampleConfig,
    Section,
    SftConfig,
    StudentConfig,
    UpdateConfig,
    load_config,
    walk,
)
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import BlackboxKDError, ConfigError
from blackbox_kd.hashing import content_id
from blackbox_kd.progress import say
from blackbox_kd.prompts import SPLITS, PromptSet
from blackbox_kd.run_dir import RunDir
from blackbox_kd.teachers import providers
from blackbox_kd.teachers.base import Capabilities, TeacherConfig
from blackbox_kd.teachers.budget import BudgetConfig
from blackbox_kd.teachers.teacher import Questions, Teacher
from blackbox_kd.types import Prompt, Request, SamplingParams

INTERRUPTED = 130

CAPS = {"usd": "DOLLARS", "tokens": "N", "requests": "N"}
"""Keys of `budget` that have a short flag."""

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
    """Another endpoint than `judge`, that grades a part of each round and is never trained on."""


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
    student: StudentConfig
    sft: SftConfig = SftConfig()
    onpolicy: OnPolicyConfig
    evaluate: JudgedConfig = JudgedConfig()
    budget: BudgetConfig = BudgetConfig()

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
            found["evaluate"] = {**section, "judge": other}
        return found

    @model_validator(mode="after")
    def _judges(self) -> Config:
        algorithm, judge, unseen = self.onpolicy.algorithm, self.judge, self.evaluate.judge
        if algorithm.needs_judge and judge is None:
            raise ValueError(
                f"onpolicy.algorithm {algorithm.name} needs a judge: set judge: {{provider: .., model: ..}}, or "
                "judge: {same_as: teacher} to let the teacher grade"
            )
        if judge and unseen and judge.model == unseen.model:  # its answers would also be read back as the other's
            raise ValueError(f"evaluate.judge: {unseen.model!r} is the judge itself; name another model, or none")
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


def settled(config: Config, prompts: PromptSet, can: Capabilities) -> tuple[Config, str]:
    """The config with the on-policy algorithm that is meant, and why it is (`auto`).

    It does not depend on what has been spent: the same run makes the same choice again.
    """
    loop, cap = config.onpolicy, config.budget.max_requests
    asked = prompts.count("train", config.sample.max_prompts) * config.sample.draws
    fixed = 2 * (prompts.count("heldout") + prompts.count("ood"))
    left = None if cap is None else cap - asked - fixed
    chosen, why = loop.algorithm.resolve(can, loop.rounds * loop.prompts_per_round, left)
    return config.model_copy(update={"onpolicy": loop.model_copy(update={"algorithm": chosen})}), why


def sample_questions(teacher: Questions, prompts: Iterable[Prompt]) -> Iterator[Request]:
    """One for each draw of each prompt."""
    for prompt in prompts:
        for draw in range(teacher.sample.draws):
            yield teacher.answer(prompt, sample_idx=draw)


class Project:
    """Everything that a stage works with, opened once; use as a context manager."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._stack = ExitStack()

    def __enter__(self) -> Project:
        config = self.config
        self.prompts = PromptSet(config.prompts)
        config.teacher.check()
        with ExitStack() as stack:  # lets go of the run directory where the rest cannot be opened
            self.run_dir = stack.enter_context(RunDir(config.run_dir))
            self.corpus = Corpus(config.corpus_path)
            self.teacher = Teacher(
                config.teacher,
                self.corpus,
                self.run_dir.run_id,
                sample=config.sample,
                caps=config.budget,
                run_dir=config.run_dir,
            )
            self.judge = self._judge(config.judge, "judge")
            self.unseen = self._judge(config.evaluate.judge, "evaluate.judge")
            if not config.onpolicy.algorithm.lacking(self.teacher.capabilities):
                self.settle()
                config = self.config
            for name in self.run_dir.checkpoints():  # before the config of the run is overwritten
                self.run_dir.done(name, self.settings_of(name))
            resolved = config.model_dump(mode="json") | {"corpus": str(config.corpus_path)}
            self.run_dir.save_config(resolved)
            context_hash = self.teacher.context.context_hash
            self.corpus.add_run(self.run_id, config.run_dir, resolved, config.teacher.model, context_hash)
            self.corpus.add_prompts([p for split in SPLITS if split != "train" for p in self.prompts[split]])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def settle(self) -> str:
        """`algorithm: auto` becomes what it stands for, for everything that follows; why."""
        self.config, why = settled(self.config, self.prompts, self.teacher.capabilities)
        return why

    def _judge(self, config: TeacherConfig | None, where: str) -> Teacher | None:
        """An endpoint that shares the teacher's budget."""
        if config is None:
            return None
        folder, budget = self.config.run_dir, self.teacher.engine.budget
        try:
            return Teacher(config, self.corpus, self.run_id, author="judge", run_dir=folder, beside=budget)
        except ConfigError as error:  # it names the keys as those of a teacher
            raise ConfigError(str(error).replace("teacher.", f"{where}.")) from error

    @property
    def endpoints(self) -> list[Teacher]:
        """The teacher, and the judges that there are."""
        return [endpoint for endpoint in (self.teacher, self.judge, self.unseen) if endpoint]

    @property
    def run_id(self) -> str:
        """Kept over restarts."""
        return self.run_dir.run_id

    @property
    def sampled_prompts(self) -> Iterator[Prompt]:
        """Train prompts of the sequence-level stage, read as they are taken."""
        return self.prompts.stream("train", self.config.sample.max_prompts)

    def sample_requests(self, prompts: Iterable[Prompt] | None = None) -> Iterator[Request]:
        """The questions of the sequence-level stage: one for each draw of each sampled train prompt."""
        return sample_questions(self.teacher, self.sampled_prompts if prompts is None else prompts)

    def training_rows(self) -> list[tuple[Prompt, str, str]]:
        """(prompt, completion_id, answer): whole answers to exactly those questions, by completion_id."""
        by_id = {prompt.prompt_id: prompt for prompt in self.sampled_prompts}
        keys = [request.request_key for request in self.sample_requests()]
        return [(by_id[p], completion_id, text.strip()) for p, completion_id, text in self.corpus.whole_answers(keys)]

    def settings_of(self, checkpoint: str) -> dict[str, Any]:
        """What a checkpoint depends on; more rounds continue the same experiment."""
        config = self.config
        found = config.sections("seed", "student", "sft", "sample")
        found["sample"] = {key: value for key, value in found["sample"].items() if not key.startswith("batch")}
        found["questions"] = content_id([request.request_key for request in self.sample_requests()])
        if checkpoint != "sft":
            found |= config.sections("onpolicy")
            del found["onpolicy"]["rounds"]
            found["algorithm_files"] = config.onpolicy.algorithm.files_hash()
            if config.onpolicy.algorithm.needs_judge and self.judge:
                found["judge"] = {"model": self.judge.config.model, "prompt": self.judge.context.context_hash}
            found["train_prompts"] = content_id([prompt.prompt_id for prompt in self.prompts["train"]])
        return found

    def log(self, stage: str, rows: list[dict[str, Any]]) -> None:
        """Metrics to metrics.jsonl and to the corpus; a row names at least `name` and `value`."""
        defaults = {"run_id": self.run_id, "stage": stage, "checkpoint": "", "round": 0, "step": 0, "split": "train",
                    "set_id": "", "lo": None, "hi": None}  # fmt: skip
        full = [{**defaults, **row} for row in rows]
        self.run_dir.log(full)
        self.corpus.log_metrics(full)


Stage = Callable[[Project], Coroutine[Any, Any, dict[str, Any]]]
"""An async function of an open project; what it returns is printed by `--json`."""

Show = Callable[[Project, dict[str, Any]], None]
"""Prints a stage's result for a person."""


class OneLineParser(argparse.ArgumentParser):
    """A mistake is one line, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        """Say it and end with exit code 2."""
        say(f"error: {message} (see {self.prog} --help)")
        raise SystemExit(2)


def parser(command: str, doc: str) -> argparse.ArgumentParser:
    """Flags that every command has; the config's own keys are read as dotted overrides."""
    made = OneLineParser(
        prog=f"blackbox-kd {command}",
        description=doc.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any key of the config is a flag:\n\n"
        + "\n".join(f"  --{key}\n        {text}" for key, text in walk(Config)),
    )
    made.add_argument("--config", required=True, help="a shipped config (quickstart) or a YAML file")
    for cap, unit in CAPS.items():
        made.add_argument(
            f"--max-{cap}", metavar=unit, help=f"never bill this run more, over all its starts (budget.max_{cap})"
        )
    made.add_argument("--json", action="store_true", help="print the final summary as one JSON object on stdout")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def config_of(flags: argparse.Namespace, rest: Sequence[str]) -> Config:
    """What `--config` and the other flags say."""
    caps = [(f"budget.max_{cap}", value) for cap in CAPS if (value := getattr(flags, f"max_{cap}")) is not None]
    return load_config(Config, flags.config, [*overrides(rest), *caps])


def overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` as pairs.

    Raises:
        ConfigError: something that is no flag, or a flag without a value.
    """
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"what is {flag!r}? flags are --section.key value")
        key, equals, value = flag.removeprefix("--").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value (and known flags without one are --json and --debug)")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def guarded(body: Callable[[], int], *, debug: bool) -> int:
    """Run a command: our own errors are one line and an exit code."""
    try:
        return body()
    except BlackboxKDError as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted; what was received is kept, the same command goes on from here")
        return INTERRUPTED


Follow = Callable[[Config], None]
"""The part of a stage in every process of a launcher but the first."""


def stage_main(
    command: str,
    doc: str,
    stage: Stage,
    argv: Sequence[str] | None = None,
    *,
    show: Show | None = None,
    follow: Follow | None = None,
) -> int:
    """Parse, open the project, run one stage, print its result (as JSON, or by `show`); returns the exit code.

    Of several processes the first alone opens the project; a stage that has nothing to `follow` runs in one.
    """
    flags, rest = parser(command, doc).parse_known_args(argv)

    def body() -> int:
        rank = launched(command, follow)
        config = config_of(flags, rest)
        if rank and follow:
            follow(config)
            return 0
        with Project(config) as project:
            result = asyncio.run(_closing(stage, project))
            if flags.json:
                print(json.dumps(result, ensure_ascii=False))
            elif show is not None:
                show(project, result)
        return 0

    return guarded(body, debug=flags.debug)


def launched(command: str, follow: Follow | None) -> int:
    """The rank of this process among those that `accelerate launch` or `torchrun` started.

    Raises:
        ConfigError: there are several, and the stage runs in one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and follow is None:
        raise ConfigError(f"{command} runs in one process: start it without `accelerate launch`")
    return int(os.environ.get("RANK", 0))


async def _closing(stage: Stage, project: Project) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None

    def interrupted(*_: object) -> None:
        """Answers in flight are waited for; training stops where it is, its checkpoints are on disk."""
        if any(endpoint.engine.busy for endpoint in project.endpoints):
            task.get_loop().call_soon_threadsafe(task.cancel)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        async with AsyncExitStack() as stack:
            for endpoint in project.endpoints:
                await stack.enter_async_context(endpoint)
            return await stage(project)
    finally:
        signal.signal(signal.SIGINT, before)
