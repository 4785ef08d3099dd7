"""The teacher as stages and algorithms see it: it turns prompts into requests and requests into completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blackbox_kd.corpus import Corpus
from blackbox_kd.prompts import PrivateContext
from blackbox_kd.sections import SampleConfig
from blackbox_kd.teachers.base import Capabilities, Prefill, TeacherConfig
from blackbox_kd.teachers.budget import Budget, BudgetConfig
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.teachers.prefill import turn
from blackbox_kd.teachers.probe import capabilities
from blackbox_kd.teachers.scoring import Scorer
from blackbox_kd.teachers.wire import chat_body
from blackbox_kd.types import Author, Completion, Message, Prompt, Purpose, Request, SamplingParams, TeacherTokens

Ask = Callable[..., AsyncIterator[Completion]]
"""`complete(requests, description=...)`."""


class Questions:
    """Turns prompts into requests, as this teacher with its private prompt is asked; it asks nobody."""

    def __init__(self, config: TeacherConfig, sample: SampleConfig | None = None) -> None:
        """`sample`: how the sequence-level stage asks; on-policy draws of the same question go on from its last."""
        self.config, self.sample = config, sample or SampleConfig()
        self.context = PrivateContext(config.prompt.template, config.prompt.examples)

    def answer(self, prompt: Prompt, *, sample_idx: int = 0) -> Request:
        """A question of the sequence-level stage: the same draw of the same prompt is never paid for twice."""
        return self.request(prompt, "sample", self.sample.sampling, sample_idx=sample_idx)

    def request(
        self,
        prompt: Prompt,
        purpose: Purpose,
        sampling: SamplingParams,
        *,
        sample_idx: int = 0,
        messages: list[Message] | None = None,
        context: PrivateContext | None = None,
        completion_id: str | None = None,
        given: str | None = None,
        form: Prefill = "none",
        parameters: Mapping[str, Any] | None = None,
    ) -> Request:
        """A question about a prompt.

        `messages` replaces the prompt's own (a rewrite shows a draft), `context` the teacher's private part;
        `completion_id` names the student's text that it is about. `given` is the beginning of that text, which the
        teacher is to go on with, by the prefill `form` of its capabilities. `parameters` are added to the body, unless
        the endpoint does not accept them (`omit_params`). At temperature 0 there is only draw 0.
        """
        context = context or self.context
        sample_idx = sample_idx if sampling.temperature > 0 else 0
        asked, more = context.wrap(messages or prompt.messages), dict[str, Any]()
        if given is not None:
            message, more = turn(given, form)
            asked = [*asked, message]
        return Request(
            purpose=purpose,
            prompt_id=prompt.prompt_id,
            body=chat_body(self.config, asked, sampling, sample_idx, parameters) | more,
            sample_idx=sample_idx,
            context_hash=context.context_hash,
            completion_id=completion_id,
            cut_byte=None if given is None else len(given.encode()),
        )


class Teacher(Questions):
    """One endpoint with its private prompt; an async context manager (a local server ends with it)."""

    def __init__(
        self,
        config: TeacherConfig,
        corpus: Corpus,
        run_id: str,
        *,
        sample: SampleConfig | None = None,
        author: Author = "teacher",
        caps: BudgetConfig | None = None,
        run_dir: Path | None = None,
        beside: Budget | None = None,
    ) -> None:
        """`sample`: see `Questions`; `author`: of its answers; `run_dir`: shown by `status`; `beside`: see `Engine`."""
        config.check()
        super().__init__(config, sample)
        self.corpus, self.run_id = corpus, run_id
        self.engine = Engine(config, corpus, run_id, author, caps=caps, run_dir=run_dir, beside=beside)
        self._scorer: Scorer | None = None
        self._capabilities: Capabilities | None = None

    @property
    def capabilities(self) -> Capabilities:
        """What the endpoint can do, as far as `probe` or the config says."""
        self._capabilities = self._capabilities or capabilities(self.corpus, self.config)
        return self._capabilities

    def probed(self) -> bool:
        """Whether somebody has looked, maybe another run just now: the capabilities are read again."""
        self._capabilities = None
        return bool(self.corpus.capabilities(self.config.model, self.config.address))

    def set_capabilities(self, found: Mapping[str, tuple[Any, str]]) -> None:
        """What a probe found, for this process and all later ones."""
        self.corpus.set_capabilities(self.config.model, self.config.address, found, run_id=self.run_id)
        self._capabilities = None

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.engine.__aexit__(*exc)

    def complete(
        self,
        requests: Iterable[Request],
        *,
        total: int | None = None,
        round_: int = 0,
        known: bool = True,
        description: str = "asking the teacher",
    ) -> AsyncIterator[Completion]:
        """See `Engine.complete`."""
        return self.engine.complete(requests, total=total, round_=round_, known=known, description=description)

    def sampler(self, config: SampleConfig) -> Ask:
        """How the stage `sample` asks: one call a question, or many questions a batch."""
        if not config.batch:
            return self.complete
        from blackbox_kd.teachers.batch.batches import Batches  # with the SDK, which takes half a second

        return Batches(self.config, config, self.corpus, self.run_id, self.engine).complete

    async def ask(
        self, requests: Sequence[Request], *, round_: int = 0, description: str = "asking the teacher"
    ) -> None:
        """Until the corpus has what there is to be had."""
        async for _ in self.complete(requests, round_=round_, known=False, description=description):
            pass

    async def answers(
        self, requests: Sequence[Request], *, round_: int = 0, description: str = "asking the teacher"
    ) -> dict[str, Completion]:
        """request_key -> its first choice, for those that were answered.

        Read back from the corpus: where another run asked the same at the same time, the first answer there counts.
        """
        await self.ask(requests, round_=round_, description=description)
        found = self.corpus.answers([request.request_key for request in requests])
        return {key: choices[0] for key, choices in found.items()}

    async def score(
        self, items: Sequence[tuple[Prompt, Completion]], *, top: int, round_: int = 0
    ) -> dict[str, TeacherTokens]:
        """completion_id -> the teacher's tokens of a text that somebody else wrote, with `top` alternatives each.

        The last one is the token that ends an answer, scored whether or not the text ended there. What the endpoint
        cannot score is left out. See `scoring`.

        Raises:
            TeacherRefused: the endpoint cannot score, or its scores are not believed.
        """
        self._scorer = self._scorer or Scorer(self.config, self.corpus, self.engine, self.capabilities)
        requests = {
            completion.completion_id: self._scorer.request(
                self.context.wrap(prompt.messages),
                completion.text,
                top=top,
                prompt_id=prompt.prompt_id,
                context_hash=self.context.context_hash,
                about=completion.completion_id,
            )
            for prompt, completion in items
        }
        scored = await self._scorer.score(list(requests.values()), round_)
        return {i: scored[r.request_key] for i, r in requests.items() if r.request_key in scored}
