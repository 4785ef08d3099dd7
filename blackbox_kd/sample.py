"""Stage `sample`: ask the teacher for answers to the train prompts, and keep everything.

    blackbox-kd sample --config quickstart --max-usd 5

Reads   train prompts (prompts.path).    Writes   prompts, requests, attempts, completions, logprobs, vocab.
An answer that the corpus holds already is not asked for again, whichever run paid for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

from blackbox_kd.command import stage_main
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.types import Request

CHUNK = 2048
"""Prompts that are written to the corpus at once."""


async def run(project: Project) -> dict[str, Any]:
    """How many questions are answered, those before included; `finish_reason` counts the new answers."""
    config, engine = project.config.sample, project.teacher.engine
    wanted = project.prompts.count("train", config.max_prompts) * config.draws
    finished: dict[str, int] = {}
    if project.prompts.leaks:
        say(f"sample: {project.prompts.leaks}; sft will not train on them, see prompts.leaks")
    cached, ask = engine.cached, project.teacher.sampler(config)
    async for completion in ask(questions(project), total=wanted, known=False, description="sample"):
        finished[completion.finish_reason] = finished.get(completion.finish_reason, 0) + 1
    cached = engine.cached - cached
    shown = ", ".join(f"{count} {reason}" for reason, count in sorted(finished.items()))
    say(f"sample: {cached} of {wanted} questions were answered before, {sum(finished.values())} new answers ({shown})")
    return {
        "questions": wanted,
        "cached": cached,
        "answers": cached + sum(finished.values()),
        "finish_reason": finished,
        "missing_logprobs": engine.missing.count,
        "spend": project.corpus.spend(project.run_id),
    }


def questions(project: Project) -> Iterator[Request]:
    """All questions of the stage; their prompts are in the corpus before them."""
    stream = project.sampled_prompts
    while prompts := list(islice(stream, CHUNK)):
        project.corpus.add_prompts(prompts)
        yield from project.sample_requests(prompts)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("sample", __doc__, run, argv)


if __name__ == "__main__":
    sys.exit(main())
