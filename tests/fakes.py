"""A scripted OpenAI-compatible server on a real loopback socket."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web


def chat_reply(text: str, *, logprobs: bool = False, finish_reason: str = "stop", **extra: Any) -> dict[str, Any]:
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


def error_reply(
    status: int, message: str = "no", code: str | int | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """An error as OpenAI sends it."""
    return web.json_response({"error": {"message": message, "code": code}}, status=status, headers=headers)


async def cut_short(request: web.Request) -> web.StreamResponse:
    """A 200 whose connection closes in the middle of its body."""
    response = web.StreamResponse(headers={"content-length": "1000", "content-type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices":[{"mess')
    assert request.transport is not None
    request.transport.close()
    return response


def reset(request: web.Request) -> web.StreamResponse:
    """No answer at all: the connection is reset."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def unused_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


Answer = web.StreamResponse | dict[str, Any]
Handler = Callable[[dict[str, Any], web.Request], "Answer | Awaitable[Answer]"]


class FakeAPI:
    """Counts what it is asked; each reply is made by `handler(body, request)` (a dict is a 200 chat completion).

    `models_reply()` is what /models answers instead of its list.
    """

    def __init__(
        self,
        handler: Handler | None = None,
        *,
        key: str | None = None,
        delay_s: float = 0.0,
        models_reply: Callable[[], web.Response] | None = None,
    ) -> None:
        self.handler = handler or (lambda body, request: chat_reply(f"echo {body['messages'][-1]['content']}"))
        self.key, self.delay_s, self.models_reply = key, delay_s, models_reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrivals: list[float] = []
        """time.monotonic() of each question."""
        self.models_asked = 0
        self.in_flight = self.most_in_flight = 0
        self.url = ""

    @property
    def asked(self) -> list[str]:
        """The last message of each question."""
        return [str(body["messages"][-1]["content"]) for body in self.bodies]

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/v1/models", self.models)
        router.add_post("/v1/chat/completions", self.chat)
        router.add_post("/v1/completions", self.chat)

    def _allowed(self, request: web.Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def models(self, request: web.Request) -> web.StreamResponse:
        self.models_asked += 1
        if not self._allowed(request):
            return error_reply(401, "Incorrect API key", "invalid_api_key")
        if self.models_reply:
            return self.models_reply()
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.arrivals.append(time.monotonic())
        if not self._allowed(request):
            return error_reply(401, "Incorrect API key", "invalid_api_key")
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            reply = self.handler(body, request)
            if inspect.isawaitable(reply):
                reply = await reply
        finally:
            self.in_flight -= 1
        return web.json_response(reply) if isinstance(reply, dict) else reply


@asynccontextmanager
async def serving(api: FakeAPI) -> AsyncIterator[FakeAPI]:
    """The fake on a free loopback port; `api.url` is its base URL."""
    app = web.Application()
    api.add_routes(app.router)
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


class AnyPath(FakeAPI):
    """Answers below any path and remembers it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.paths: list[str] = []

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/{path:.*}", self.models)
        router.add_post("/{path:.*}", self.chat)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path_qs)
        return await super().chat(request)


@contextmanager
def served(api: FakeAPI) -> Iterator[FakeAPI]:
    """`serving` in a thread of its own, for callers that run their own event loop or process."""
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        async with serving(api):
            stop.append(lambda: loop.call_soon_threadsafe(ended.set))
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake-api")
    thread.start()
    assert ready.wait(10)
    try:
        yield api
    finally:
        stop[0]()
        thread.join(10)
        assert not thread.is_alive()
