"""The OpenAI SDK: a transport for endpoints that need one of its clients (Azure, Bedrock), and the way to batches.

It takes many times the CPU of the fast transport, and returns the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai

from blackbox_kd.errors import ConfigError
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.failures import error_of
from blackbox_kd.teachers.transport import Mask, list_models, no_answer

T = TypeVar("T")

CONNECT_S = 30.0


class SdkTransport:
    """Raw POSTs through an SDK client: any key of a body passes, and the bytes come back as they are."""

    def __init__(self, client: openai.AsyncOpenAI, timeout_s: float, mask: Mask) -> None:
        self.client, self.mask = client, mask
        self._timeout_s = timeout_s

    async def send(self, body: dict[str, Any], path: str = "chat/completions") -> Reply:
        """See `base.Transport`."""
        url = str(self.client.base_url.join(path)) if path.startswith("/") else f"/{path}"
        response = await self.call(self.client.post(url, body=body, cast_to=httpx2.Response))
        data = self.mask(response.content)
        if response.status_code != 200:
            raise error_of(response.status_code, data, response.headers)
        return Reply(data, response.headers.get("x-request-id"), response.headers)

    async def call(self, asked: Awaitable[T]) -> T:
        """What a method of `client` returns, with our errors in the place of the SDK's."""
        with self._our_errors():
            async with asyncio.timeout(self._timeout_s):  # httpx counts from byte to byte
                return await asked

    async def download(self, file_id: str, path: Path) -> None:
        """A file of the provider's as a file of ours, however large; it is there whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        with self._our_errors():
            async with self.client.files.with_streaming_response.content(file_id) as response:
                await self._write_masked(response.iter_bytes(), partial)
        partial.replace(path)

    async def _write_masked(self, chunks: AsyncIterator[bytes], path: Path) -> None:
        """Line by line, so that no secret is cut in two."""
        rest = b""
        with path.open("wb") as file:
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                file.writelines(self.mask(line) + b"\n" for line in lines)
            file.write(self.mask(rest))

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            response = error.response
            # From nothing: the SDK's error holds what the endpoint said with all secrets in it.
            raise error_of(response.status_code, self.mask(response.content), response.headers) from None
        except (openai.APIConnectionError, httpx2.TransportError, TimeoutError) as error:
            raise no_answer(error.__cause__ or error) from error


def client_class(name: str) -> type[openai.AsyncOpenAI]:
    """A client by its name in the SDK, or by `module:Class`.

    Raises:
        ConfigError: there is none of this name.
    """
    module, _, attribute = name.rpartition(":")
    try:
        found = getattr(import_module(module or "openai"), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"teacher.client: no {name!r} ({error}); name a class of the openai package") from error
    if not (isinstance(found, type) and issubclass(found, openai.AsyncOpenAI)):
        raise ConfigError(f"teacher.client: {name!r} is no asynchronous client, such as AsyncAzureOpenAI")
    return found


@asynccontextmanager
async def open_sdk(
    client: str,
    options: Mapping[str, Any],
    *,
    headers: Mapping[str, str],
    secrets: list[str | None],
    concurrency: int,
    timeout_s: float,
) -> AsyncIterator[SdkTransport]:
    """The transport over a pool as wide as the work; `options` are the client's own.

    Proxy and CA variables of the environment are honoured. Retrying is the engine's.

    Raises:
        ConfigError: the client does not take these options.
        TeacherError: see `transport.list_models`.
    """
    kind = client_class(client)
    http = openai.DefaultAsyncHttpxClient(
        limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        timeout=httpx2.Timeout(timeout_s, connect=CONNECT_S),
    )
    async with http:
        try:
            made = kind(**{**options, "default_headers": headers, "max_retries": 0, "http_client": http})
        except (openai.OpenAIError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"teacher.client_options: {client} says: {said}") from error
        async with made:
            await list_models(made, str(made.base_url).rstrip("/"))
            yield SdkTransport(made, timeout_s, Mask([*secrets, made.api_key]))
