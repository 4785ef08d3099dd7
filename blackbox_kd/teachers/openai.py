"""Provider `openai`: any OpenAI-compatible endpoint (OpenAI, DeepSeek, OpenRouter, Together, vLLM, llama.cpp, ...)."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from blackbox_kd.errors import ConfigError
from blackbox_kd.teachers.base import TeacherConfig, Transport, api_key
from blackbox_kd.teachers.transport import open_fast


class OpenAITeacherConfig(TeacherConfig):
    """A hosted chat API."""

    provider: Literal["openai"] = "openai"
    base_url: str | None = None
    """Up to and including /v1; null: $OPENAI_BASE_URL, else OpenAI itself."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable with the key; null for an endpoint without one."""
    extra_headers: dict[str, str] = {}
    """Sent with every request, never part of its key. `$NAME` in a value is that environment variable (for keys)."""

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"

    @property
    def address(self) -> str:
        """Its URL without user, password and query."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))

    def headers(self) -> dict[str, str]:
        """extra_headers with the environment's values in them.

        Raises:
            ConfigError: a variable that is not set.
        """
        found = {name: os.path.expandvars(value) for name, value in self.extra_headers.items()}
        for name, value in found.items():
            if value.startswith("$"):
                raise ConfigError(f"teacher.extra_headers.{name}: environment variable {value[1:]} is not set")
        return found

    def check(self) -> None:
        """The key is there and the address is one."""
        api_key(self.api_key_env)
        self.headers()
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"teacher.base_url must start with http:// or https://, it is {self.url!r}")

    def connect(self) -> AbstractAsyncContextManager[Transport]:
        """The fast transport."""
        return open_fast(
            self.url,
            api_key(self.api_key_env),
            self.headers(),
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
        )
