"""A run as its stages leave it, by hand: a run directory with a corpus, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from blackbox_kd.corpus import Corpus
from blackbox_kd.corpus.journal import Answered
from blackbox_kd.run_dir import ADAPTER_FILE, SETTINGS_FILE, policy_of
from blackbox_kd.settings import Config
from blackbox_kd.teachers.wire import chat_body
from blackbox_kd.types import Completion, Feedback, Prompt, Request, SamplingParams
from blackbox_kd.yardstick import fixed_sampling
from tests.conftest import RUN_ID
from tests.records import CONTEXT, answered, completion, prompt, request, token, usage

BASE = "base-hash"
STUDENT = "pupil"
CHECKPOINTS = ("base", "sft", "round-1", "round-2")
NASTY = '<script>document.title = "owned"</script><img src="http://example.com/x.png" onerror="alert(1)"> & "\'</style>'
SCRIPTS = ("مرحبا بالعالم", "🙂🤷🏽 ok", "Grüße")


class Run:
    """A folder that is filled stage by stage; `save` puts the rows into its corpus, all of them at once."""

    def __init__(self, folder: Path, *, run_id: str = RUN_ID, corpus: Path | None = None, **config: Any) -> None:
        self.folder, self.run_id = folder, run_id
        folder.mkdir(parents=True)
        self.corpus = Corpus(corpus or folder / "corpus.duckdb")
        given = {
            "seed": 7, "run_dir": str(folder), "corpus": str(self.corpus.path), "prompts": {"path": "data"},
            "teacher": {"provider": "scripted", "model": "m", "reply": "yes"}, "student": {"model": STUDENT},
            "onpolicy": {"rounds": 2, "algorithm": {"name": "relabel"}}, "evaluate": {"every_steps": 12},
        } | config  # fmt: skip
        self.settings = Config.model_validate(given)
        self.config = self.settings.model_dump(mode="json")
        (folder / "run.json").write_text(json.dumps({"run_id": run_id}))
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        self.corpus.add_run(run_id, folder, self.config, "m", CONTEXT)
        self.start = 1.7e9  # of its calls
        self.prompts, self.requests = list[Prompt](), list[Request]()
        self.records, self.metrics = list[Answered](), list[dict[str, Any]]()
        self.written, self.said = dict[str, list[Completion]](), dict[int, list[Feedback]]()

    def save(self) -> Run:
        """Everything that was made since."""
        self.corpus.add_prompts(self.prompts)
        self.corpus.add_requests(self.requests)
        assert self.corpus.try_ingest(self.records)
        for scorer, texts in self.written.items():
            self.corpus.add_completions(texts, scorer=scorer, run_id=self.run_id)
        for round_, said in self.said.items():
            self.corpus.add_feedback(said, round_=round_, run_id=self.run_id)
        self.corpus.log_metrics(self.metrics)
        for rows in (self.prompts, self.requests, self.records, self.metrics, self.written, self.said):
            rows.clear()
        return self

    def sampled(self, count: int = 6, **attempt: Any) -> None:
        """The teacher's answers to train prompts, one of them cut off."""
        asked = [prompt(f"Say {i}") for i in range(count)]
        requests = [request(p, body=self.body(p, self.settings.sample.sampling)) for p in asked]
        self.prompts += asked
        self.requests += requests
        ends = ["length", *["stop"] * (count - 1)]
        for i, (each, end) in enumerate(zip(requests, ends, strict=True)):
            text = completion(each, text=f"one {i}", finish_reason=end, usage=usage(20, 4))
            self.bill([text], attempted_at=self.start + i, **attempt)

    def body(self, to: Prompt, sampling: SamplingParams) -> dict[str, Any]:
        """Of a question to the teacher."""
        return chat_body(self.settings.teacher, to.messages, sampling, 0)

    def bill(self, texts: Sequence[Completion], **attempt: Any) -> None:
        """A call of this run that brought these texts."""
        spent = {"run_id": self.run_id, "usage": texts[0].usage, "latency_s": 0.5} | attempt
        self.records.append(answered(*texts, **spent))

    def trained(self, name: str, steps: int, *, start: float = 1.0) -> None:
        """A checkpoint, with its losses and a look at the fixed set in the middle."""
        folder = self.folder / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / ADAPTER_FILE).write_text(name)
        (folder / SETTINGS_FILE).write_text("{}")
        stage, number = ("sft", 0) if name == "sft" else ("onpolicy", int(name[-1]))
        loss = "nll" if stage == "sft" else "ce_nll"
        each_step = range(1, steps + 1)
        rows = [{"name": n, "step": step, "value": start / step} for step in each_step for n in (loss, "loss")]
        rows += [
            {"name": n, "step": steps // 2, "value": start, "lo": start - 0.1, "hi": start + 0.1, "split": "heldout",
             "set_id": "set-a"}
            for n in ("tail_kl", "teacher_nll")
        ]  # fmt: skip
        if number:
            rows += [{"name": "rollout_entropy", "value": 0.5 / number}, {"name": "feedback_failed", "value": 0.0}]
        self.log(stage, [{"checkpoint": name, "round": number, **row} for row in rows])

    def log(self, stage: str, rows: list[dict[str, Any]]) -> None:
        """As `Project.log`."""
        given = {"run_id": self.run_id, "stage": stage, "round": 0, "step": 0, "split": "train", "set_id": "",
                 "lo": None, "hi": None}  # fmt: skip
        self.metrics += [{**given, **row} for row in rows]

    def drafted(self, round_: int, texts: Sequence[tuple[str, str]]) -> None:
        """Drafts of a round and what the teacher made of them."""
        for i, (wrote, made) in enumerate(texts):
            about = prompt(f"Say {i}")
            asked = request(about, purpose="rollout", context_hash=None, sample_idx=round_, body={"model": STUDENT})
            draft = completion(
                asked, author="student", model=STUDENT, policy=self.policy("sft"), text=wrote, round=round_,
                logprobs=[token(word, -0.5 * (n + i)) for n, word in enumerate(wrote.split())],
            )  # fmt: skip
            body = {"draft": wrote, "of": round_}
            fixed = request(about, purpose="relabel", completion_id=draft.completion_id, body=body)
            better = completion(fixed, text=made, round=round_, usage=usage(30, 6))
            self.prompts.append(about)
            self.requests += [asked, fixed]
            self.written.setdefault(f"{STUDENT}@{draft.policy}", []).append(draft)
            self.bill([better], attempted_at=self.start + 60 * round_ + i)
            said = Feedback(completion_id=draft.completion_id, kind="rewrite", scorer="m@x",
                            target_completion_id=better.completion_id)  # fmt: skip
            self.said.setdefault(round_, []).append(said)

    def policy(self, checkpoint: str) -> str:
        """Of a checkpoint that is there."""
        return policy_of(BASE, None if checkpoint == "base" else self.folder / "checkpoints" / checkpoint)

    def evaluated(self, names: Sequence[str], answers: dict[str, dict[str, str]], **numbers: Sequence[float]) -> None:
        """Answers by question (`teacher`, then checkpoints), and held-out numbers in the order of the checkpoints."""
        for question, texts in answers.items():
            about = prompt(question, split="heldout")
            self.prompts.append(about)
            for who, text in texts.items():
                self._answer(about, who, text)
        for metric, values in {"tail_kl": [1.8, 0.15, 0.14, 0.13], **numbers}.items():
            for name, value in zip(names, values, strict=False):
                row = {"checkpoint": name, "round": CHECKPOINTS.index(name), "name": metric, "value": value,
                       "lo": value * 0.9, "hi": value * 1.1, "set_id": "set-a"}  # fmt: skip
                self.log("evaluate", [{**row, "split": split} for split in ("heldout", "ood")])

    def _answer(self, about: Prompt, who: str, text: str) -> None:
        """The greedy one, and then for a student the draw whose diversity is measured, another text without scores."""
        if who == "teacher":
            greedy, _ = fixed_sampling(self.settings.evaluate)
            asked = request(about, purpose="evaluate", body=self.body(about, greedy))
            self.requests.append(asked)
            self.bill([completion(asked, text=text, usage=usage(20, 5))], attempted_at=self.start + 30)
            return
        scored = [token(part, -0.7) for part in text.split(" ")]
        length = self.settings.evaluate.max_completion_length
        for temperature, wrote, tokens in ((0.0, text, scored), (1.0, f"drawn {text}", None)):
            body = {"model": STUDENT, "policy": self.policy(who), "temperature": temperature, "max_tokens": length}
            asked = request(about, purpose="evaluate", context_hash=None, body=body)
            self.requests.append(asked)
            said = completion(asked, author="student", model=STUDENT, policy=self.policy(who), text=wrote,
                              logprobs=tokens)  # fmt: skip
            self.written.setdefault(f"{STUDENT}@{said.policy}", []).append(said)


def whole(folder: Path) -> Run:
    """Every stage, with texts in several scripts and one that would like to be markup."""
    run = Run(folder, report_to=NASTY)
    run.sampled()
    run.trained("sft", 12)
    for round_ in (1, 2):
        run.drafted(round_, [("one two", "one two"), ("three four", "3 4"), (NASTY, "Servus " + NASTY)])
        run.trained(f"round-{round_}", 4, start=0.2)
    full = "one two three"
    texts = {
        f"Question {i}": {"teacher": full, "base": "no", "sft": "one two", "round-2": full[: 4 + i]} for i in range(10)
    }
    texts |= {same: dict.fromkeys(("teacher", *CHECKPOINTS), same) for same in (" ".join(SCRIPTS), NASTY)}
    run.evaluated(CHECKPOINTS, texts, teacher_nll=[2.2, 0.6, 0.6, 0.5], chrf=[29, 91, 95, 98])
    return run.save()
