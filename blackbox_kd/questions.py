"""How many questions the stages have left to ask: looked up one by one, or estimated where texts are not there yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from blackbox_kd.best_of_n import SAMPLING
from blackbox_kd.corpus.history import History, judged, known
from blackbox_kd.hashing import canonical_json
from blackbox_kd.judging import conversation
from blackbox_kd.progress import counting
from blackbox_kd.project import most_graded, sample_questions, unanswered
from blackbox_kd.prompts import PromptSet, Template
from blackbox_kd.run_dir import committed, round_of
from blackbox_kd.settings import Config
from blackbox_kd.teachers.base import Capabilities, TeacherConfig
from blackbox_kd.teachers.teacher import Questions
from blackbox_kd.types import Prompt, Purpose, Request
from blackbox_kd.winrate import Pair, Pairwise, most_questions

Item = TypeVar("Item")

CHUNK = 2000
"""Requests that are held in memory and looked up at once."""
OTHER_STAGES: tuple[Purpose, ...] = ("sample", "best_of_n", "evaluate", "win_rate", "probe", "rollout")
"""Purposes that are not an algorithm's."""
SAMPLE_PROMPTS = 1000
"""Train prompts whose length stands for that of all on-policy questions."""


class Count(msgspec.Struct, kw_only=True):
    """The questions of one stage."""

    questions: int = 0
    cached: int = 0
    dead: int = 0
    to_ask: int = 0
    prompt_tokens: float = 0.0
    longest: int | None = 0
    """Completion tokens of everything that is asked, at most; None where nothing limits them."""


def count(requests: Iterable[Request], corpus: Path, config: TeacherConfig, tokens_per_byte: float) -> Count:
    """Look every request up, a chunk at a time."""
    found = Count()
    with counting("looking up", None) as progress:
        for chunk in chunks(requests):
            look_up(found, chunk, corpus, config, tokens_per_byte)
            progress.advance(len(chunk))
    return found


def look_up(found: Count, chunk: list[Request], corpus: Path, config: TeacherConfig, tokens_per_byte: float) -> None:
    """Add a chunk to what has been found."""
    answered, dead = known(corpus, [request.request_key for request in chunk])
    skipped = answered if config.retry_dead_letters else answered | dead
    asked = [request for request in chunk if request.request_key not in skipped]
    found.questions += len(chunk)
    found.cached += len(answered)
    found.dead += len(dead)
    found.to_ask += len(asked)
    found.prompt_tokens += tokens_per_byte * sum(map(size, asked))
    for request in asked:
        found.longest = added(found.longest, longest(request, config))


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of at most CHUNK."""
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def size(request: Request) -> int:
    """Bytes of its messages, as JSON."""
    return len(canonical_json(request.body["messages"]).encode())


def longest(request: Request, config: TeacherConfig) -> int | None:
    """The most completion tokens that it can cost; None where the body sets no limit."""
    limit = request.body.get(config.token_limit_param)
    return None if limit is None else int(limit) * int(request.body.get("n") or 1)


def added(one: float | None, other: float | None) -> Any:
    """Their sum; None where one of them is not known."""
    return None if one is None or other is None else one + other


def count_onpolicy(
    config: Config, prompts: PromptSet, can: Capabilities, teacher: Questions, seen: History, per_byte: float
) -> Count:
    """The questions of all rounds; they are about texts that the student has not written yet, so they are estimated."""
    loop = config.onpolicy
    train = prompts.count("train")
    if loop.algorithm.reply_tokens is None:  # a prompt is asked about once, and those of `sample` were
        asked = islice(prompts.stream("train"), train - unanswered(config, prompts), None)
        return count(sample_questions(teacher, asked), config.corpus_path, config.teacher, per_byte)
    rollouts = min(loop.prompts_per_round, train) * loop.algorithm.rollouts_per_prompt
    per_round = max(1, round(rollouts * loop.algorithm.calls_for(can, loop.max_completion_length)))
    done = min(loop.rounds, max(map(round_of, committed(config.run_dir)), default=0))
    to_ask = (loop.rounds - max(0, done)) * per_round
    prompt_tokens = mean_of(seen.prompt_tokens)
    if prompt_tokens is None:
        sampled = [size(teacher.request(p, "relabel", loop.sampling)) for p in prompts.stream("train", SAMPLE_PROMPTS)]
        prompt_tokens = per_byte * sum(sampled) / len(sampled) + loop.max_completion_length  # with a whole draft in it
    return estimated(loop.rounds * per_round, to_ask, prompt_tokens, loop.algorithm.reply_tokens)


def count_win_rate(config: Config, judge: TeacherConfig, fixed: Sequence[Prompt], per_byte: float) -> Count:
    """The questions to `evaluate.judge`, at most: a pair of equal answers is not asked about."""
    asked = Pairwise(config.evaluate, Questions(judge))
    sizes = [size(both[0]) for prompt in fixed if (both := asked.requests(Pair(prompt, "", "-")))]
    questions = most_questions(len(fixed), config.onpolicy.rounds + 2)
    cached = min(questions, judged(config.corpus_path, judge.model, "win_rate", [prompt.prompt_id for prompt in fixed]))
    per_prompt = per_byte * sum(sizes) / max(1, len(sizes)) + 2 * config.evaluate.max_completion_length
    return estimated(questions, questions - cached, per_prompt, config.evaluate.judge_max_completion_length)


def count_best_of_n(config: Config, judge: TeacherConfig, prompts: PromptSet, per_byte: float) -> Count:
    """The questions of `curate.best_of_n`, at most: a prompt whose answers are all the same is not asked about."""
    questions = most_graded(config, prompts)
    template = Template(config.curate.grades_template, "curate.grades_template")
    sampled = (prompt.prompt_id for prompt in prompts.stream("train", questions))
    cached = sum(judged(config.corpus_path, judge.model, "best_of_n", chunk) for chunk in chunks(sampled))
    texts = [
        template.render(prompt=conversation(prompt.messages), answers=[""] * config.sample.draws, references=[])
        for prompt in prompts.stream("train", min(questions, SAMPLE_PROMPTS))
    ]
    per_prompt = per_byte * sum(len(text.encode()) for text in texts) / max(1, len(texts))
    per_prompt += config.sample.draws * config.sample.max_completion_length
    return estimated(questions, questions - cached, per_prompt, SAMPLING.max_completion_length)


def estimated(questions: int, to_ask: int, prompt_tokens: float, reply_tokens: int) -> Count:
    """Of questions that cannot be looked up, by what one of them costs; those that are not asked were."""
    return Count(
        questions=questions,
        cached=questions - to_ask,
        to_ask=to_ask,
        prompt_tokens=to_ask * prompt_tokens,
        longest=to_ask * reply_tokens,
    )


def mean_of(by_purpose: dict[str, float]) -> float | None:
    """Over the purposes that only algorithms have; None where no such call has been seen."""
    found = [mean for purpose, mean in by_purpose.items() if purpose not in OTHER_STAGES]
    return sum(found) / len(found) if found else None
