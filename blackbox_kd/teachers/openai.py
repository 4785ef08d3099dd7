"""Provider `openai`: any OpenAI-compatible endpoint (OpenAI, DeepSeek, OpenRouter, Together, vLLM, llama.cpp, ...)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pydantic import Field, field_validator

from blackbox_kd.errors import ConfigError
from blackbox_kd.teachers.base import TeacherConfig, Transport, api_key, can_be_sent
from blackbox_kd.teachers.transport import open_fast

if TYPE_CHECKING:  # importing the SDK takes half a second
    from blackbox_kd.teachers.sdk import SdkTransport


SECRET_NAME = re.compile(r"(?i)authorization|cookie|secret|password|passwd|(^|[-_])(key|token)s?$|api[-_]?key")
"""Headers and options whose value is one."""
SECRET_PARAMETER = re.compile(r"(?i)key|token|secret|sig")
"""Parameters of a URL whose value is one."""
VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
"""`$NAME` or `${NAME}`."""
SHORTEST_SECRET = 8
"""Characters; `none` and `EMPTY` are what endpoints without keys are given."""


class OpenAITeacherConfig(TeacherConfig):
    """A hosted chat API."""

    provider: Literal["openai"] = "openai"
    base_url: str | None = None
    """Up to and including /v1; null: $OPENAI_BASE_URL, else OpenAI itself."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable with the key; null for an endpoint without one."""
    concurrency: int = Field(128, ge=1)
    """Most requests in flight at once; the limiter starts with a few and finds out how many are worth it."""
    extra_headers: dict[str, str] = {}
    """Sent with every request, never part of its key. `$NAME` in a value is that environment variable (for keys)."""
    transport: Literal["fast", "openai"] = "fast"
    """`openai`: through the OpenAI SDK, for endpoints that need one of its clients; it costs many times the CPU."""
    client: str = "AsyncOpenAI"
    """Of the SDK: AsyncAzureOpenAI, AsyncBedrockOpenAI, ..., or `module:Class`."""
    client_options: dict[str, Any] = {}
    """Of that client (azure_endpoint, api_version, aws_region, ...); `$NAME` as in extra_headers."""

    @field_validator("extra_headers", "client_options")
    @classmethod
    def _no_secrets(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The resolved config is saved, shown in the report and kept in the corpus."""
        for name, value in values.items():
            if SECRET_NAME.search(name) and "$" not in str(value) and len(str(value)) >= SHORTEST_SECRET:
                raise ValueError(f"keys are in no file: write {name}: $NAME, and set the environment variable NAME")
        return values

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"

    def listed_as(self) -> list[str]:
        """As `deepseek/deepseek-chat` by a part of the host's name, as `together_ai/...`, or by the bare name."""
        hosts = (urlsplit(self.url).hostname or "").split(".")
        return [f"{host}{suffix}/{self.model}" for host in hosts for suffix in ("", "_ai")] + [self.model]

    @property
    def address(self) -> str:
        """Its URL without user, password and query."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))

    def headers(self) -> dict[str, str]:
        """extra_headers with the environment's values in them.

        Raises:
            ConfigError: a variable that is not set, or a value that no header can hold.
        """
        return _expanded(self.extra_headers, "extra_headers")

    def check(self) -> None:
        """The key is there and the address is one."""
        api_key(self.api_key_env)
        self.headers()
        _expanded(self.client_options, "client_options")
        if self.transport != "fast":
            from blackbox_kd.teachers.sdk import client_class

            client_class(self.client)
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            whole = False
        if not whole:
            raise ConfigError(f"teacher.base_url must be http://HOST[:PORT]/... or https://, it is {self.address!r}")
        if parts.username or parts.password:
            raise ConfigError(
                "teacher.base_url holds a user or a password, and it is written to the run directory: "
                "send them as teacher.extra_headers {Authorization: $NAME} with the environment variable NAME"
            )
        if secret := next((name for name, _ in parse_qsl(parts.query, True) if SECRET_PARAMETER.search(name)), None):
            raise ConfigError(
                f"teacher.base_url holds a key in its parameter {secret!r}, and it is written to the run directory: "
                "send it as one of teacher.extra_headers {...: $NAME} with the environment variable NAME"
            )

    def connect(self) -> AbstractAsyncContextManager[Transport]:
        """The transport that the config names."""
        return {"fast": self._open_fast, "openai": self.open_sdk}[self.transport]()

    def _open_fast(self) -> AbstractAsyncContextManager[Transport]:
        headers = self.headers()
        return open_fast(
            self.url,
            api_key(self.api_key_env),
            headers,
            secrets=_secrets(self.extra_headers, headers),
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
        )

    def open_sdk(self) -> AbstractAsyncContextManager[SdkTransport]:
        """The SDK's client; without `api_key_env` one with options looks for a key where it always does."""
        from blackbox_kd.teachers.sdk import open_sdk

        key, headers = api_key(self.api_key_env), self.headers()
        options = _expanded(self.client_options, "client_options")
        credentials = {"api_key": key or "none"} if key or not options else {}
        address = {"base_url": self.base_url} if self.base_url else {}
        return open_sdk(
            self.client,
            {**credentials, **address, **options},
            headers=headers,
            secrets=[key, *_secrets(self.extra_headers, headers), *_secrets(self.client_options, options)],
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
        )


def _expanded(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Texts with the environment's values in them.

    Raises:
        ConfigError: a variable that is not set, or a value that no header can hold.
    """
    found = {}
    for name, value in values.items():
        where = f"teacher.{section}.{name}"
        found[name] = _filled(value, where) if isinstance(value, str) else value
        is_sent = section == "extra_headers" or SECRET_NAME.search(name)
        if is_sent and isinstance(value, str) and not can_be_sent(found[name]):
            raise ConfigError(f"{where}: its value holds a character that is not printable ASCII; copy it again")
    return found


def _filled(text: str, where: str) -> str:
    for variable in _variables(text):
        if not _value(variable):
            raise ConfigError(f"{where}: environment variable {variable} is not set")
    return VARIABLE.sub(lambda found: _value(found[1] or found[2]), text).strip()


def _secrets(written: Mapping[str, Any], expanded: Mapping[str, Any]) -> list[str]:
    """What the environment puts into the options, with what stands around it and bare, as an endpoint may repeat it."""
    named = {name: _variables(value) for name, value in written.items() if isinstance(value, str)}
    whole = [expanded[name] for name, variables in named.items() if variables]
    return whole + [_value(variable) for variables in named.values() for variable in variables]


def _variables(text: str) -> list[str]:
    return [found[1] or found[2] for found in VARIABLE.finditer(text)]


def _value(variable: str) -> str:
    """As people paste it, with a line end, is not as it is sent."""
    return os.environ.get(variable, "").strip()
