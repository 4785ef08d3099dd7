"""Provider `local`: llama.cpp's own server over a GGUF file, started by the run and ended with it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import util
from pathlib import Path
from typing import Literal

from pydantic import Field

from blackbox_kd.config import find_file
from blackbox_kd.errors import ConfigError, TeacherUnreachable
from blackbox_kd.progress import say
from blackbox_kd.teachers.base import PriceConfig, TeacherConfig, Transport
from blackbox_kd.teachers.transport import open_fast

START_S = 120.0
"""How long a model may take to load."""
LONGEST_LINE = 1 << 24
"""Of the server's log, in bytes; a longer one would end its reading, and then the server."""


class LocalTeacherConfig(TeacherConfig):
    """An embedded teacher: nothing else in the code knows that it is local."""

    provider: Literal["local"] = "local"
    gguf: str
    """A .gguf file, or `package:file.gguf` for one that a Python package carries."""
    threads: int = Field(1, ge=1)
    """More than one spins, and starves whatever runs beside it."""
    context_length: int = Field(2048, ge=64)
    """Tokens for one request, prompt and answer."""
    concurrency: int = Field(4, ge=1)
    """Slots of the server."""
    price: PriceConfig | None = PriceConfig(input=0.0, output=0.0)

    def check(self) -> None:
        """The package and the file are there."""
        if util.find_spec("xllamacpp") is None:
            raise ConfigError("teacher.provider local needs the package xllamacpp: pip install 'blackbox-kd[local]'")
        self.file()

    @property
    def address(self) -> str:
        """The file: its server's port is another each time."""
        return self.gguf

    def file(self) -> Path:
        """The GGUF file."""
        return find_file(self.gguf, "teacher.gguf")

    def connect(self) -> AbstractAsyncContextManager[Transport]:
        """Start the server; it ends with the block."""
        return self._connect()

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[Transport]:
        async with (
            serve(self) as base_url,
            open_fast(
                base_url, None, {}, concurrency=self.concurrency, timeout_s=self.timeout_s, trust_env=False
            ) as transport,
        ):
            yield transport


def server_command(config: LocalTeacherConfig, port: int) -> list[str]:
    """The command line of the server process."""
    options = {"gguf": str(config.file()), "alias": config.model, "threads": config.threads,
               "slots": config.concurrency, "context_length": config.context_length, "port": port}  # fmt: skip
    return [sys.executable, "-m", "blackbox_kd.teachers.local_server", json.dumps(options)]


@asynccontextmanager
async def serve(config: LocalTeacherConfig, *, port: int = 0) -> AsyncIterator[str]:
    """A healthy server on a loopback port (0: a free one); yields its base URL.

    The server watches its standard input, which closes when this process ends, however it ends.

    Raises:
        TeacherUnreachable: it did not come up; with what it said.
    """
    say(f"starting the local teacher {config.model} ({config.file().name}, {config.threads} thread)")
    process = await asyncio.create_subprocess_exec(
        *server_command(config, port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=LONGEST_LINE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log = asyncio.create_task(_cause(process.stderr))
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        if not line:
            await process.wait()
            said = await log
            said = said or f"exit code {process.returncode}"
            raise TeacherUnreachable(f"the local teacher did not start ({config.file()}): {said}")
        yield f"{json.loads(line)['url']}/v1"
    except TimeoutError as error:
        raise TeacherUnreachable(f"the local teacher was not ready after {START_S:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        log.cancel()


async def _cause(stream: asyncio.StreamReader) -> str:
    """Drain a log; its first error (the later ones are consequences), else its last line."""
    last = error = ""
    async for raw in stream:
        line = raw.decode("utf-8", "replace").strip()
        last = line or last
        if not error and (match := re.match(r"[\d.]+ E\s+(.+)", line)):
            error = match[1]
    return error or last
