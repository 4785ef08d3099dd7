"""A scripted Batch API on a real loopback socket: files, batches, and how each of them ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.fakes import FakeAPI, chat_reply, error_reply

Line = dict[str, Any]


def answer(question: Line, status: int = 200, body: dict[str, Any] | None = None) -> Line:
    """A line of an output or error file."""
    if body is None:
        body = chat_reply(
            f"echo {question['body']['messages'][-1]['content']}", logprobs=question["body"].get("logprobs")
        )
    response = {"status_code": status, "request_id": f"req-{question['custom_id'][:4]}", "body": body}
    return {"id": "batch_req_1", "custom_id": question["custom_id"], "response": response, "error": None}


def rejection(question: Line, status: int, message: str) -> Line:
    return answer(question, status, {"error": {"message": message, "code": None}})


def expiry(question: Line) -> Line:
    error = {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    }
    return {"id": "batch_req_1", "custom_id": question["custom_id"], "response": None, "error": error}


Ending = tuple[str, list[Line] | None, list[Line] | None]
"""Status, lines of the output file, lines of the error file (None: there is no such file)."""


def completed(questions: list[Line]) -> Ending:
    return "completed", [answer(question) for question in questions], None


class FakeBatchAPI(FakeAPI):
    """A batch ends once it has been looked at `looks` times, as `ending(questions)` says."""

    def __init__(self, ending: Callable[[list[Line]], Ending] = completed, *, looks: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.ending, self.looks = ending, looks
        self.files: dict[str, bytes] = {}
        self.names: list[str] = []
        self.batches: dict[str, dict[str, Any]] = {}
        self.looked = 0
        self.lose: set[str] = set()
        """Steps that hang once: `create` before the batch is made, `created` after it."""
        self.fail: list[web.Response] = []
        """What looks are answered first."""
        self.errors: list[dict[str, Any]] = []
        """Why a batch has failed."""

    @property
    def questions(self) -> list[list[Line]]:
        """What each batch asks."""
        return [self._lines(batch["input_file_id"]) for batch in self.batches.values()]

    @property
    def uploads(self) -> int:
        return len(self.names)

    def _lines(self, file_id: str) -> list[Line]:
        return [json.loads(line) for line in self.files[file_id].splitlines()]

    def add_routes(self, router: web.UrlDispatcher) -> None:
        super().add_routes(router)
        router.add_post("/v1/files", self.upload)
        router.add_get("/v1/files/{id}/content", self.content)
        router.add_post("/v1/batches", self.create)
        router.add_get("/v1/batches", self.list)
        router.add_get("/v1/batches/{id}", self.look)

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file = form["file"]
        assert isinstance(file, web.FileField)
        assert form["purpose"] == "batch"
        self.names.append(file.filename)
        return web.json_response({"id": self._file(file.file.read()), "object": "file", "purpose": "batch"})

    def _file(self, data: bytes) -> str:
        self.files[f"file-{len(self.files)}"] = data
        return f"file-{len(self.files) - 1}"

    async def content(self, request: web.Request) -> web.Response:
        data = self.files.get(request.match_info["id"])
        return error_reply(404, "no such file") if data is None else web.Response(body=data)

    async def create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        await self._hang("create")
        batch = {
            "id": f"batch_{len(self.batches)}",
            "object": "batch",
            "status": "in_progress",
            "created_at": int(time.time()),
            "request_counts": {"total": len(self._lines(asked["input_file_id"])), "completed": 0, "failed": 0},
            **asked,
        }
        self.batches[batch["id"]] = batch
        await self._hang("created")
        return web.json_response(batch)

    async def _hang(self, step: str) -> None:
        if step in self.lose:
            self.lose.remove(step)
            await asyncio.sleep(60)

    async def list(self, request: web.Request) -> web.Response:
        newest = list(reversed(self.batches.values()))
        return web.json_response({"object": "list", "data": newest, "has_more": False})

    async def look(self, request: web.Request) -> web.Response:
        self.looked += 1
        if self.fail:
            return self.fail.pop(0)
        batch = self.batches.get(request.match_info["id"])
        if batch is None:
            return error_reply(404, "no such batch")
        if self.looked >= self.looks and batch["status"] == "in_progress":
            self._end(batch)
        return web.json_response(batch)

    def _end(self, batch: dict[str, Any]) -> None:
        status, output, errors = self.ending(self._lines(batch["input_file_id"]))
        counts = {"completed": len(output or []), "failed": len(errors or []), "total": 0}
        batch |= {"status": status, "request_counts": counts, "errors": {"object": "list", "data": self.errors}}
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            written = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines or [])
            batch[name] = None if lines is None else self._file(written.encode())
