"""One project: what every stage starts from, opened once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from blackbox_kd import vllm
from blackbox_kd.algorithms.base import AlgorithmConfig, Tools
from blackbox_kd.checkers import task_prompts
from blackbox_kd.corpus import Corpus, curation
from blackbox_kd.errors import ConfigError
from blackbox_kd.hashing import content_id
from blackbox_kd.lane import Lane
from blackbox_kd.prompts import SPLITS, PromptSet, Template
from blackbox_kd.run_dir import RunDir, committed, made_with, round_of
from blackbox_kd.settings import Config, OnPolicyConfig
from blackbox_kd.student.render import Renderer
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.teachers.budget import worst_case
from blackbox_kd.teachers.prices import price_of
from blackbox_kd.teachers.teacher import Questions, Teacher
from blackbox_kd.types import Prompt, Request
from blackbox_kd.winrate import most_questions


def settled(config: Config, prompts: PromptSet) -> tuple[Config, str]:
    """The config with the on-policy algorithm that is meant and its learning rate, and why it is (`auto`).

    It does not depend on what has been spent: the same run makes the same choice again. Once there are rounds it stays
    the one that they have taken, also where a higher cap would pay for another one.
    """
    loop = config.onpolicy

    def left() -> int | None:
        cap = affordable(config, prompts)
        asked = prompts.count("train", config.sample.max_prompts) * config.sample.draws
        fixed = prompts.count("heldout") + prompts.count("ood")
        judged = most_questions(fixed, loop.rounds + 2) if config.evaluate.judge else 0
        return None if cap is None else cap - asked - most_graded(config, prompts) - 2 * fixed - judged

    a_round = min(loop.prompts_per_round, prompts.count("train"))
    chosen, why = loop.algorithm.resolve(loop.rounds, a_round, unanswered(config, prompts), left)
    if why and (before := taken(config.run_dir)):
        chosen, why = before, f"{before.name}, as in the rounds before"
    rate = loop.update.learning_rate or chosen.learning_rate
    update = loop.update.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"onpolicy": loop.model_copy(update={"algorithm": chosen, "update": update})}), why


def taken(run_dir: Path) -> AlgorithmConfig | None:
    """The algorithm of the rounds that there are."""
    for name in committed(run_dir):
        if name != "sft":
            return OnPolicyConfig.model_validate(made_with(run_dir, name)["onpolicy"]).algorithm
    return None


def unanswered(config: Config, prompts: PromptSet) -> int:
    """Prompts of the on-policy rounds beyond those that `sample` asks about."""
    loop, train = config.onpolicy, prompts.count("train")
    return max(0, min(loop.rounds * loop.prompts_per_round, train) - prompts.count("train", config.sample.max_prompts))


def most_graded(config: Config, prompts: PromptSet) -> int:
    """Questions of `curate.best_of_n`: one a prompt, if its answers differ."""
    return prompts.count("train", config.sample.max_prompts) if config.curate.best_of_n != "off" else 0


def affordable(config: Config, prompts: PromptSet) -> int | None:
    """Calls that the caps of the run pay for, each at the worst case of a first question; None where nothing is capped.

    Raises:
        ConfigError: see `worst_case`.
    """
    caps, first = config.budget, next(prompts.stream("train", 1), None)
    limits = [caps.max_requests] if caps.max_requests else []
    if first and (caps.max_tokens or caps.max_usd):
        worst = worst_case(Questions(config.teacher, config.sample).answer(first).body)
        price = price_of(config.teacher)
        if caps.max_tokens:
            limits.append(caps.max_tokens // (worst.prompt_tokens + worst.completion_tokens))
        if caps.max_usd and price and price.cost(worst):
            limits.append(int(caps.max_usd / price.cost(worst)))
    return min(limits, default=None)


def sample_questions(teacher: Questions, prompts: Iterable[Prompt]) -> Iterator[Request]:
    """One for each draw of each prompt."""
    for prompt in prompts:
        for draw in range(teacher.sample.draws):
            yield teacher.answer(prompt, sample_idx=draw)


class Project:
    """Everything that a stage works with, opened once; use as a context manager."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.why = ""
        """See `settled`."""
        self._stack = ExitStack()

    def __enter__(self) -> Project:
        config = self.config
        self.prompts = PromptSet(config.prompts, task_prompts(config.evaluate.tasks))
        config.teacher.check()
        if config.onpolicy.vllm:
            vllm.endpoint(config.onpolicy.vllm)
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
            self.config, self.why = settled(config, self.prompts)
            config = self.config
            for name in self.run_dir.checkpoints():  # before the config of the run is overwritten
                self.run_dir.done(name, self.settings_of(name))
            resolved = config.model_dump(mode="json") | {"corpus": str(config.corpus_path)}
            self.run_dir.save_config(resolved)
            context_hash = self.teacher.context.context_hash
            held_apart = [p for split in SPLITS if split != "train" for p in self.prompts[split]]
            with self.corpus.connect():
                self.corpus.add_run(self.run_id, config.run_dir, resolved, config.teacher.model, context_hash)
                self.corpus.add_prompts(held_apart)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

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

    def tools(self, renderer: Renderer, lane: Lane) -> Tools:
        """What the on-policy algorithm works with."""
        config = self.config
        return Tools(
            self.teacher, renderer, config.student, lane, config.seed, judge=self.judge, unseen=self.unseen,
            soft=config.sft.soft if config.sft.soft_labels else None,
            dropped=frozenset(curation.dropped(self.corpus, self.run_id)),
        )  # fmt: skip

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

    def asked_by_sample(self) -> dict[str, Prompt]:
        """Each of those questions by its request_key, and the prompt that it asks about.

        An answer belongs to it by that key: its own prompt_id is the one of whoever asked the same first.
        """
        by_id = {prompt.prompt_id: prompt for prompt in self.sampled_prompts}
        return {request.request_key: by_id[request.prompt_id] for request in self.sample_requests()}

    def training_rows(self) -> list[tuple[Prompt, str, str]]:
        """(prompt, completion_id, answer): whole answers to exactly those questions, by completion_id.

        Without those that this run's curation dropped (`curate.apply`).
        """
        asked = self.asked_by_sample()
        with self.corpus.connect():
            dropped, answers = curation.dropped(self.corpus, self.run_id), self.corpus.whole_answers(list(asked))
        return [
            (asked[key], completion_id, text.strip())
            for key, completion_id, text in answers
            if completion_id not in dropped
        ]

    def settings_of(self, checkpoint: str) -> dict[str, Any]:
        """What a checkpoint depends on; more rounds continue the same experiment."""
        config = self.config
        found = config.sections("seed", "student", "sft", "sample", "curate")
        found["sample"] = {key: value for key, value in found["sample"].items() if not key.startswith("batch")}
        found["sft"]["trainer"].pop("report_to", None)  # who watches does not change what is learnt
        found["questions"] = content_id([request.request_key for request in self.sample_requests()])
        if config.curate.best_of_n != "off" and self.judge:
            template = Template(config.curate.grades_template, "curate.grades_template")
            found["curate"]["judge"] = [self.judge.config.model, self.judge.context.context_hash]
            found["curate"]["grades"] = content_id(template.source)
        if config.curate.eval_overlap == "drop":
            found["curate"]["evaluation"] = content_id([prompt.prompt_id for prompt in self.prompts.evaluation])
        if checkpoint != "sft":
            found |= config.sections("onpolicy")
            del found["onpolicy"]["rounds"], found["onpolicy"]["vllm"]
            found["algorithm_files"] = config.onpolicy.algorithm.files_hash()
            if config.onpolicy.algorithm.needs_judge and self.judge:
                found["judge"] = {"model": self.judge.config.model, "prompt": self.judge.context.context_hash}
            found["train_prompts"] = content_id([prompt.prompt_id for prompt in self.prompts["train"]])
        return found

    def begin(self, checkpoint: str) -> None:
        """It is trained from its start: what an earlier one of that name and the later ones had measured goes.

        metrics.jsonl keeps it.
        """
        self.corpus.drop_metrics(self.run_id, checkpoint, round_of(checkpoint))

    def log(self, stage: str, rows: list[dict[str, Any]]) -> None:
        """Metrics to metrics.jsonl and to the corpus; a row names at least `name` and `value`."""
        defaults = {"run_id": self.run_id, "stage": stage, "checkpoint": "", "round": 0, "step": 0, "split": "train",
                    "set_id": "", "lo": None, "hi": None}  # fmt: skip
        full = [{**defaults, **row} for row in rows]
        self.run_dir.log(full)
        self.corpus.log_metrics(full)
