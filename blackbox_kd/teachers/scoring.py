"""Logprobs of texts that somebody else wrote, as the teacher sees them; in whichever way its endpoint can.

No way is believed before it has scored the endpoint's own answer as the endpoint did when it wrote it: echoes
are off by one, made up and ignored. That also finds a chat template that is not the endpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import RequestRejected, TeacherRefused
from blackbox_kd.progress import say
from blackbox_kd.teachers import checks
from blackbox_kd.teachers.base import Call, Capabilities, Reply, TeacherConfig
from blackbox_kd.teachers.checks import Verdict
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.teachers.probe import ANSWER_TOKENS, QUESTION
from blackbox_kd.teachers.scores import too_certain
from blackbox_kd.teachers.ways import WAYS, question
from blackbox_kd.teachers.wire import chat_body
from blackbox_kd.types import Message, Prompt, Request, SamplingParams, TeacherTokens, TokenLogprob, scorer

CHECKED_BY = [(0.0, 0), (1.0, 0), (1.0, 1), (1.0, 2)]
"""Temperature and number of a draw."""
AT_ONE = SamplingParams(temperature=1.0, max_completion_length=1)
"""Servers disagree on what a temperature does to the logprobs of given tokens."""


class Scorer:
    """One endpoint; checked once, before the first question that is not answered in the corpus."""

    def __init__(self, config: TeacherConfig, corpus: Corpus, engine: Engine, can: Capabilities) -> None:
        """Raises:
        TeacherRefused: it cannot score.
        """
        if can.scoring not in WAYS:
            raise TeacherRefused(f"{config.model} cannot score given tokens (scoring: {can.scoring}); see `probe`")
        self._config, self._corpus, self._engine, self._can = config, corpus, engine, can
        self._way = WAYS[can.scoring](config, self._look)
        self._checked = False

    def request(
        self, messages: list[Message], text: str, *, top: int, prompt_id: str, context_hash: str | None, about: str
    ) -> Request:
        """Score `text` as the answer to these messages; `about` is its completion_id."""
        body = question(chat_body(self._config, messages, AT_ONE, 0), messages, text, top)
        return Request(purpose="score", body=body, prompt_id=prompt_id, context_hash=context_hash, completion_id=about)

    async def score(self, requests: Sequence[Request], round_: int) -> dict[str, TeacherTokens]:
        """request_key -> tokens of the text and behind them the one that ends it, for those that were scored.

        Read back from the corpus, which rounds: after a restart they are the same. The logprobs are rows of the
        student's completion; where the same text was asked about before, of the completion that it was asked about.

        Raises:
            TeacherRefused: the endpoint's scores are not those that it writes with.
        """
        if not requests:
            return {}
        self._corpus.add_requests(requests)
        keys = [request.request_key for request in requests]
        stored = self._corpus.requests(keys)
        if not self._checked and stored.keys() - self._corpus.settled(keys)[0]:
            await self._check()
        async for _ in self._engine.complete(
            list(stored.values()), round_=round_, known=False, way=self._way, description="score"
        ):
            pass
        about = {key: str(request.completion_id) for key, request in stored.items()}
        by = {scorer(request.model, request.context_hash) for request in requests}
        found: dict[str, TeacherTokens] = {}
        for each in by:
            found |= self._corpus.scored_tokens(list(about.values()), each)
        return {key: found[about[key]] for key in keys if about[key] in found}

    async def _check(self) -> None:
        works, why = await self._agrees()
        if not works:
            raise TeacherRefused(
                f"{self._config.model} gives other logprobs when it scores ({self._can.scoring}) than when it writes "
                f"the same tokens: {why}; nothing is learnt from them, see `probe` and teacher.tokenizer"
            )
        say(f"scoring by {self._can.scoring}: the endpoint's own answer scores as it was written ({why})")
        self._checked = True

    async def _agrees(self) -> Verdict:
        """By the greedy answer; where all of its tokens are as likely, by one that is drawn."""
        wrote = list[TokenLogprob]()
        try:
            for temperature, draw in CHECKED_BY:
                sampling = SamplingParams(temperature=temperature, max_completion_length=ANSWER_TOKENS, top_logprobs=1)
                answer = checks.read(await self._ask(Call(chat_body(self._config, QUESTION, sampling, draw))))
                wrote = answer.tokens
                if not too_certain(wrote):
                    break
            if not wrote:
                return False, answer.no or "it shows no logprobs when it writes"
            text = "".join(token.token for token in wrote)
            request = self.request(QUESTION, text, top=1, prompt_id="", context_hash=None, about="")
            scored = self._way.scored(request, [await self._ask(call) for call in await self._way.calls(request)])
        except RequestRejected as error:
            return False, str(error)
        self._way.end = scored[-1]
        return checks.agreement(wrote, scored[:-1])

    async def _ask(self, call: Call) -> Reply:
        about = Prompt(messages=QUESTION, split="train", source="probe").prompt_id
        return await self._engine.call(
            Request(purpose="probe", body=call.body, endpoint=call.endpoint, prompt_id=about)
        )

    async def _look(self, body: dict[str, Any], path: str) -> Any:
        """A template applied, a text tokenised: it costs nothing, and is not kept."""
        transport = await self._engine.transport()
        return msgspec.json.decode((await transport.send(body, path)).data)
