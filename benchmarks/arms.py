"""The clients that `collect.py` compares, each in a process of its own: `python benchmarks/arms.py '{"arm": ...}'`.

  engine   `Teacher.complete`, provider openai: journal, DuckDB, limiter, everything that `sample` has
  sdk      `AsyncOpenAI` behind a semaphore; it awaits the answers and stores nothing

Both send the same bodies. The clock and the CPU count (of all threads) run from the end of a warm-up, so that imports
and connections are not in them, to the last answer; for the engine, to the last row in DuckDB.
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import msgspec

from blackbox_kd.corpus import Corpus
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.teachers.wire import chat_body
from blackbox_kd.types import Message, Prompt, Request, SamplingParams


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a client does."""

    arm: Literal["engine", "sdk"]
    url: str
    count: int
    warmup: int = 0
    """Questions before the clock starts; for the engine they are past its slow start as well."""
    concurrency: int = 64
    tokens: int = 50
    top: int = 5


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What it took."""

    answers: int
    seconds: float
    cpu_s: float
    """User and system, all threads."""
    ended_at: float
    """time.monotonic(), which all processes of a machine share."""
    peak_mb: float
    per_s_steady: float
    """Answers a second after the first fifth of them: without the slow start, with the end and the storing."""

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU for one answer."""
        return self.cpu_s / self.answers * 1e3


class Meter:
    """Clock, CPU and arrivals since it was made."""

    def __init__(self) -> None:
        self._cpu, self._clock = time.process_time(), time.monotonic()
        self._arrivals: list[float] = []

    def tick(self) -> None:
        """An answer is there."""
        self._arrivals.append(time.monotonic())

    def read(self) -> Measured:
        """Everything is there."""
        ended, count = time.monotonic(), len(self._arrivals)
        first = count // 5
        return Measured(
            answers=count,
            seconds=ended - self._clock,
            cpu_s=time.process_time() - self._cpu,
            ended_at=ended,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            per_s_steady=(count - first) / (ended - self._arrivals[first]),
        )


def _messages(number: int) -> list[Message]:
    return [{"role": "user", "content": f"Question {number}: what is to be done, by whom, and until when?"}]


def _sampling(job: Job) -> SamplingParams:
    return SamplingParams(max_completion_length=job.tokens, top_logprobs=job.top)


def _config(job: Job) -> OpenAITeacherConfig:
    return OpenAITeacherConfig(model="fake", base_url=job.url, api_key_env=None, concurrency=job.concurrency)


async def engine(job: Job, folder: Path) -> Measured:
    """Our arm."""
    corpus = Corpus(folder / "corpus.duckdb")
    async with Teacher(_config(job), corpus, str(uuid.uuid4())) as teacher:

        def questions(first: int, count: int) -> Iterator[Request]:
            for number in range(first, first + count):
                prompt = Prompt(messages=_messages(number), split="train", source="benchmark")
                yield teacher.request(prompt, "sample", _sampling(job))

        if job.warmup:
            async for _ in teacher.complete(questions(0, job.warmup)):
                pass
        meter = Meter()
        async for _ in teacher.complete(questions(job.warmup, job.count)):
            meter.tick()
    measured = meter.read()
    stored = corpus.rows("SELECT count(*) FROM completions JOIN logprobs USING (completion_id)")[0][0]
    assert stored == job.warmup + job.count == job.warmup + measured.answers, f"{stored} answers are stored"
    return measured


async def sdk(job: Job) -> Measured:
    """The rival."""
    from openai import AsyncOpenAI

    slots = asyncio.Semaphore(job.concurrency)
    async with AsyncOpenAI(base_url=job.url, api_key="none", max_retries=0) as client:

        async def ask(number: int, meter: Meter) -> None:
            async with slots:
                await client.chat.completions.create(**chat_body(_config(job), _messages(number), _sampling(job), 0))
            meter.tick()

        unmeasured = Meter()
        await asyncio.gather(*(ask(number, unmeasured) for number in range(job.warmup)))
        meter = Meter()
        await asyncio.gather(*(ask(job.warmup + number, meter) for number in range(job.count)))
    return meter.read()


def measure(job: Job) -> Measured:
    """Run a job in a new process."""
    command = [sys.executable, __file__, msgspec.json.encode(job).decode()]
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return msgspec.json.decode(done.stdout, type=Measured)


def main(job: Job) -> Any:
    """The process."""
    if job.arm == "sdk":
        return asyncio.run(sdk(job))
    with TemporaryDirectory() as folder:
        return asyncio.run(engine(job, Path(folder)))


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(main(msgspec.json.decode(sys.argv[1], type=Job))))
