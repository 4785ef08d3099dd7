"""How an endpoint is made to score given tokens: a question becomes calls, and their replies tokens with logprobs.

The question is a chat body whose last message is the text, with `prompt_logprobs`: what vLLM takes as it is. The others
take raw text or token ids, so that the conversation is rendered first. All score the token that ends the text as well.
A way that is named in `Capabilities.scoring` is one class here, and one line in WAYS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from blackbox_kd.errors import RequestRejected
from blackbox_kd.teachers import scores
from blackbox_kd.teachers.base import Call, Reply, Taken, TeacherConfig
from blackbox_kd.teachers.failures import UNREADABLE, unreadable
from blackbox_kd.teachers.rendering import Rendering
from blackbox_kd.teachers.wire import native_body, usage_of
from blackbox_kd.types import Message, Request, Scores, TokenLogprob, TopLogprob

Look = Callable[[dict[str, Any], str], Awaitable[Any]]
"""`(body, path)` -> decoded reply of a call that costs nothing."""

FORCE = 100
"""Of `logit_bias`; the most that OpenAI's API allows, and more than models tell their tokens apart by."""


def question(body: dict[str, Any], messages: list[Message], text: str, top: int) -> dict[str, Any]:
    """Score `text` as the answer to these messages, with `top` alternatives a token; `body` says the rest."""
    said = [*messages, {"role": "assistant", "content": text}]
    return {**body, "messages": said, "add_generation_prompt": False, "prompt_logprobs": top}


class ScoringWay(ABC):
    """See `base.Way`."""

    def __init__(self, config: TeacherConfig, look: Look) -> None:
        self._config, self._look = config, look
        self.end: TopLogprob | None = None
        """What ends an answer, once that is known."""
        self._rendering = Rendering(config, look)

    @abstractmethod
    async def calls(self, request: Request) -> list[Call]:
        """See `base.Way`."""

    @abstractmethod
    def tokens(self, request: Request, replies: list[Any]) -> list[TokenLogprob]:
        """All that the replies say, in order."""

    def scored(self, request: Request, replies: list[Reply]) -> list[TokenLogprob]:
        """The tokens of the text, and behind them the one that ends it.

        Raises:
            RequestRejected: they do not come back.
            TransientError: a reply cannot be read.
        """
        said = [_decoded(reply.data) for reply in replies]
        found = scores.of_text(self.tokens(request, said), text_of(request), self.end)
        if found is None:
            raise RequestRejected(f"the scores are not those of the text {text_of(request)[:60]!r}", status=200)
        return found

    def read(self, request: Request, replies: list[Reply]) -> Taken:
        """See `base.Way`."""
        assert request.completion_id is not None
        found = Scores(completion_id=request.completion_id, model=request.model, logprobs=self.scored(request, replies))
        return Taken(usage=usage_of(replies[-1].data), scores=found)

    async def rendered(self, request: Request) -> str:
        """Prompt, text and what the template puts behind an answer."""
        before = await self._rendering.prompt(request.body["messages"][:-1])
        return before + text_of(request) + await self._rendering.behind()


class PromptLogprobs(ScoringWay):
    """vLLM's chat. https://docs.vllm.ai/en/latest/serving/openai_compatible_server"""

    async def calls(self, request: Request) -> list[Call]:
        """The question itself."""
        return [Call(request.body)]

    def tokens(self, request: Request, replies: list[Any]) -> list[TokenLogprob]:
        """Of the whole conversation."""
        return scores.prompt_tokens(replies[0], top_of(request))


class Echo(ScoringWay):
    """/completions that repeats its prompt, as Together and Fireworks have it.

    https://docs.together.ai/reference/completions-1, https://docs.fireworks.ai/api-reference/post-completions
    """

    async def calls(self, request: Request) -> list[Call]:
        """One; `max_tokens` 0 would mean no limit to some servers."""
        body = {"model": request.model, "prompt": await self.rendered(request), "max_tokens": 1, "temperature": 1.0,
                "echo": True, "logprobs": top_of(request)}  # fmt: skip
        return [Call(body | self._config.extra_body, "completions")]

    def tokens(self, request: Request, replies: list[Any]) -> list[TokenLogprob]:
        """Of the prompt, with the token that follows in some replies."""
        return scores.echoed_tokens(replies[0])


class Generate(ScoringWay):
    """SGLang's own endpoint; its /completions refuses to score."""

    async def calls(self, request: Request) -> list[Call]:
        """One."""
        return [Call(native_body(self._config, await self.rendered(request), top_of(request)), "native")]

    def tokens(self, request: Request, replies: list[Any]) -> list[TokenLogprob]:
        """Of the prompt."""
        return scores.native_tokens(replies[0])


class Forced(ScoringWay):
    """llama.cpp scores nothing but what it writes: `logit_bias` makes it write the text, one call a token.

    Exact where the bias leaves logprobs alone. The server tokenises, and reads the prompt from its cache.
    """

    _end: list[int] | None = None

    async def calls(self, request: Request) -> list[Call]:
        """One for each token of the text, and one for the token that ends it."""
        before = await self._rendering.prompt(request.body["messages"][:-1])
        head, ids = await self._tokenise(before), await self._tokenise(before + text_of(request))
        if ids[: len(head)] != head:
            raise RequestRejected(f"the first token of {text_of(request)[:60]!r} begins in the prompt")
        if self._end is None:
            self._end = (await self._tokenise(await self._rendering.behind(), special=False))[:1]
        ids = [*ids, *self._end]
        return [self._call(request, ids[:i], ids[i]) for i in range(len(head), len(ids))]

    def _call(self, request: Request, before: list[int], forced: int) -> Call:
        body = {"model": request.model, "prompt": before, "max_tokens": 1, "temperature": 0, "cache_prompt": True,
                "logprobs": max(1, top_of(request)), "logit_bias": {str(forced): FORCE}}  # fmt: skip
        return Call(body | self._config.extra_body, "completions")

    async def _tokenise(self, text: str, *, special: bool = True) -> list[int]:
        """`special`: with the token that begins every prompt, where the model has one."""
        reply = await self._look({"content": text, "add_special": special, "parse_special": True}, "/tokenize")
        return [int(i) for i in scores.items(reply, "tokens")]

    def tokens(self, request: Request, replies: list[Any]) -> list[TokenLogprob]:
        """What was written; nothing where that does not end as it was told to."""
        choices = [choice for reply in replies for choice in scores.items(reply, "choices")]
        found = [token for choice in choices for token in scores.choice_tokens(choice)[:1]]
        return found if [token.id for token in found[-1:]] == self._end else []


def _decoded(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except UNREADABLE as error:
        raise unreadable(f"a 200 that cannot be read ({error})", data) from error


def text_of(request: Request) -> str:
    """What is scored."""
    return str(request.body["messages"][-1]["content"])


def top_of(request: Request) -> int:
    """Alternatives that are wanted."""
    return int(request.body["prompt_logprobs"])


WAYS: dict[str, type[ScoringWay]] = {
    "prompt_logprobs": PromptLogprobs,
    "echo": Echo,
    "generate": Generate,
    "forced": Forced,
}
