"""Fewer garbage collections while answers come in: they are many, and none of them is garbage in a cycle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLD = 100_000
"""Objects. Python's 700 took a tenth of the CPU time."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Inside the block."""
    young, *old = gc.get_threshold()
    gc.set_threshold(max(young, THRESHOLD), *old)
    try:
        yield
    finally:
        gc.set_threshold(young, *old)
