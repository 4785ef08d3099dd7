"""The hot path on a real socket: what is sent, through which door, and what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web

from blackbox_kd.errors import (
    ConfigError,
    RateLimited,
    RequestRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnreachable,
    TransientError,
)
from blackbox_kd.teachers.base import Reply, api_key
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from tests.fakes import FakeAPI, chat_reply, cut_short, error_reply, reset, served, serving, unused_port

BODY = {"model": "m", "messages": [{"role": "user", "content": "Grüß Gott 🌍"}], "temperature": 1.0}


def send(url: str, body: dict[str, Any] = BODY, **options: Any) -> Any:
    """One question over a transport of its own; the reply as JSON."""

    async def once() -> Reply:
        config = OpenAITeacherConfig(**{"model": "m", "base_url": url, "api_key_env": None} | options)
        async with config.connect() as transport:
            return await transport.send(body)

    return json.loads(asyncio.run(once()).data)


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_body_arrives_as_it_is_and_the_reply_comes_back_as_it_is(slash: str) -> None:
    reply = chat_reply("Servus 🌍")
    with served(FakeAPI(lambda *_: reply)) as api:
        assert send(api.url + slash) == reply
    assert api.bodies == [BODY]
    assert api.headers[0]["content-type"] == "application/json"
    assert "authorization" not in api.headers[0]


def test_another_path_is_asked_and_the_headers_come_back_in_lower_case() -> None:
    def handler(body: dict[str, Any], request: web.Request) -> web.Response:
        return web.json_response({"path": request.path}, headers={"X-RateLimit-Remaining-Requests": "7"})

    async def once(url: str) -> Reply:
        config = OpenAITeacherConfig(model="m", base_url=url, api_key_env=None)
        async with config.connect() as transport:
            return await transport.send(BODY, "completions")

    with served(FakeAPI(handler)) as api:
        reply = asyncio.run(once(api.url))
    assert json.loads(reply.data) == {"path": "/v1/completions"}
    assert reply.headers["x-ratelimit-remaining-requests"] == "7"


def test_the_key_and_the_extra_headers_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " sk-1\n")
    with served(FakeAPI(key="sk-1")) as api:
        send(api.url, api_key_env="MY_KEY", extra_headers={"X-Team": "blue"})
    assert api.headers[0]["authorization"] == "Bearer sk-1"
    assert api.headers[0]["x-team"] == "blue"


@pytest.mark.parametrize(
    ("reply", "kind", "status"),
    [
        (lambda _: error_reply(400), RequestRejected, 400),
        (lambda _: error_reply(401), TeacherRefused, 401),
        (lambda _: error_reply(503), TransientError, 503),
        (lambda _: web.Response(status=500, text="Internal Server Error"), TransientError, 500),
        (reset, TransientError, None),
        (cut_short, TransientError, None),
    ],
)
def test_a_failure_is_an_error_of_its_kind(reply: Callable[..., Any], kind: type[TeacherError], status: int) -> None:
    with served(FakeAPI(lambda _, request: reply(request))) as api, pytest.raises(kind) as raised:
        send(api.url)
    assert raised.value.status == status
    assert str(raised.value)
    assert len(api.bodies) == 1  # the retries are the engine's


def test_retry_after_is_read_from_the_headers_of_the_reply() -> None:
    limited = FakeAPI(lambda *_: error_reply(429, headers={"Retry-After": "3"}))
    with served(limited) as api, pytest.raises(RateLimited) as raised:
        send(api.url)
    assert raised.value.retry_after_s == 3.0


def test_a_server_that_goes_away_between_two_questions_is_a_passing_failure() -> None:
    async def once_and_again() -> None:
        async with serving(FakeAPI()) as api:
            config = OpenAITeacherConfig(model="m", base_url=api.url, api_key_env=None)
            transport = await stack.enter_async_context(config.connect())
            await transport.send(BODY)
        with pytest.raises(TransientError) as raised:
            await transport.send(BODY)
        assert raised.value.status is None
        await stack.aclose()

    stack = AsyncExitStack()
    asyncio.run(once_and_again())


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_a_proxy_of_the_environment_is_used_by_check_and_questions(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with served(FakeAPI()) as proxy:
        monkeypatch.setenv(variable, proxy.url.removesuffix("/v1"))
        reply = send("http://teacher.invalid/v1")
    assert reply["choices"][0]["message"]["content"] == "echo Grüß Gott 🌍"
    assert (proxy.models_asked, len(proxy.bodies)) == (1, 1)
    assert proxy.headers[0]["host"] == "teacher.invalid"


def test_the_proxy_is_left_out_where_no_proxy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(FakeAPI()) as api:
        send(api.url)
    assert len(api.bodies) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/v1", "http://teacher.invalid/v1"])
def test_an_address_where_nobody_is_is_named_in_one_line(url: str) -> None:
    url = url.format(port=unused_port())
    with pytest.raises(TeacherUnreachable, match=r"check teacher\.base_url") as raised:
        send(url)
    assert url in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "reply",
    [
        lambda: web.Response(text="<html>hello</html>", content_type="text/html"),
        lambda: web.json_response(["m"]),
        lambda: web.json_response(None),
        lambda: web.Response(),
    ],
)
def test_a_list_of_models_in_a_shape_of_its_own_is_no_obstacle(reply: Callable[[], web.Response]) -> None:
    with served(FakeAPI(models_reply=reply)) as api:
        send(api.url)
    assert len(api.bodies) == 1


def test_base_url_comes_from_the_config_then_the_environment_then_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenAITeacherConfig(model="m").url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://env/v1")
    assert OpenAITeacherConfig(model="m").url == "http://env/v1"
    assert OpenAITeacherConfig(model="m", base_url="http://own/v1").url == "http://own/v1"


def test_a_missing_or_blank_key_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OpenAITeacherConfig(model="m", api_key_env="MY_KEY")
    with pytest.raises(ConfigError, match=r"MY_KEY is not set"):
        config.check()
    monkeypatch.setenv("MY_KEY", "  ")
    with pytest.raises(ConfigError, match=r"MY_KEY is not set"):
        config.check()
    monkeypatch.setenv("MY_KEY", "sk-1")
    config.check()
    assert api_key("MY_KEY") == "sk-1"
    assert api_key(None) is None


def test_an_address_without_a_scheme_is_refused_before_anything_is_sent() -> None:
    config = OpenAITeacherConfig(model="m", base_url="localhost:8000/v1", api_key_env=None)
    with pytest.raises(ConfigError, match="localhost:8000/v1"):
        config.check()


def test_a_secret_that_the_endpoint_sends_back_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_API_KEY", "sk-gateway-1")
    monkeypatch.setenv("SOME_API_KEY", "sk-own-1")

    def echo(body: dict[str, Any], request: web.Request) -> dict[str, Any]:
        return chat_reply(f"{request.headers['authorization']} {request.headers['x-gateway']}")

    headers = {"x-gateway": "$GATEWAY_API_KEY"}
    with served(FakeAPI(echo)) as api:
        reply = send(api.url, api_key_env="SOME_API_KEY", extra_headers=headers)
    assert reply["choices"][0]["message"]["content"] == "Bearer *** ***"


def test_a_header_of_an_unset_variable_is_a_mistake() -> None:
    config = OpenAITeacherConfig(model="m", api_key_env=None, extra_headers={"x-gateway": "$NOT_SET_API_KEY"})
    with pytest.raises(ConfigError, match="environment variable NOT_SET_API_KEY is not set"):
        config.check()
