"""A question that takes several calls, one after the other: what the first ones said is kept until the last is through.

Only the last reply makes an answer, and forced decoding makes a call for each token: after a kill in the middle all of
them would be paid for again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec

from blackbox_kd.corpus.writer import Writer
from blackbox_kd.teachers.base import Reply, Taken, Way
from blackbox_kd.teachers.caller import Caller
from blackbox_kd.teachers.wire import usage_of
from blackbox_kd.teachers.work import Work
from blackbox_kd.types import Completion, Request


class Several:
    """Asks in a way; replies are kept in a folder beside the corpus, a file a question."""

    def __init__(self, way: Way, caller: Caller, corpus: Path) -> None:
        self._way, self._caller = way, caller
        self._folder = corpus.with_name(corpus.name + ".partial")

    async def ask(self, request: Request, work: Work, writer: Writer) -> list[Completion]:
        """Every call that was not answered before."""
        calls = await self._way.calls(request)
        kept = self._folder / f"{request.request_key}.jsonl"
        replies = _read(kept)[: len(calls) - 1] if len(calls) > 1 else []
        completions: list[Completion] = []

        def read(number: int, reply: Reply) -> Taken:
            replies[number:] = [reply]
            if number == len(calls) - 1:
                return self._way.read(request, replies)
            self._keep(kept, reply)
            return Taken(usage=usage_of(reply.data))

        for number in range(len(replies), len(calls)):
            completions = await self._caller.call(request, work, writer, partial(read, number), call=calls[number])
        kept.unlink(missing_ok=True)
        return completions

    def _keep(self, path: Path, reply: Reply) -> None:
        self._folder.mkdir(exist_ok=True)
        with path.open("ab") as file:  # outlives a SIGKILL
            file.write(msgspec.json.encode(reply.data.decode("utf-8", "replace")) + b"\n")


def _read(path: Path) -> list[Reply]:
    """All whole lines; the last may be torn."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [Reply(msgspec.json.decode(line, type=str).encode()) for line in lines]
