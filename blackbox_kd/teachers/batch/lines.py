"""The JSONL of the Batch API: questions out, answers in. https://platform.openai.com/docs/api-reference/batch"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from blackbox_kd.corpus.journal import Answered
from blackbox_kd.errors import RequestRejected, TeacherError, TransientError
from blackbox_kd.hashing import content_id
from blackbox_kd.teachers.base import PriceConfig
from blackbox_kd.teachers.batch.ledger import Batch
from blackbox_kd.teachers.failures import GAVE_UP, UNREADABLE, error_of, kept
from blackbox_kd.teachers.wire import Decoder
from blackbox_kd.types import Attempt, Completion, Request, Usage, scorer

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def question_line(request: Request) -> bytes:
    """One line of the file that is uploaded."""
    line = {"custom_id": request.request_key, "method": "POST", "url": ENDPOINT, "body": request.body}
    return msgspec.json.encode(line) + b"\n"


class _Response(msgspec.Struct):
    status_code: int = 0
    request_id: str | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class Line(msgspec.Struct):
    """One line of an output or error file."""

    custom_id: str
    response: _Response | None = None
    error: _Error | None = None

    def reply(self) -> bytes:
        """The body of a 200.

        Raises:
            TeacherError: by status; TransientError where the question was never asked, as when its time is up.
        """
        if self.response is None:
            error = self.error or _Error(message="neither a response nor an error")
            raise TransientError(": ".join(part for part in (error.code, error.message) if part))
        if (status := self.response.status_code) != 200:
            raise error_of(status if status >= 400 else 500, bytes(self.response.body), {})
        return bytes(self.response.body)


_decoder = msgspec.json.Decoder(Line)


def read_lines(path: Path, mask: Callable[[bytes], bytes]) -> Iterator[Line | str]:
    """The lines of a downloaded file; for one that is none, what is wrong with it."""
    with path.open("rb") as file:
        for raw in file:
            if raw.strip():
                yield _line(mask(raw))


def _line(raw: bytes) -> Line | str:
    try:
        return _decoder.decode(raw)
    except UNREADABLE as error:
        return f"{raw[:80]!r} ({error})"


def answered(line: Line, request: Request, batch: Batch, price: PriceConfig | None, decoder: Decoder) -> Answered:
    """The journal's record of a line. Its ids follow from batch and question: read twice, it is stored once."""
    outcome: dict[str, Any] = {"status": None, "billed": False}
    completions: list[Completion] = []
    dead = False
    try:
        data = line.reply()
        outcome = {"status": 200, "billed": None}
        completions, usage = decoder.decode(data, request, "teacher", 0)
        outcome |= {"billed": True, "usage": usage, "cost_usd": _cost(usage, price)}
    except TeacherError as error:
        outcome |= {"status": error.status, "error": kept(error)}
        if error.status in GAVE_UP:
            outcome["billed"] = None
        dead = isinstance(error, RequestRejected)
    attempt = Attempt(
        attempt_id=content_id([batch.batch_id, request.request_key]),
        request_key=request.request_key,
        run_id=batch.run_id,
        attempted_at=batch.created_at,
        server_request_id=line.response.request_id if line.response else None,
        **outcome,
    )
    by = scorer(request.model, request.context_hash)
    return Answered(attempt=attempt, completions=completions, scorer=by, dead_letter=dead)


def _cost(usage: Usage, price: PriceConfig | None) -> float | None:
    """None where the price is not known, or the reply does not say how much was used."""
    return price.cost(usage) * price.batch_factor if price and usage != Usage() else None
