"""Fake OpenAI-compatible endpoints, each in a process of its own and too fast to be what a benchmark measures.

    python benchmarks/servers.py '{"tokens": 50, "top": 5, "latency_s": 0.4, "rate": 50}'

prints its port and ends when its standard input closes. POST .../chat/completions is answered with a text that names
the call (`answer 17 to QUESTION`), so that one can tell later which call an answer came from; GET /stats says what
was asked how often.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

POOL_BYTES = 8_000_000
"""Different replies are sent in turn, as many as fit in here (but at most 64)."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What kind of endpoint."""

    tokens: int = 0
    """Tokens with logprobs in each reply; 0: text only."""
    top: int = 0
    """Alternatives a token."""
    latency_s: float = 0.0
    rate: float | None = None
    """Requests a second (token bucket, as deep as one second); None: no limit. A rejected call costs nothing."""
    retry_after: bool = True
    """Whether a 429 says when to come back, in `retry-after` and `retry-after-ms`."""
    rate_headers: bool = False
    """Whether each reply carries `x-ratelimit-*-requests`, for a minute as OpenAI has them."""
    ledger: str | None = None
    """File that gets a line for each event, in one write."""


EventName = Literal["received", "answered", "dropped", "rejected"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the ledger. `answered` and `dropped` (the client was gone) are billed."""

    event: EventName
    serial: int
    """Number of the call at this server, from 1."""
    content: str
    """The last message."""
    generation: str
    """Header `x-generation`: which process of the client asked."""
    at: float
    """time.monotonic(), which all processes of a machine share."""


class TokenBucket:
    """`rate` a second, and so many at once after a pause of a second."""

    def __init__(self, rate: float) -> None:
        self.rate = self.tokens = rate
        self._filled = 0.0

    def take(self, now: float) -> float:
        """0 where a call is admitted, else the seconds until one would be."""
        self.tokens = min(self.rate, self.tokens + (now - self._filled) * self.rate)
        self._filled = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0


class Ledger:
    """Who asked what, and what became of it."""

    def __init__(self, path: str | None) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if path else None
        self._encoder = msgspec.json.Encoder()
        self.contents: dict[str, Counter[str]] = {}
        self.total: Counter[str] = Counter()
        self.first_received = 0.0
        self.in_flight = self.most_in_flight = 0

    def note(self, event: EventName, serial: int, content: str, generation: str) -> None:
        """Count it, and write it down in one write."""
        now = time.monotonic()
        self.total[event] += 1
        self.contents.setdefault(content, Counter())[event] += 1
        self.first_received = self.first_received or now
        self.in_flight += 1 if event == "received" else -1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self._fd is not None:
            line = Event(event=event, serial=serial, content=content, generation=generation, at=now)
            os.write(self._fd, self._encoder.encode(line) + b"\n")

    def stats(self) -> dict[str, Any]:
        """What GET /stats answers."""
        counts = {name: self.total[name] for name in ("received", "answered", "dropped", "rejected")}
        return {**counts, "first_received": self.first_received, "most_in_flight": self.most_in_flight,
                "contents": self.contents}  # fmt: skip


def read_ledger(path: Path) -> list[Event]:
    """All events so far; a line that is being written is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return msgspec.json.decode(b"[" + b",".join(lines) + b"]", type=list[Event])


class _Message(msgspec.Struct):
    content: str


class _Asked(msgspec.Struct):
    messages: list[_Message]


_asked = msgspec.json.Decoder(_Asked)


class Endpoint:
    """Answers, late or not at all."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.ledger = Ledger(options.ledger)
        self._bucket = TokenBucket(options.rate) if options.rate else None
        self._replies = _reply_pool(options)
        self._serial = 0

    def handle(self, connection: Connection, head: bytes, body: bytes) -> None:
        """One request."""
        method, path = head.split(b" ", 2)[:2]
        if method == b"GET":
            found = self.ledger.stats() if path == b"/stats" else {"object": "list", "data": []}
            connection.reply(200, msgspec.json.encode(found))
            return
        self._serial += 1
        call = (self._serial, _asked.decode(body).messages[-1].content, _header(head, b"x-generation"))
        self.ledger.note("received", *call)
        wait_s = self._bucket.take(time.monotonic()) if self._bucket else 0.0
        if wait_s:
            self.ledger.note("rejected", *call)
            connection.reply(429, b'{"error":{"message":"Rate limit reached","code":"rate_limit_exceeded"}}',
                             self._rate_headers() + self._retry_after(wait_s))  # fmt: skip
        elif self.options.latency_s:
            asyncio.get_running_loop().call_later(self.options.latency_s, self._answer, connection, call)
        else:
            self._answer(connection, call)

    def _answer(self, connection: Connection, call: tuple[int, str, str]) -> None:
        serial, content, _ = call
        before, after = self._replies[serial % len(self._replies)]
        text = msgspec.json.encode(f"answer {serial} to {content}")
        written = connection.reply(200, b"".join((before, text, after)), self._rate_headers())
        self.ledger.note("answered" if written else "dropped", *call)

    def _retry_after(self, wait_s: float) -> bytes:
        if not self.options.retry_after:
            return b""
        return f"retry-after: {math.ceil(wait_s)}\r\nretry-after-ms: {math.ceil(wait_s * 1000)}\r\n".encode()

    def _rate_headers(self) -> bytes:
        if not (self.options.rate_headers and self._bucket):
            return b""
        full_in_ms = (self._bucket.rate - self._bucket.tokens) / self._bucket.rate * 1000
        return (f"x-ratelimit-limit-requests: {self._bucket.rate * 60:.0f}\r\n"
                f"x-ratelimit-remaining-requests: {self._bucket.tokens:.0f}\r\n"
                f"x-ratelimit-reset-requests: {full_in_ms:.0f}ms\r\n").encode()  # fmt: skip


def _reply_pool(options: Options) -> list[tuple[bytes, bytes]]:
    from replies import Maker

    maker = Maker()
    pool = [maker.reply(options.tokens, options.top)]
    room = POOL_BYTES // (len(pool[0][1]) + 1)
    return pool + [maker.reply(options.tokens, options.top) for _ in range(min(64, room) - 1)]


def _header(head: bytes, name: bytes) -> str:
    found = re.search(rb"\r\n" + name + rb": *([^\r]*)", head, re.IGNORECASE)
    return found[1].decode() if found else ""


class Connection(asyncio.Protocol):
    """HTTP/1.1 with content-length, kept alive: all that the clients here speak."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand over each request that is whole."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end])
            whole = end + 4 + int(_header(head, b"content-length") or 0)
            if len(self._buffer) < whole:
                return
            body = bytes(self._buffer[end + 4 : whole])
            del self._buffer[:whole]
            self._endpoint.handle(self, head, body)

    def reply(self, status: int, body: bytes, headers: bytes = b"") -> bool:
        """Hand a reply to the socket; False where the client is gone."""
        if self._transport is None or self._transport.is_closing():
            return False
        head = b"HTTP/1.1 %d -\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (status, len(body))
        self._transport.write(b"".join((head, headers, b"\r\n", body)))
        return True


async def serve(options: Options) -> None:
    """Until standard input closes."""
    endpoint = Endpoint(options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(endpoint), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)


class Server:
    """A running endpoint, seen from outside."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def stats(self) -> dict[str, Any]:
        """See `Ledger.stats`."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.root}/stats", timeout=30) as reply:
            return dict(msgspec.json.decode(reply.read()))


@contextmanager
def server(options: Options) -> Iterator[Server]:
    """An endpoint in a process of its own."""
    command = [sys.executable, __file__, msgspec.json.encode(options).decode()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Server(int(process.stdout.readline()))
        finally:
            process.stdin.close()


if __name__ == "__main__":
    asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=Options)))
