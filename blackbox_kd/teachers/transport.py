"""The hot path to any OpenAI-compatible endpoint: aiohttp, one POST per question, 5-15x less CPU than the SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import msgspec

from blackbox_kd.errors import TeacherRefused, TeacherUnreachable, TransientError
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.wire import error_of


class FastTransport:
    """POST {base_url}/{path}."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, secrets: Iterable[str] = ()) -> None:
        """`secrets` are masked in whatever the endpoint sends: some say which key they did not like."""
        self._session, self._secrets = session, [secret.encode() for secret in secrets if secret]
        self._base_url = base_url.rstrip("/")

    async def send(self, body: dict[str, Any], path: str = "chat/completions") -> Reply:
        """See `base.Transport`."""
        try:
            async with self._session.post(f"{self._base_url}/{path}", data=msgspec.json.encode(body)) as response:
                data = await response.read()
                for secret in self._secrets:
                    data = data.replace(secret, b"***")
                request_id = response.headers.get("x-request-id")
                headers = {name.lower(): value for name, value in response.headers.items()}
                if response.status != 200:
                    error = error_of(response.status, data, headers)
                    error.server_request_id = request_id
                    raise error
                return Reply(data, request_id, headers)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise TransientError(f"{type(error).__name__}: {error}".rstrip(": ")) from error


@asynccontextmanager
async def open_fast(
    base_url: str,
    key: str | None,
    headers: Mapping[str, str],
    *,
    concurrency: int,
    timeout_s: float,
    trust_env: bool = True,
) -> AsyncIterator[FastTransport]:
    """A transport over a pool as wide as the work.

    `trust_env` honours the proxy and CA variables of the environment.
    """
    await check_reachable(base_url, key, headers, trust_env=trust_env)
    sent = {"content-type": "application/json", **headers} | ({"authorization": f"Bearer {key}"} if key else {})
    async with aiohttp.ClientSession(
        headers=sent,
        connector=aiohttp.TCPConnector(limit=concurrency),
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=30),
        trust_env=trust_env,
    ) as session:
        yield FastTransport(session, base_url, [key or "", *headers.values()])


async def check_reachable(base_url: str, key: str | None, headers: Mapping[str, str], *, trust_env: bool) -> None:
    """Ask for the list of models, through the SDK, before anything is paid.

    Raises:
        TeacherRefused: the key is not accepted.
        TeacherUnreachable: nobody answers at this address.
    """
    import openai  # half a second, and only needed once there is something to ask

    async with (
        httpx.AsyncClient(timeout=30, trust_env=trust_env) as http,
        openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key or "none",
            default_headers=headers,
            max_retries=0,
            http_client=http,  # type: ignore[arg-type]  # typed for httpx2, takes httpx as well
        ) as client,
    ):
        try:
            await client.models.with_raw_response.list()  # raw: its shape does not matter
        except openai.AuthenticationError as error:
            raise TeacherRefused(f"{base_url} does not accept the key: HTTP {error.status_code}") from error
        except openai.APIStatusError:
            return  # no /models, a key that may ask but not list (403), or a busy endpoint: somebody answers
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise TeacherUnreachable(f"no teacher answers at {base_url} ({cause}); check teacher.base_url") from error
