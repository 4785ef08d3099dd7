"""The command line in processes that have imported everything: torch and what builds on it take most of a short one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

context = get_context("forkserver")
context.set_forkserver_preload(["blackbox_kd.trainee", "blackbox_kd.student.trainer", "blackbox_kd.evaluate"])


def start(*arguments: str, said: Path | None = None, environment: Mapping[str, str] = {}) -> BaseProcess:
    """`blackbox-kd ARGUMENTS` in a process of its own: stderr into a file, stdout nowhere."""
    process = context.Process(target=_run, args=(arguments, said or Path(os.devnull), dict(environment)))
    process.start()
    return process


def _run(arguments: tuple[str, ...], said: Path, environment: dict[str, str]) -> None:
    from blackbox_kd.__main__ import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    with said.open("a") as file, Path(os.devnull).open("w") as nowhere:
        os.dup2(file.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
        sys.exit(main(list(arguments)))
