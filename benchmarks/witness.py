"""`python -m blackbox_kd ...` with a witness: a line for each answer at the moment that the transport hands it over.

    WITNESS=receipts.txt python benchmarks/witness.py sample --config X.yaml

The receipt (`serial monotonic-seconds`, one write) comes before the engine sees the answer, and so before the journal:
what was received is not known from the code that might lose it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from blackbox_kd.__main__ import main
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.transport import FastTransport

SERIAL = re.compile(rb'"answer (\d+) to ')


def witnessed(send: Callable[..., Awaitable[Reply]], fd: int) -> Callable[..., Awaitable[Reply]]:
    """`send`, noting what it returns."""

    async def send_and_note(*args: Any, **kwargs: Any) -> Reply:
        reply = await send(*args, **kwargs)
        if found := SERIAL.search(reply.data):
            os.write(fd, b"%s %.6f\n" % (found[1], time.monotonic()))
        return reply

    return send_and_note


if __name__ == "__main__":
    receipts = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    FastTransport.send = witnessed(FastTransport.send, receipts)  # type: ignore[method-assign,assignment]
    sys.exit(main(sys.argv[1:]))
