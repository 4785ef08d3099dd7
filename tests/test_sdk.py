"""The SDK's transport beside the fast one, on a real socket: the same rows, the same failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import (
    ConfigError,
    RateLimited,
    RequestRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnreachable,
    TransientError,
)
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.engine import Engine
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.types import Request
from tests.conftest import RUN_ID
from tests.fakes import AnyPath, FakeAPI, chat_reply, cut_short, error_reply, reset, served, unused_port
from tests.records import prompt, request

BODY = {"model": "m", "messages": [{"role": "user", "content": "Grüß Gott 🌍"}], "temperature": 1.0}
BOTH = pytest.mark.parametrize("transport", ["fast", "openai"])


def config(url: str | None, **options: Any) -> OpenAITeacherConfig:
    given = {"model": "m", "base_url": url, "api_key_env": None, "transport": "openai", "max_retries": 2}
    return OpenAITeacherConfig(**given | options)


def send(url: str | None, body: dict[str, Any] = BODY, path: str = "chat/completions", **options: Any) -> Reply:
    async def once() -> Reply:
        async with config(url, **options).connect() as transport:
            return await transport.send(body, path)

    return asyncio.run(once())


# The same rows


def several(body: dict[str, Any], _: web.Request) -> Any:
    """Logprobs, a cut text, a refusal, two choices with cached and reasoning tokens, a dead letter."""
    replies = {
        "plain": chat_reply("Oui", logprobs=True, system_fingerprint="fp"),
        "cut": chat_reply("Ou", finish_reason="length"),
        "refused": chat_reply("") | {"choices": [{"message": {"content": None, "refusal": "Non."}, "index": 0}]},
        "two": chat_reply("A") | {
            "choices": [{"index": i, "message": {"content": t}, "finish_reason": "stop"} for i, t in enumerate("AB")],
            "usage": {"prompt_tokens": 9, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 4},
                      "completion_tokens_details": {"reasoning_tokens": 5}},
        },
    }  # fmt: skip
    return replies.get(body["messages"][-1]["content"]) or error_reply(400, "too long")


def rows(corpus: Corpus) -> list[list[tuple[Any, ...]]]:
    return [
        corpus.rows(
            "SELECT * EXCLUDE (run_id, created_at, token_ids, top_ids) FROM completions "
            "LEFT JOIN logprobs USING (completion_id) ORDER BY request_key, choice_idx"
        ),
        corpus.rows(
            "SELECT request_key, status, error, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, "
            "cost_usd, billed, server_request_id FROM attempts ORDER BY request_key"
        ),
        corpus.rows("SELECT request_key, status, error FROM dead_letters"),
        corpus.rows("SELECT model, text, bytes FROM vocab ORDER BY text"),
        corpus.rows("SELECT l.*  EXCLUDE (token_id) FROM token_logprobs l ORDER BY ALL"),
    ]


def test_both_transports_store_the_same_rows(tmp_path: Path) -> None:
    asked = [
        request(prompt(text), body={"logprobs": True, "min_p": 0.1, "vendor": {"x": None}})
        for text in ("plain", "cut", "refused", "two", "rejected")
    ]

    def collect(transport: str) -> Corpus:
        corpus = Corpus(tmp_path / f"{transport}.duckdb")
        teacher = config(api.url, transport=transport, price={"input": 1, "cached_input": 0.5, "output": 2})
        asyncio.run(ask_all(teacher, corpus, asked))
        return corpus

    with served(FakeAPI(several)) as api:
        fast, sdk = collect("fast"), collect("openai")
    assert rows(sdk) == rows(fast)
    assert [len(part) for part in rows(sdk)] == [5, 5, 1, 1, 1]
    sent = [sorted(bodies, key=str) for bodies in (api.bodies[:5], api.bodies[5:], [r.body for r in asked])]
    assert sent[0] == sent[1] == sent[2]


async def ask_all(teacher: OpenAITeacherConfig, corpus: Corpus, asked: list[Request]) -> list[str]:
    async with Engine(teacher, corpus, RUN_ID) as engine:
        return [answer.text async for answer in engine.complete(asked)]


# The same failures


async def stall(_: web.Request) -> Any:
    await asyncio.sleep(5)


@BOTH
@pytest.mark.parametrize(
    ("reply", "kind", "status"),
    [
        (lambda _: error_reply(400), RequestRejected, 400),
        (lambda _: error_reply(401), TeacherRefused, 401),
        (lambda _: error_reply(429, "quota", "insufficient_quota"), TeacherRefused, 429),
        (lambda _: error_reply(503), TransientError, 503),
        (lambda _: web.Response(status=500, text="Internal Server Error"), TransientError, 500),
        (lambda _: web.Response(status=204), RequestRejected, 204),
        (reset, TransientError, None),
        (cut_short, TransientError, None),
        (stall, TransientError, None),
    ],
)
def test_a_failure_is_an_error_of_its_kind(
    transport: str, reply: Callable[..., Any], kind: type[TeacherError], status: int
) -> None:
    with served(FakeAPI(lambda _, request: reply(request))) as api, pytest.raises(kind) as raised:
        send(api.url, transport=transport, timeout_s=0.5)
    assert raised.value.status == status
    assert str(raised.value)
    assert len(api.bodies) == 1  # the retries are the engine's


@BOTH
def test_a_429_keeps_its_headers(transport: str) -> None:
    headers = {"Retry-After-Ms": "250", "X-Request-Id": "req-1", "X-RateLimit-Remaining-Requests": "0"}
    limited = FakeAPI(lambda *_: error_reply(429, headers=headers))
    with served(limited) as api, pytest.raises(RateLimited) as raised:
        send(api.url, transport=transport)
    assert (raised.value.retry_after_s, raised.value.server_request_id) == (0.25, "req-1")
    assert raised.value.headers["x-ratelimit-remaining-requests"] == "0"


@BOTH
@pytest.mark.parametrize("fault", [reset, cut_short, lambda _: error_reply(500), lambda _: error_reply(429)])
def test_the_engine_gets_over_a_fault(transport: str, fault: Callable[..., Any], corpus: Corpus) -> None:
    faults = iter([fault])

    def handler(body: dict[str, Any], request: web.Request) -> Any:
        broken = next(faults, None)
        return broken(request) if broken else chat_reply("Oui")

    with served(FakeAPI(handler)) as api:
        assert asyncio.run(ask_all(config(api.url, transport=transport), corpus, [request()])) == ["Oui"]
    assert corpus.rows("SELECT count(*), count(*) FILTER (billed) FROM attempts") == [(2, 1)]


@BOTH
def test_headers_of_an_answer_come_back(transport: str) -> None:
    headers = {"X-Request-Id": "req-2", "X-RateLimit-Limit-Requests": "50"}
    with served(FakeAPI(lambda *_: web.json_response(chat_reply("Oui"), headers=headers))) as api:
        reply = send(api.url, transport=transport)
    assert json.loads(reply.data) == chat_reply("Oui")
    assert (reply.server_request_id, reply.headers["x-ratelimit-limit-requests"]) == ("req-2", "50")


@BOTH
def test_another_path_below_the_same_address(transport: str) -> None:
    with served(AnyPath()) as api:
        send(api.url, path="completions", transport=transport)
    assert api.paths == ["/v1/completions"]


# Keys and addresses


@BOTH
def test_a_secret_that_the_endpoint_sends_back_is_masked(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-own-1")
    monkeypatch.setenv("GATEWAY_API_KEY", "sk-gateway-1")

    def echo(body: dict[str, Any], request: web.Request) -> Any:
        said = f"{request.headers['authorization']} {request.headers['x-gateway']}"
        return chat_reply(said) if body["messages"][-1]["content"] == "ok" else error_reply(400, said)

    options = {"api_key_env": "SOME_API_KEY", "extra_headers": {"x-gateway": "$GATEWAY_API_KEY"}}
    ok = {**BODY, "messages": [{"role": "user", "content": "ok"}]}
    with served(FakeAPI(echo)) as api:
        assert b"Bearer *** ***" in send(api.url, ok, transport=transport, **options).data
        with pytest.raises(RequestRejected, match=r"Bearer \*\*\* \*\*\*"):
            send(api.url, transport=transport, **options)


def test_a_wrong_key_and_an_empty_address_are_one_line() -> None:
    with served(FakeAPI(key="sk-right")) as api, pytest.raises(TeacherRefused, match="does not accept the key"):
        send(api.url)
    url = f"http://127.0.0.1:{unused_port()}/v1"
    with pytest.raises(TeacherUnreachable, match=url):
        send(url)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(FakeAPI()) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        send("http://teacher.invalid/v1")
    assert (proxy.models_asked, len(proxy.bodies)) == (1, 1)
    assert proxy.headers[0]["host"] == "teacher.invalid"


def test_the_azure_client_asks_its_deployment_with_its_own_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_KEY", "az-1")
    with served(AnyPath()) as api:
        options = {"azure_endpoint": api.url.removesuffix("/v1"), "api_version": "2026-01-01"}
        send(None, api_key_env="AZURE_KEY", client="AsyncAzureOpenAI", client_options=options)
    assert api.paths == ["/openai/deployments/m/chat/completions?api-version=2026-01-01"]
    assert api.headers[0]["api-key"] == "az-1"


def test_a_token_of_the_environment_reaches_the_client_and_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_AD_TOKEN", "ad-secret-1")

    def echo(body: dict[str, Any], request: web.Request) -> Any:
        return chat_reply(request.headers["authorization"])

    with served(AnyPath(handler=echo)) as api:
        options = {"azure_endpoint": api.url[:-3], "api_version": "1", "azure_ad_token": "$AZURE_AD_TOKEN"}
        reply = send(None, client="AsyncAzureOpenAI", client_options=options)
    assert json.loads(reply.data)["choices"][0]["message"]["content"] == "Bearer ***"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"client": "AsyncOpenAPI"}, "AsyncOpenAPI"),
        ({"client": "no.such.module:Client"}, "no.such.module"),
        ({"client": "OpenAI"}, "no asynchronous client"),
        ({"client_options": {"organization": "$NOT_SET_ORG"}}, "teacher.client_options.organization"),
    ],
)
def test_what_the_config_gets_wrong_is_known_before_anything_is_sent(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config("http://127.0.0.1:1/v1", **options).check()


def test_options_that_the_client_does_not_take_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.client_options: AsyncOpenAI says: .*api_versoin"):
        send("http://127.0.0.1:1/v1", client_options={"api_key": "none", "api_versoin": "1"})
    with pytest.raises(ConfigError, match="AsyncAzureOpenAI says: Missing credentials"):
        send(None, client="AsyncAzureOpenAI", client_options={"api_version": "1"})
