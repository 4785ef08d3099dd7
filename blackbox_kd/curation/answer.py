"""What is judged, and what is said of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from blackbox_kd.near import said
from blackbox_kd.types import Completion, Prompt

Reason = Literal[
    "truncated", "refusal", "degenerate", "pii", "eval_overlap", "length_outlier", "near_duplicate", "not_best_of_n"
]  # fmt: skip


class Answer(NamedTuple):
    """One of the teacher's answers to a question of `sample`."""

    prompt: Prompt
    completion: Completion
    tokens: int | None
    """Without reasoning; None where a reply of several choices does not say."""

    @property
    def completion_id(self) -> str:
        """In the corpus."""
        return self.completion.completion_id

    @property
    def text(self) -> str:
        """As it is trained on."""
        return self.completion.text.strip()

    @property
    def asked(self) -> str:
        """All that is said in the prompt."""
        return said(self.prompt)


class Verdict(NamedTuple):
    """What a rule says of an answer: a row of `curation`."""

    completion_id: str
    reason: Reason
    detail: str
    """What it rests on, for a person."""
    action: Literal["drop", "flag"]
