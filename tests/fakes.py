"""A scripted OpenAI-compatible server on a real loopback socket, and a tiny student made on the spot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


def chat_reply(
    text: str, *, logprobs: bool = False, finish_reason: str = "stop", **extra: Any
) -> dict[str, Any]:
    """A chat completion as hosted APIs send it."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
    }
    if logprobs:
        entry = {"token": text, "logprob": -0.5, "bytes": list(text.encode())}
        choice["logprobs"] = {"content": [{**entry, "top_logprobs": [entry]}]}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "served-model",
        "choices": [choice],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        **extra,
    }


Handler = Callable[[dict[str, Any], web.Request], "web.StreamResponse | dict[str, Any]"]


class FakeAPI:
    """Counts what it is asked; each reply is made by `handler(body, request)` (a dict is a 200 chat completion)."""

    def __init__(
        self, handler: Handler | None = None, *, key: str | None = None, delay_s: float = 0.0
    ) -> None:
        self.handler = handler or (
            lambda body, request: chat_reply(f"echo {body['messages'][-1]['content']}")
        )
        self.key, self.delay_s = key, delay_s
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.url = ""

    def _allowed(self, request: web.Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def models(self, request: web.Request) -> web.StreamResponse:
        if not self._allowed(request):
            return web.json_response(
                {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}, status=401
            )
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if not self._allowed(request):
            return web.json_response(
                {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}, status=401
            )
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            reply = self.handler(body, request)
        finally:
            self.in_flight -= 1
        return web.json_response(reply) if isinstance(reply, dict) else reply


@asynccontextmanager
async def serving(api: FakeAPI) -> AsyncIterator[FakeAPI]:
    """The fake on a free loopback port; `api.url` is its base URL."""
    app = web.Application()
    app.router.add_get("/v1/models", api.models)
    app.router.add_post("/v1/chat/completions", api.chat)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    api.url = f"http://{host}:{port}/v1"
    try:
        yield api
    finally:
        await runner.cleanup()
