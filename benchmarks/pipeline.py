"""What does `max_staleness: 1` save? The whole `onpolicy` stage, with a slow teacher and a slow student.

    python benchmarks/pipeline.py --json

The teacher is a server in its own process that takes 2 s for an answer: 4 s a round with 16 prompts and 8 in flight.
The student is a tiny model whose writing and update are each held up to 2 s, as a small GPU would need: balanced.

  share_of_max         of the rate that the slower of the two alone could reach, with `max_staleness` 1
  speedup_vs_serial    rounds a second with 1, over those with 0

Rates are taken from the end of the first round to the end of the last, so that filling the pipe does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from servers import Options, server

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tiny model of the tests
from blackbox_kd import onpolicy, sample, sft, trainee
from blackbox_kd.config import validate
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from tests.tiny import make_tiny

PROMPTS, IN_FLIGHT, LATENCY_S = 16, 8, 2.0
WRITE_S = UPDATE_S = 2.0


class SlowTrainee(trainee.Trainee):
    """Takes as long for writing and for an update as it is told; the rest is the real thing."""

    finished: list[float] = []

    def write(self, *args: Any) -> Any:
        """At least WRITE_S."""
        return held(WRITE_S, super().write, *args)

    def update(self, *args: Any) -> Any:
        """At least UPDATE_S; when it ended is noted."""
        found = held(UPDATE_S, super().update, *args)
        self.finished.append(time.monotonic())
        return found


def held(seconds: float, job: Callable[..., Any], *args: Any) -> Any:
    """`job(*args)`, in at least so many seconds."""
    ends = time.monotonic() + seconds
    found = job(*args)
    if (late := time.monotonic() - ends) > 0:
        say(f"{job.__name__} took {late:.2f} s longer than it is held up to: the machine is too slow for this setting")
    time.sleep(max(0.0, -late))
    return found


def rate(folder: Path, url: str, max_staleness: int, rounds: int) -> float:
    """Rounds a second of one whole stage."""
    config = validate(Config, settings(folder, url, max_staleness, rounds), "this benchmark")
    SlowTrainee.finished = []

    async def stages(project: Project) -> None:
        async with project.teacher:
            await sample.run(project)
            await sft.run(project)
            await onpolicy.run(project)

    with Project(config) as project:
        asyncio.run(stages(project))
    first, last = SlowTrainee.finished[0], SlowTrainee.finished[-1]
    return (rounds - 1) / (last - first)


def settings(folder: Path, url: str, max_staleness: int, rounds: int) -> dict[str, Any]:
    """A whole project on a tiny student."""
    data = folder / "train.jsonl"
    rows = ({"prompt": f"Say {i}", "split": "train"} for i in range(PROMPTS * (rounds + 1)))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run_dir": str(folder / f"staleness-{max_staleness}"),
        "prompts": {"path": str(data)},
        "teacher": {"provider": "openai", "model": "m", "base_url": url, "api_key_env": None, "concurrency": IN_FLIGHT},
        "sample": {"max_prompts": PROMPTS, "max_completion_length": 16, "top_logprobs": None},
        "student": {"model": str(folder / "tiny"), "device": "cpu", "max_length": 256, "lora": {"r": 4}},
        "sft": {"dev_fraction": 0, "trainer": {"max_steps": 1}},
        "onpolicy": {
            "algorithm": {"name": "relabel"},
            "rounds": rounds,
            "prompts_per_round": PROMPTS,
            "max_completion_length": 8,
            "max_staleness": max_staleness,
        },
        "evaluate": {"every_steps": None},
    }


def main() -> None:
    """Both settings, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    vars(onpolicy)["Trainee"] = SlowTrainee
    with tempfile.TemporaryDirectory() as name, server(Options(latency_s=LATENCY_S)) as endpoint:
        folder = Path(name)
        make_tiny(folder / "tiny")
        serial, pipelined = (rate(folder, endpoint.url, staleness, flags.rounds) for staleness in (0, 1))
    slower_s = max(PROMPTS / IN_FLIGHT * LATENCY_S, WRITE_S + UPDATE_S)
    found = {
        "share_of_max": pipelined * slower_s,
        "speedup_vs_serial": pipelined / serial,
        "rounds": flags.rounds,
        "seconds_a_round": {"teacher": PROMPTS / IN_FLIGHT * LATENCY_S, "student": WRITE_S + UPDATE_S,
                            "max_staleness 0": 1 / serial, "max_staleness 1": 1 / pipelined},
    }  # fmt: skip
    print(json.dumps(found, indent=2) if flags.json else f"share of the ideal rate {found['share_of_max']:.2f}, "
          f"{found['speedup_vs_serial']:.2f} times the rate of max_staleness 0")  # fmt: skip


if __name__ == "__main__":
    main()
