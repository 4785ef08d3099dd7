"""A vLLM server writes the student's rollouts: it loads the adapter of each round, and is asked through the engine.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 64

It is given the student's own prompt tokens and gives back the drawn ones, so that no template and no tokenizer of the
server's stands between them. https://docs.vllm.ai/en/latest/features/lora
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import (
    AlignmentError,
    ConfigError,
    RequestRejected,
    TeacherError,
    TeacherRefused,
    TransientError,
)
from blackbox_kd.hashing import draw_seed
from blackbox_kd.sections import VllmConfig
from blackbox_kd.teachers.base import Call, PriceConfig, Reply, Taken, Transport
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.wire import usage_of
from blackbox_kd.types import Completion, Request

Made = Callable[[Request, list[int], list[float]], Completion]
"""A completion from the drawn tokens and their log-probs."""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] = []


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]


_decoder = msgspec.json.Decoder(_Reply)


class Drawing:
    """See `teachers.base.Way`: a rollout is one call of /completions, by token ids."""

    def __init__(self, model: str, todo: Sequence[tuple[Request, list[int]]], end_id: int, made: Made) -> None:
        """`model`: the adapter's name on the server, or the base's; `todo`: requests with their prompts in tokens."""
        self.model, self.requests = model, [request for request, _ in todo]
        self._prompts_ids = {request.request_key: ids for request, ids in todo}
        self._end_id, self._made = end_id, made

    async def calls(self, request: Request) -> list[Call]:
        """What a model ships (top_k, penalties, other end tokens) is overruled: it would be another policy's draw."""
        asked = {key: request.body[key] for key in ("temperature", "top_p", "max_tokens")}
        asked |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True,
                  "stop_token_ids": [self._end_id], "logprobs": 1, "return_token_ids": True}  # fmt: skip
        if "seed" in request.body:
            asked["seed"] = draw_seed(request.body["seed"], request.body["messages"], request.sample_idx)
        return [Call({"model": self.model, "prompt": self._prompts_ids[request.request_key], **asked}, "completions")]

    def read(self, request: Request, replies: list[Reply]) -> Taken:
        """See `teachers.base.Way`.

        Raises:
            AlignmentError: the server went on from other tokens than it was given.
        """
        try:
            choice = _decoder.decode(replies[-1].data).choices[0]
        except (msgspec.MsgspecError, UnicodeDecodeError, IndexError) as error:
            raise TransientError(f"a 200 that cannot be read ({error})", status=200) from error
        ids, values = choice.token_ids, choice.logprobs.token_logprobs if choice.logprobs else []
        if ids is None or choice.prompt_token_ids is None:
            raise TeacherRefused("it does not say which tokens it drew (`return_token_ids`): vLLM 0.10.2 or newer does")
        if choice.prompt_token_ids != self._prompts_ids[request.request_key]:
            raise AlignmentError("onpolicy.vllm: the server went on from other tokens than it was given")
        if not ids or len(values) != len(ids) or None in values:
            raise AlignmentError(f"onpolicy.vllm: {len(values)} log-probs for {len(ids)} drawn tokens")
        made = self._made(request, ids, [value for value in values if value is not None])
        return Taken([made], usage_of(replies[-1].data))


def endpoint(config: VllmConfig) -> OpenAITeacherConfig:
    """As the engine reaches it.

    Raises:
        ConfigError: no address, a password in it, or a key that is not set.
    """
    found = OpenAITeacherConfig(
        model=config.model,
        base_url=config.base_url,
        api_key_env=config.api_key_env,
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        price=PriceConfig(input=0, output=0),
        retry_dead_letters=True,  # the round needs all of its rollouts: nothing is given up for good
    )
    try:
        found.check()
    except ConfigError as error:
        raise ConfigError(_ours(error)) from error
    return found


def _ours(error: Exception) -> str:
    """It names the keys as those of a teacher."""
    return str(error).replace("teacher.", "onpolicy.vllm.")


def draw(config: VllmConfig, adapter: Path | None, drawing: Drawing, corpus: Corpus, run_id: str) -> None:
    """Rollouts of an adapter, or of the base, into the corpus; it has its own event loop.

    Raises:
        TeacherError: the server does not load the adapter, or does not answer; what was drawn is kept.
        AlignmentError: see `Drawing`.
    """
    server, folder = endpoint(config), adapter and adapter.resolve()

    async def run() -> None:
        async with (
            Engine(server, corpus, run_id, "student") as engine,
            _loaded(await engine.transport(), drawing.model, folder),
        ):
            asked = engine.complete(drawing.requests, known=False, way=drawing, description="student writes (vLLM)")
            async for _ in asked:
                pass

    try:
        asyncio.run(run())
    except TeacherError as error:
        raise type(error)(f"onpolicy.vllm at {server.address}: {_ours(error)}", status=error.status) from error


@asynccontextmanager
async def _loaded(transport: Transport, name: str, adapter: Path | None) -> AsyncIterator[None]:
    """The server has the adapter inside the block; its name is a hash of its content, so one that is there is it."""
    if adapter is None:
        yield
        return
    try:
        await transport.send({"lora_name": name, "lora_path": str(adapter)}, "load_lora_adapter")
    except RequestRejected as error:
        if "already been loaded" not in str(error):
            raise TeacherRefused(
                f"it does not load {adapter}: {error}; it must see that folder, and be started with "
                "--enable-lora, --max-lora-rank of at least lora.r, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
                status=error.status,
            ) from error
    try:
        yield
    finally:
        with suppress(TeacherError):  # it only takes room there
            await transport.send({"lora_name": name}, "unload_lora_adapter")
