"""Logprobs that are asked for and do not come: counted, said once, and a reason to stop where they are required."""

from __future__ import annotations

from collections.abc import Iterable

from blackbox_kd.errors import TeacherRefused
from blackbox_kd.progress import say
from blackbox_kd.types import Completion, Request

MISSING_TO_STOP = 3
"""Answers in a row without the logprobs that `teacher.require_logprobs` insists on."""


class MissingLogprobs:
    """One for all that an endpoint is asked."""

    def __init__(self, required: bool) -> None:
        self._required = required
        self.count = self._asked = self._in_a_row = self._longest = 0
        self._model = ""

    def note(self, request: Request, completions: Iterable[Completion], odd: str = "") -> None:
        """The answers to a request; `odd`: why logprobs that came could not be read."""
        if not request.body.get("logprobs"):
            return
        missing = any(c.text and not c.logprobs for c in completions)
        self._asked += 1
        self._model = request.model
        self.count += missing
        self._in_a_row = self._in_a_row + 1 if missing else 0
        self._longest = max(self._longest, self._in_a_row)
        if missing and self.count == 1:
            which = f"none that can be read ({odd})" if odd else "none"
            say(f"{request.model} was asked for logprobs and gave {which}; the text is kept, soft labels will lack")

    def check(self, *, at_end: bool = False) -> None:
        """Raises:
        TeacherRefused: they are required, and a few answers in a row (`at_end`: or all of them) came without.
        """
        if not self._required or not self.count:
            return
        if self._longest >= MISSING_TO_STOP or (at_end and self.count == self._asked):
            raise TeacherRefused(
                f"{self._model} gave no logprobs {self._longest} times in a row, and teacher.require_logprobs is set: "
                "ask another endpoint, or unset it to collect text"
            )
