"""Stage `sample`: ask the teacher for answers to the train prompts, and keep everything.

    blackbox-kd sample --config quickstart

Reads   train prompts (prompts.path).    Writes   requests, attempts, completions, logprobs, vocab.
An answer that the corpus holds already is not asked for again, whichever run paid for it.
"""

from __future__ import annotations

import sys
from typing import Any

from blackbox_kd.progress import say
from blackbox_kd.project import Project, stage_main


async def run(project: Project) -> dict[str, Any]:
    """Counts by finish_reason."""
    wanted = project.sample_requests()
    finished: dict[str, int] = {}
    ask = project.teacher.sampler(project.config.sample)
    async for completion in ask(wanted, description="sample"):
        finished[completion.finish_reason] = finished.get(completion.finish_reason, 0) + 1
    shown = ", ".join(f"{count} {reason}" for reason, count in sorted(finished.items()))
    say(f"sample: {sum(finished.values())} answers to {len(wanted)} questions ({shown or 'none'})")
    return {
        "answers": sum(finished.values()),
        "finish_reason": finished,
        "spend": project.corpus.spend(project.run_id),
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("sample", __doc__, run, argv)


if __name__ == "__main__":
    sys.exit(main())
