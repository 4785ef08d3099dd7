"""`python -m blackbox_kd ...` with a witness: a note of each answer at the moment that the transport hands it over.

    WITNESS=folder python benchmarks/witness.py sample --config X.yaml

The receipt comes before the engine sees the answer, and so before the journal: what was received is not known from the
code that might lose it. It is written to shared memory over a file, which outlives a SIGKILL and, unlike a system
call, does not let another thread run between the answer's arrival and its journal record.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from blackbox_kd.__main__ import main
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.transport import FastTransport

SERIAL = re.compile(rb'"answer (\d+) to ')
RECEIPT = struct.Struct("<Qd")
"""Serial of the call, and time.monotonic()."""
MOST = 100_000
"""Receipts of one process."""


class Receipts:
    """This process's notes."""

    def __init__(self, folder: Path) -> None:
        with (folder / f"{os.getpid()}.{time.time_ns()}.receipts").open("w+b") as file:
            file.truncate(MOST * RECEIPT.size)
            self._memory = mmap.mmap(file.fileno(), 0)
        self._count = 0

    def note(self, reply: Reply) -> None:
        """An answer is there."""
        if found := SERIAL.search(reply.data):
            RECEIPT.pack_into(self._memory, self._count * RECEIPT.size, int(found[1]), time.monotonic())
            self._count += 1


def read_receipts(folder: Path) -> dict[int, float]:
    """serial -> when it was received, over all processes."""
    found = {serial: at for path in folder.glob("*.receipts") for serial, at in RECEIPT.iter_unpack(path.read_bytes())}
    found.pop(0, None)  # the room that is left
    return found


def witnessed(send: Callable[..., Awaitable[Reply]], receipts: Receipts) -> Callable[..., Awaitable[Reply]]:
    """`send`, noting what it returns."""

    async def send_and_note(*args: Any, **kwargs: Any) -> Reply:
        reply = await send(*args, **kwargs)
        receipts.note(reply)
        return reply

    return send_and_note


if __name__ == "__main__":
    FastTransport.send = witnessed(  # type: ignore[method-assign,assignment]
        FastTransport.send, Receipts(Path(os.environ["WITNESS"]))
    )
    sys.exit(main(sys.argv[1:]))
