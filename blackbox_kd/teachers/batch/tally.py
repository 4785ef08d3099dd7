"""What came of a stage's batches, counted and said."""

from __future__ import annotations

import openai.types

from blackbox_kd.corpus.journal import Answered
from blackbox_kd.errors import TeacherRefused, TeacherUnreachable
from blackbox_kd.progress import say
from blackbox_kd.teachers.batch.ledger import Batch
from blackbox_kd.teachers.budget import Amount
from blackbox_kd.teachers.failures import REPLY
from blackbox_kd.teachers.missing import MissingLogprobs
from blackbox_kd.types import Request

SHOWN = 3
"""Of a kind of surprise, in each batch."""


class Tally:
    """One for all batches that are waited for."""

    def __init__(self, missing: MissingLogprobs) -> None:
        self._missing = missing
        self.answered = self.rejected = self.pending = self.odd = 0
        self.done = 0
        """Answered or rejected at the provider, as of the last look."""
        self.states = ""
        """Of the batches, then."""
        self.spent = Amount()
        """On what is read."""
        self.last_failure = ""
        self.failed: list[str] = []

    def count(self, record: Answered, request: Request, odd: str) -> None:
        """One line; `odd`: see `MissingLogprobs.note`."""
        self.answered += bool(record.completions)
        self.rejected += record.dead_letter
        attempt = record.attempt
        self.last_failure = (attempt.error or self.last_failure).partition(REPLY)[0]
        used = attempt.usage.prompt_tokens + attempt.usage.completion_tokens
        self.spent += Amount(attempt.cost_usd or 0.0, used, int(attempt.billed is not False))
        if record.completions:
            self._missing.note(request, record.completions, odd)

    def surprise(self, batch: Batch, what: str) -> None:
        """A line that belongs to no question, or to one that has its answer; it is shown and left out."""
        self.odd += 1
        if self.odd <= SHOWN:
            say(f"batch {batch.batch_id}: left out {what}")

    def end(self, batch: Batch, state: openai.types.Batch, before: tuple[int, int]) -> None:
        """A batch is read; `before`: how many were answered and rejected then."""
        new, dead = self.answered - before[0], self.rejected - before[1]
        left = len(batch.keys) - new - dead
        self.pending += left
        line = f"batch {batch.batch_id}: {state.status}, {new} answers"
        line += f", {dead} dead letters" if dead else ""
        say(line + (f", {left} stay pending ({self.last_failure or 'no answer'}); run again" if left else ""))
        if state.status == "failed":
            found = (state.errors.data if state.errors else None) or []
            said = "; ".join(filter(None, (error.message or error.code for error in found[:SHOWN])))
            self.failed.append(f"batch {batch.batch_id} failed: {said or 'the provider does not say why'}")

    def conclude(self) -> None:
        """The end of the stage.

        Raises:
            TeacherRefused: a batch as a whole or every question was not accepted, or required logprobs did not come.
            TeacherUnreachable: there are questions, and not one answer.
        """
        if self.odd > SHOWN:
            say(f"{self.odd} lines in all were left out")
        if self.failed:
            raise TeacherRefused(f"{self.failed[0]}; its questions stay pending")
        if not self.answered and self.pending:
            raise TeacherUnreachable(
                f"none of {self.pending + self.rejected} questions was answered: {self.last_failure}"
            )
        if not self.answered and self.rejected:
            raise TeacherRefused(f"all {self.rejected} requests were rejected, the last with: {self.last_failure}")
        self._missing.check(at_end=True)
