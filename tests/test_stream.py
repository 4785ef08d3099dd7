"""Work of any length starts at once and holds no more than a few thousand questions in memory."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from blackbox_kd.corpus import Corpus
from blackbox_kd.teachers.engine import CHUNK, Engine
from blackbox_kd.types import Request
from tests.conftest import RUN_ID
from tests.fakes import Answer, FakeAPI, served
from tests.records import answered, completion
from tests.test_engine import config, count, echo, question
from tests.test_sample import corpus_of, start, wait_for, write_config, write_prompts

MANY = 100_000


class Counted:
    """A stream of questions that knows how far it was read."""

    def __init__(self, total: int) -> None:
        self.total, self.read = total, 0

    def __iter__(self) -> Iterator[Request]:
        for number in range(self.total):
            self.read += 1
            yield question(number)


def alive() -> int:
    """Requests in memory."""
    gc.collect()
    return sum(type(thing) is Request for thing in gc.get_objects())  # isinstance wakes lazy modules


async def taken(engine: Engine, asked: Counted, number: int) -> int:
    """Take so many answers; the questions in memory at that time."""
    async with engine:
        answers = engine.complete(asked, total=asked.total, known=False)
        for _ in range(number):
            await anext(answers)
        return alive()


def test_the_first_call_leaves_after_the_first_chunk_and_no_more_than_a_few_are_held(corpus: Corpus) -> None:
    asked, read_by_then = Counted(MANY), list[int]()

    def note(body: dict[str, Any], _: web.Request) -> Answer:
        read_by_then.append(asked.read)
        return echo(body)

    before = alive()
    with served(FakeAPI(note)) as api:
        started = time.monotonic()
        held = asyncio.run(taken(Engine(config(api.url, concurrency=16), corpus, RUN_ID), asked, 300)) - before
        assert api.arrivals[0] - started < 10
    assert read_by_then[0] == CHUNK
    assert asked.read <= 2 * CHUNK
    assert CHUNK / 2 < held <= 2 * CHUNK
    assert count(corpus, "requests") <= 2 * CHUNK


def test_what_is_known_is_passed_over_chunk_by_chunk(corpus: Corpus) -> None:
    known = [question(number) for number in range(3 * CHUNK)]
    corpus.add_requests(known)
    corpus.try_ingest([answered(*(completion(request) for request in known))])
    del known
    asked, before = Counted(3 * CHUNK + 5), alive()
    with served(FakeAPI()) as api:
        engine = Engine(config(api.url), corpus, RUN_ID)
        held = asyncio.run(taken(engine, asked, 5)) - before
    assert sorted(api.asked) == [f"Say {3 * CHUNK + i}" for i in range(5)]
    assert (engine.asked, engine.cached) == (5, 3 * CHUNK)
    assert held < 2 * CHUNK


def resident_mb(pid: int) -> float:
    """The most that the process ever held, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process has")
def test_the_stage_needs_no_more_memory_for_many_prompts_than_for_few(tmp_path: Path) -> None:
    def most_mb(train: int) -> float:
        folder = tmp_path / str(train)
        write_prompts(folder / "prompts", train=2)
        row = {"meta": {"note": "x" * 500}}
        with (folder / "prompts" / "train.jsonl").open("w") as file:
            file.writelines(json.dumps({"prompt": f"train {i}", **row}) + "\n" for i in range(train))
        with served(FakeAPI()) as api:
            path = write_config(folder, api.url, teacher={"concurrency": 8})
            with start("sample", "--config", path) as process:
                wait_for(lambda: len(api.bodies) >= 400, process)
                found = resident_mb(process.pid)
                process.kill()
        assert count(corpus_of(folder), "requests") <= 2 * CHUNK
        return found

    few, many = most_mb(CHUNK), most_mb(MANY)
    assert many - few < 50  # the prompts alone are 55 MB on disk, several times as much as objects
