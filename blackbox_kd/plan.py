"""`plan`: what `sample`, `curate`, `onpolicy` and `evaluate` would ask and cost, and how long that takes.

    blackbox-kd plan --config quickstart

Spends nothing, asks nobody, needs no key and makes no file. What the corpus knows is not counted again. Prompt tokens
are estimated from the prompts' bytes, answers from those seen before (low) and from their maximum length (high).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec

from blackbox_kd.checkers import task_prompts
from blackbox_kd.command import config_of, guarded, parser
from blackbox_kd.corpus.history import history, probed
from blackbox_kd.project import sample_questions, settled
from blackbox_kd.prompts import PromptSet
from blackbox_kd.questions import Count, count, count_best_of_n, count_onpolicy, count_win_rate, mean_of
from blackbox_kd.settings import Config
from blackbox_kd.sql import show
from blackbox_kd.status import duration, money
from blackbox_kd.teachers.base import Capabilities, PriceConfig
from blackbox_kd.teachers.prices import price_of
from blackbox_kd.teachers.teacher import Questions
from blackbox_kd.types import Usage
from blackbox_kd.yardstick import FIXED_SPLITS, fixed_questions

BYTES_PER_TOKEN = 4.0
"""Where no call has been seen; of English text."""
GUESSED_SHARE = 0.25
"""Of the maximum length, for the low estimate where no answer has been seen."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage would ask; None: not known."""

    stage: str
    questions: int
    cached: int
    """Answered in the corpus."""
    dead: int
    """Given up in an earlier run; asked again only with teacher.retry_dead_letters."""
    to_ask: int
    prompt_tokens: int
    completion_tokens_low: int | None
    completion_tokens_high: int | None
    usd_low: float | None
    usd_high: float | None
    seconds: float | None


def estimate(name: str, found: Count, mean: float | None, rate_per_s: float | None, price: PriceConfig | None) -> Stage:
    """A stage's questions with what they cost; `mean`: completion tokens of such an answer so far."""
    high = found.longest
    low = mean * found.to_ask if mean is not None else None if high is None else GUESSED_SHARE * high
    if low is not None and high is not None:
        low = min(low, high)
    prompt_tokens = round(found.prompt_tokens)
    return Stage(
        stage=name,
        questions=found.questions,
        cached=found.cached,
        dead=found.dead,
        to_ask=found.to_ask,
        prompt_tokens=prompt_tokens,
        completion_tokens_low=None if low is None else round(low),
        completion_tokens_high=high,
        usd_low=dollars(price, prompt_tokens, low),
        usd_high=dollars(price, prompt_tokens, high),
        seconds=found.to_ask / rate_per_s if rate_per_s else None if found.to_ask else 0.0,
    )


def dollars(price: PriceConfig | None, prompt_tokens: int, completion_tokens: float | None) -> float | None:
    """None where the price or the length is not known."""
    if price is None or completion_tokens is None:
        return None
    return price.cost(Usage(prompt_tokens=prompt_tokens, completion_tokens=round(completion_tokens)))


def plan(config: Config) -> dict[str, Any]:
    """All stages, their sum, and what the estimates rest on."""
    prompts = PromptSet(config.prompts, task_prompts(config.evaluate.tasks))
    found = probed(config.corpus_path, config.teacher.model, config.teacher.address)
    can = msgspec.convert(found | config.teacher.capabilities, Capabilities)
    config, chosen = settled(config, prompts)
    teacher, path = Questions(config.teacher, config.sample), config.corpus_path
    price = price_of(config.teacher)
    seen = history(path, config.teacher.model)
    per_byte = seen.tokens_per_byte or 1 / BYTES_PER_TOKEN
    fixed = [prompt for split in FIXED_SPLITS for prompt in prompts[split]]
    sampled = sample_questions(teacher, prompts.stream("train", config.sample.max_prompts))
    pairs = fixed_questions(config.evaluate, teacher, fixed)
    counts = {
        "sample": count(sampled, path, config.teacher, per_byte),
        "onpolicy": count_onpolicy(config, prompts, can, teacher, seen, per_byte),
        "evaluate": count(chain.from_iterable(pairs), path, config.teacher, per_byte),
    }
    means = {**seen.completion_tokens, "onpolicy": mean_of(seen.completion_tokens)}
    terms = dict.fromkeys(counts, (seen.rate_per_s, price))
    if config.onpolicy.algorithm.needs_judge and config.judge:
        terms["onpolicy"] = None, price_of(config.judge)
    if config.curate.best_of_n != "off" and config.judge:
        counts["curate"] = count_best_of_n(config, config.judge, prompts, per_byte)
        means["curate"] = history(path, config.judge.model).completion_tokens.get("best_of_n")
        terms["curate"] = None, price_of(config.judge)
    if judge := config.evaluate.judge:
        counts["win_rate"] = count_win_rate(config, judge, fixed, per_byte)
        means["win_rate"] = history(path, judge.model).completion_tokens.get("win_rate")
        terms["win_rate"] = None, price_of(judge)
    if config.sample.batch:  # half the price, and as long as the provider likes
        terms["sample"] = None, price and price.in_batches()
    stages = [estimate(name, found, means.get(name), *terms[name]) for name, found in counts.items()]
    return {
        "stages": msgspec.to_builtins(stages),
        "total": total(stages),
        "tokens_per_byte": per_byte,
        "tokens_from": f"{seen.answers} answers of {config.teacher.model}" if seen.tokens_per_byte else "bytes / 4",
        "rate_per_s": seen.rate_per_s,
        "price": price.model_dump() if price else None,
        "algorithm": chosen or config.onpolicy.algorithm.name,
    }


def total(stages: Sequence[Stage]) -> dict[str, Any]:
    """The sum of each column; null where a part of it is not known."""
    found: dict[str, Any] = {"stage": "total"}
    for name in Stage.__struct_fields__[1:]:
        values = [getattr(stage, name) for stage in stages]
        found[name] = None if None in values else sum(values)
    return found


def print_plan(found: dict[str, Any]) -> None:
    """For a person."""
    columns = ["stage", "questions", "cached", "dead", "to ask", "prompt tokens", "completion tokens", "cost", "time"]
    show(columns, [cells(row) for row in [*found["stages"], found["total"]]])
    print(f"prompt tokens: {found['tokens_per_byte']:.3f} a byte, from {found['tokens_from']}")
    rate = (
        f"{found['rate_per_s']:.2f} answers a second, as of late" if found["rate_per_s"] else "no answer was timed yet"
    )
    print(f"time: {rate}")
    print(f"onpolicy.algorithm: {found['algorithm']}")
    if found["price"] is None:
        print("cost: no price is known; set teacher.price (dollars for a million tokens: input, output)")


def cells(row: dict[str, Any]) -> tuple[Any, ...]:
    """A line of the table: ranges as low - high."""
    tokens = f"{row['completion_tokens_low']} - {row['completion_tokens_high']}".replace("None", "unknown")
    cost = "unknown" if row["usd_low"] is None else f"{money(row['usd_low'])} - {money(row['usd_high'])}"
    counted = [row[name] for name in ("stage", "questions", "cached", "dead", "to_ask", "prompt_tokens")]
    return (*counted, tokens, cost, "unknown" if row["seconds"] is None else duration(row["seconds"]))


def main(argv: list[str] | None = None) -> int:
    """The command."""
    flags, rest = parser("plan", __doc__).parse_known_args(argv)

    def body() -> int:
        found = plan(config_of(flags, rest))
        if flags.json:
            print(json.dumps(found, ensure_ascii=False))
        else:
            print_plan(found)
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
