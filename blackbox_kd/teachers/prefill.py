"""Prefill: an endpoint goes on with an assistant's text that it is given, in one of several forms.

Some replies repeat the given text, others hold only what is new, some of these without the space that it begins with.
Logprobs cover the new tokens only, wherever they were seen; `probe` finds out both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from blackbox_kd.errors import AlignmentError
from blackbox_kd.teachers.base import Prefill, PrefillReply
from blackbox_kd.types import Message

Body: TypeAlias = dict[str, Any]

PREFILLS: Mapping[Prefill, tuple[Body, Body]] = {
    "assistant_last": ({}, {}),
    "continue_final_message": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
    "prefix": ({"prefix": True}, {}),
}
"""Form -> what it adds to the assistant's message at the end, and to the body; the plainest first."""


def turn(text: str, form: Prefill) -> tuple[Message, Body]:
    """The message that the answer begins with, and what the form adds to the body."""
    message, parameters = PREFILLS[form]
    return {"role": "assistant", "content": text, **message}, parameters


def prefilled(body: Body, text: str, form: Prefill) -> Body:
    """A chat body whose answer begins with `text`."""
    message, parameters = turn(text, form)
    return {**body, **parameters, "messages": [*body["messages"], message]}


def what_is_new(text: str, given: str, reply: PrefillReply) -> str:
    """What a reply adds to the text that it was given.

    Raises:
        AlignmentError: it is not of the kind that `probe` found: then the seam between the two is not known.
    """
    begins = text.startswith(given)
    if reply == "whole" and begins:
        return text[len(given) :]
    if reply == "new" and not (begins and len(given.split()) > 1):  # one word may well come twice
        return text
    raise AlignmentError(
        f"a prefilled reply {'begins' if begins else 'does not begin'} with the text that it was given "
        f"({text[:40]!r}), where replies are known as {reply!r}: run `probe` again, or set "
        "teacher.capabilities.prefill_reply"
    )
