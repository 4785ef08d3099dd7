"""What every command has in common: flags, errors in one line, exit codes, Ctrl-C; and how a stage is run."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, NoReturn

from blackbox_kd.config import (
    load_config,
    walk,
)
from blackbox_kd.errors import BlackboxKDError, ConfigError
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.settings import Config

INTERRUPTED = 130

CAPS = {"usd": "DOLLARS", "tokens": "N", "requests": "N"}
"""Keys of `budget` that have a short flag."""

Stage = Callable[[Project], Coroutine[Any, Any, dict[str, Any]]]
"""An async function of an open project; what it returns is printed by `--json`."""

Show = Callable[[Project, dict[str, Any]], None]
"""Prints a stage's result for a person."""


class OneLineParser(argparse.ArgumentParser):
    """A mistake is one line, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        """Say it and end with exit code 2."""
        say(f"error: {message} (see {self.prog} --help)")
        raise SystemExit(2)


def parser(command: str, doc: str) -> argparse.ArgumentParser:
    """Flags that every command has; the config's own keys are read as dotted overrides."""
    made = OneLineParser(
        prog=f"blackbox-kd {command}",
        description=doc.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any key of the config is a flag:\n\n"
        + "\n".join(f"  --{key}\n        {text}" for key, text in walk(Config)),
    )
    made.add_argument("--config", required=True, help="a shipped config (quickstart) or a YAML file")
    for cap, unit in CAPS.items():
        made.add_argument(
            f"--max-{cap}", metavar=unit, help=f"never bill this run more, over all its starts (budget.max_{cap})"
        )
    made.add_argument("--json", action="store_true", help="print the final summary as one JSON object on stdout")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def config_of(flags: argparse.Namespace, rest: Sequence[str]) -> Config:
    """What `--config` and the other flags say."""
    caps = [(f"budget.max_{cap}", value) for cap in CAPS if (value := getattr(flags, f"max_{cap}")) is not None]
    return load_config(Config, flags.config, [*overrides(rest), *caps])


def overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` as pairs.

    Raises:
        ConfigError: something that is no flag, or a flag without a value.
    """
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"what is {flag!r}? flags are --section.key value")
        key, equals, value = flag.removeprefix("--").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value (and known flags without one are --json and --debug)")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def guarded(body: Callable[[], int], *, debug: bool) -> int:
    """Run a command: our own errors are one line and an exit code."""
    try:
        return body()
    except BlackboxKDError as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted; what was received is kept, the same command goes on from here")
        return INTERRUPTED


Verdict = Callable[[dict[str, Any]], None]
"""Raises where a stage's result must not be used; it is printed by then."""

Follow = Callable[[Config], None]
"""The part of a stage in every process of a launcher but the first."""


def stage_main(
    command: str,
    doc: str,
    stage: Stage,
    argv: Sequence[str] | None = None,
    *,
    show: Show | None = None,
    verdict: Verdict | None = None,
    follow: Follow | None = None,
) -> int:
    """Parse, open the project, run one stage, print its result (as JSON, or by `show`); returns the exit code.

    Of several processes the first alone opens the project; a stage that has nothing to `follow` runs in one.
    """
    flags, rest = parser(command, doc).parse_known_args(argv)

    def body() -> int:
        rank = launched(command, follow)
        config = config_of(flags, rest)
        if rank and follow:
            follow(config)
            return 0
        with Project(config) as project:
            result = asyncio.run(_closing(stage, project))
            if flags.json:
                print(json.dumps(result, ensure_ascii=False))
            elif show is not None:
                show(project, result)
        if verdict is not None:
            verdict(result)
        return 0

    return guarded(body, debug=flags.debug)


def launched(command: str, follow: Follow | None) -> int:
    """The rank of this process among those that `accelerate launch` or `torchrun` started.

    Raises:
        ConfigError: there are several, and the stage runs in one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and follow is None:
        raise ConfigError(f"{command} runs in one process: start it without `accelerate launch`")
    return int(os.environ.get("RANK", 0))


async def _closing(stage: Stage, project: Project) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None

    def interrupted(*_: object) -> None:
        """Answers in flight are waited for; training stops where it is, its checkpoints are on disk."""
        if any(endpoint.engine.busy for endpoint in project.endpoints):
            task.get_loop().call_soon_threadsafe(task.cancel)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        async with AsyncExitStack() as stack:
            for endpoint in project.endpoints:
                await stack.enter_async_context(endpoint)
            return await stage(project)
    finally:
        signal.signal(signal.SIGINT, before)
