"""`show`: questions with their answers, as a person would want to read them.

    blackbox-kd show 3fa2                   # an id that begins so: of a completion, a request or a prompt
    blackbox-kd show --last 3
    blackbox-kd show --prompt "action items"

Dead letters are shown with what the endpoint said. A student's text stands beside what was made of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from textwrap import indent
from typing import Any

from blackbox_kd.command import OneLineParser, guarded
from blackbox_kd.corpus.reading import Row, found
from blackbox_kd.errors import ConfigError
from blackbox_kd.progress import say
from blackbox_kd.sql import add_corpus_flag, corpus_of

MOST = 20
"""Questions that are shown for an id or a text."""


def question_lines(question: Row) -> Iterator[str]:
    """One question and everything that came of it."""
    private = f"private context {question['context_hash']}" if question["context_hash"] else "no private context"
    yield f"{question['purpose']} {question['request_key']}"
    asked = f"{question['created_at']:%Y-%m-%d %H:%M}"
    yield f"  asked {question['model']} at {asked}, draw {question['sample_idx']}, {private}"
    yield f"  prompt {question['prompt_id']} ({question['split'] or 'not in the corpus'})"
    for message in question["messages"]:
        yield from _text(message["role"], message["content"])
    if question["about"]:
        yield from _text("the student's draft", question["draft"] or f"{question['about']} (not in the corpus)")
    cost = "cost unknown" if question["cost_usd"] is None else f"${question['cost_usd']:.6f}"
    yield f"  {question['calls'] or 0} calls, {cost}"
    for answer in question["answers"]:
        yield from answer_lines(answer)
    if question["dead_error"]:
        yield f"  dead letter ({question['dead_status'] or 'no status'}): {question['dead_error']}"
    elif not question["answers"]:
        yield "  not answered yet"


def answer_lines(answer: Row) -> Iterator[str]:
    """One answer: who wrote it, its text, what was said of it, where the writer was least sure."""
    served = f" (served by {answer['served_model']})" if answer["served_model"] not in (None, answer["model"]) else ""
    wrote = f"{answer['author']} {answer['model']}{served}"
    policy = f", policy {answer['policy']}" if answer["policy"] else ""
    yield f"  answer {answer['completion_id']} by {wrote}{policy}, round {answer['round']}, {answer['finish_reason']}"
    yield (
        f"    {answer['prompt_tokens']} + {answer['completion_tokens']} tokens "
        f"({answer['cached_tokens']} cached, {answer['reasoning_tokens']} reasoning)"
    )
    if answer["reasoning"]:
        yield from _text("reasoning", answer["reasoning"])
    yield from _text("text", answer["text"])
    for said in answer["feedback"]:
        yield from feedback_lines(said)
    for scored in answer["logprobs"]:
        yield from logprob_lines(scored)


def feedback_lines(said: Row) -> Iterator[str]:
    """A score, or the better text."""
    value = "" if said["value"] is None else f" {said['value']:g}"
    detail = f" {json.dumps(said['detail'], ensure_ascii=False)}" if said["detail"] else ""
    yield f"    {said['kind']}{value} by {said['scorer']} in round {said['round']}{detail}"
    if said["target"] is not None:
        yield from _text("better", said["target"])


def logprob_lines(scored: Row) -> Iterator[str]:
    """The mean, and the tokens that were least sure with what was likelier there."""
    mean = "unknown" if scored["mean_logprob"] is None else f"{scored['mean_logprob']:.3f}"
    yield f"    logprobs by {scored['scorer']}: {scored['tokens']} tokens, mean {mean}, top {scored['k']}; least sure:"
    for token in scored["least_sure"]:
        logprob = "hidden" if token["logprob"] is None else f"{token['logprob']:.3f}"
        likelier = token["likeliest"] is not None and token["likeliest"] != token["token"]
        instead = f", likeliest {token['likeliest']!r} {token['likeliest_logprob']:.3f}" if likelier else ""
        yield f"      {token['position']:>4}  {token['token']!r} {logprob}{instead}"


def _text(name: str, text: Any) -> Iterator[str]:
    shown = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    yield f"    {name}:"
    yield indent(shown, "      | ", lambda _: True)


def wanted(flags: argparse.Namespace) -> tuple[str, str, int]:
    """How to look, for what, and how many to show.

    Raises:
        ConfigError: not exactly one of the three ways.
    """
    ways = [("id", flags.id, MOST), ("text", flags.prompt, MOST), ("last", flags.last, flags.last)]
    given = [(how, str(what).lower() if how == "id" else str(what), most) for how, what, most in ways if what]
    if len(given) != 1 or given[0][2] < 1:
        raise ConfigError("show needs one of: the beginning of an id, --last N (1 or more), --prompt TEXT")
    return given[0]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(
        prog="blackbox-kd show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("id", nargs="?", help="the beginning of a completion_id, request_key or prompt_id")
    parser.add_argument("--last", type=int, metavar="N", help="the questions that were answered or given up last")
    parser.add_argument("--prompt", metavar="TEXT", help="questions to prompts that contain this text")
    add_corpus_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a question")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        how, what, limit = wanted(flags)
        questions, total = found(corpus_of(flags.corpus), how, what, limit)
        if not questions:
            raise ConfigError(f"no question found by {how} {what!r}; `blackbox-kd status` counts what there is")
        for question in questions:
            if flags.json:
                print(json.dumps(question, ensure_ascii=False, default=str))
            else:
                print("\n".join(question_lines(question)), end="\n\n")
        if total > limit and how != "last":
            say(f"the latest {limit} of {total}; a longer id or text finds fewer")
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
