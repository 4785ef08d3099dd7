"""A question that takes several calls, one after the other: what the first ones said is kept until the last is through.

Only the last reply makes an answer, and forced decoding makes a call for each token: after a kill in the middle all of
them would be paid for again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from blackbox_kd.corpus.writer import Writer
from blackbox_kd.errors import TeacherError
from blackbox_kd.hashing import content_id
from blackbox_kd.teachers.base import Call, Reply, Taken, Way
from blackbox_kd.teachers.caller import Caller
from blackbox_kd.teachers.wire import usage_of
from blackbox_kd.teachers.work import Work
from blackbox_kd.types import Completion, Request


class Several:
    """Asks in a way; replies are kept in a folder beside the corpus, a file a question."""

    def __init__(self, way: Way, caller: Caller, corpus: Path, address: str) -> None:
        """`address`: where the calls go; what another place said is not taken for this one's."""
        self._way, self._caller, self._address = way, caller, address
        self._folder = corpus.with_name(corpus.name + ".partial")

    async def ask(self, request: Request, work: Work, writer: Writer) -> list[Completion]:
        """Every call that was not answered before."""
        calls = await self._way.calls(request)
        kept = self._folder / f"{request.request_key}.jsonl"
        replies = self._replies(kept, calls[:-1])
        completions: list[Completion] = []

        def read(number: int, reply: Reply) -> Taken:
            replies[number:] = [reply]
            if number == len(calls) - 1:
                return self._whole(request, replies, kept)
            self._keep(kept, calls[number], reply)
            return Taken(usage=usage_of(reply.data))

        for number in range(len(replies), len(calls)):
            completions = await self._caller.call(request, work, writer, partial(read, number), call=calls[number])
        kept.unlink(missing_ok=True)
        return completions

    def _whole(self, request: Request, replies: list[Reply], kept: Path) -> Taken:
        try:
            return self._way.read(request, replies)
        except TeacherError:  # it may be any of them that is wrong: the next start asks for all anew
            kept.unlink(missing_ok=True)
            raise

    def _keep(self, path: Path, call: Call, reply: Reply) -> None:
        line = {"call": self._name(call), "reply": reply.data.decode("utf-8", "replace")}
        with suppress(OSError):  # it is paid for, and goes on; only a kill would have it paid for again
            self._folder.mkdir(exist_ok=True)
            with path.open("ab") as file:  # outlives a SIGKILL
                file.write(msgspec.json.encode(line) + b"\n")

    def _replies(self, path: Path, calls: Sequence[Call]) -> list[Reply]:
        """Those to the first of the calls, as far as they were made before; what does not belong to them is cut off."""
        found, size = list[Reply](), 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for call, line in zip(calls, lines, strict=False):
            try:
                said = msgspec.json.decode(line, type=dict[str, str])
            except msgspec.MsgspecError:  # torn
                break
            if not line.endswith(b"\n") or said["call"] != self._name(call):
                break
            found.append(Reply(said["reply"].encode()))
            size += len(line)
        if lines:
            os.truncate(path, size)
        return found

    def _name(self, call: Call) -> str:
        return content_id([self._address, call.endpoint, call.body])
