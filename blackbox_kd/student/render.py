"""The one renderer: sft, onpolicy and evaluate all get their tokens here.

A chat template puts text before, between and after the turns; what the student must learn is the completion and
its end token, and nothing that the template adds behind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Any

import jinja2
import msgspec

from blackbox_kd.errors import AlignmentError
from blackbox_kd.types import Message

IGNORE = -100
"""Label of a token that is not trained (torch's and TRL's convention)."""

_PROBE = "Sentinel answer 42"

DAY = date(2024, 7, 26)
"""What a template gets that asks for today's date (Llama 3.2's own default): a prompt must be the same tomorrow, else a
run that goes on, and answers that are compared, are behind other tokens."""
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Rendered(msgspec.Struct, frozen=True):
    """`labels[t] == input_ids[t]` on the completion and its end token, IGNORE elsewhere; T each, not shifted."""

    input_ids: list[int]
    labels: list[int]


class Renderer:
    """Renders with a tokenizer's own chat template.

    Raises:
        AlignmentError: the template does not end an answer with one of the model's end tokens, or the prompt part
            of a rendered conversation is not the rendered prompt.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        if not tokenizer.chat_template:
            raise AlignmentError("the student's tokenizer has no chat template: use an instruction-tuned model")
        if isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = _TODAY.sub(lambda call: repr(DAY.strftime(call[2])), tokenizer.chat_template)
        self.tokenizer = tokenizer
        self.end_id = self._find_end(end_ids)

    def _find_end(self, end_ids: Sequence[int]) -> int:
        messages = [{"role": "user", "content": "Hello"}]
        before = self._text(messages, add_generation_prompt=True)
        whole = self._text([*messages, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
        head, found, tail = whole.partition(_PROBE)
        if not found or head != before:
            raise AlignmentError(
                f"the chat template renders an answer behind {head[-40:]!r}, but generation starts behind "
                f"{before[-40:]!r}: training and generation would see different prompts"
            )
        ids: list[int] = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        if not ids or ids[0] not in end_ids:
            raise AlignmentError(
                f"the chat template ends an answer with {tail[:20]!r}, which is none of the model's end tokens "
                f"{self.tokenizer.convert_ids_to_tokens(list(end_ids))}"
            )
        return ids[0]

    def _text(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except jinja2.TemplateError as error:  # a template may refuse roles, e.g. a system message
            raise AlignmentError(f"the student's chat template refuses {messages!r:.120}: {error}") from error

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids up to where the student starts to write."""
        text = self._text(messages, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def completion(self, text: str) -> list[int]:
        """Token ids of an answer and its end token."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def render(self, messages: list[Message], text: str) -> Rendered:
        """A prompt and its whole answer."""
        return self.join(self.prompt(messages), self.completion(text))

    @staticmethod
    def join(prompt_ids: list[int], completion_ids: list[int]) -> Rendered:
        """Tokens as they were drawn: nothing is tokenised again."""
        return Rendered([*prompt_ids, *completion_ids], [*[IGNORE] * len(prompt_ids), *completion_ids])

    def decode(self, completion_ids: list[int]) -> str:
        """The text of drawn tokens, without the end token."""
        ids = completion_ids[:-1] if completion_ids and completion_ids[-1] == self.end_id else completion_ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
