"""Rollouts by a vLLM server: a fake on a real socket that draws with a real student. The real one: test_vllm.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from blackbox_kd.__main__ import main
from blackbox_kd.errors import AlignmentError, TeacherError, TeacherRefused
from blackbox_kd.rollout import Writer
from blackbox_kd.sections import VllmConfig
from blackbox_kd.student.student import Student
from blackbox_kd.types import Prompt
from tests.conftest import RUN_ID
from tests.fakes import FakeAPI, error_reply, served
from tests.test_rollout import student, writer

__all__ = ["student", "writer"]  # fixtures


class FakeVllm(FakeAPI):
    """Answers "Yes" with the student's own log-probs; `loads` is what it was told of adapters."""

    def __init__(self, student: Student) -> None:
        super().__init__(self.draw)
        self.student, self.loads = student, list[tuple[str, dict[str, Any]]]()
        self.refusal: tuple[int, str] | None = None
        self.changes: dict[str, Any] = {}
        """Of each choice."""

    def add_routes(self, router: web.UrlDispatcher) -> None:
        super().add_routes(router)
        for name in ("load_lora_adapter", "unload_lora_adapter"):
            router.add_post(f"/v1/{name}", self.told)

    async def told(self, request: web.Request) -> web.Response:
        self.loads.append((request.path.rpartition("/")[2], await request.json()))
        return error_reply(*self.refusal) if self.refusal else web.Response(text="Success")

    def draw(self, body: dict[str, Any], request: web.Request) -> dict[str, Any]:
        renderer, prompt = self.student.renderer, body["prompt"]
        ids = renderer.completion("Yes")
        logprobs = self.student.logprobs([renderer.join(prompt, ids)], batch_size=1)[0]
        choice = {"index": 0, "text": "Yes", "finish_reason": "stop", "token_ids": ids, "prompt_token_ids": prompt,
                  "logprobs": {"token_logprobs": logprobs}}  # fmt: skip
        return {"choices": [choice | self.changes], "usage": {"prompt_tokens": len(prompt), "completion_tokens": 2}}


@pytest.fixture
def vllm(student: Student) -> Iterator[FakeVllm]:
    api = FakeVllm(student)
    with served(api):
        yield api


@pytest.fixture
def remote(writer: Writer, vllm: FakeVllm, tmp_path: Path) -> Writer:
    return replace(writer, server=VllmConfig(base_url=vllm.url, model="base"), adapter=tmp_path)


def test_it_draws_under_the_adapter_from_the_students_tokens(
    remote: Writer, prompts: list[Prompt], vllm: FakeVllm, tmp_path: Path
) -> None:
    found = remote.rollouts(prompts, n=2)
    name = f"policy-{remote.student.policy}"
    assert vllm.loads == [
        ("load_lora_adapter", {"lora_name": name, "lora_path": str(tmp_path)}),
        ("unload_lora_adapter", {"lora_name": name}),
    ]
    assert len(vllm.bodies) == 2 * len(prompts) == len(found)
    assert sorted(body["prompt"] for body in vllm.bodies) == sorted(rollout.prompt_ids for rollout in found)
    assert {body["model"] for body in vllm.bodies} == {name}
    assert len({body["seed"] for body in vllm.bodies}) == len(found)  # a draw of its own for each
    assert all(body["stop_token_ids"] == [remote.student.renderer.end_id] for body in vllm.bodies)
    assert {rollout.completion.text for rollout in found} == {"Yes"}
    assert {(c.author, c.policy, c.round) for c in (r.completion for r in found)} == {
        ("student", remote.student.policy, 1)
    }
    scorers = remote.corpus.rows("SELECT DISTINCT scorer FROM logprobs")
    assert scorers == [(f"{remote.student.config.model}@{remote.student.policy}",)]


def test_what_it_drew_is_read_back(remote: Writer, prompts: list[Prompt], vllm: FakeVllm) -> None:
    first = remote.rollouts(prompts)
    asked, loads = len(vllm.bodies), len(vllm.loads)
    again = remote.rollouts(prompts)
    assert (len(vllm.bodies), len(vllm.loads)) == (asked, loads)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in first]


def test_without_an_adapter_the_base_draws(remote: Writer, prompts: list[Prompt], vllm: FakeVllm) -> None:
    replace(remote, adapter=None).rollouts(prompts)
    assert not vllm.loads
    assert {body["model"] for body in vllm.bodies} == {"base"}


def test_the_students_own_calls_cost_nothing(remote: Writer, prompts: list[Prompt]) -> None:
    remote.rollouts(prompts)
    assert remote.corpus.rows("SELECT count(*) FROM attempts WHERE billed") == [(len(prompts),)]
    assert remote.corpus.spend(RUN_ID)["calls"] == 0
    assert remote.corpus.billed(RUN_ID).calls == remote.corpus.billed(RUN_ID).tokens == 0
    assert remote.corpus.rows("FROM spend") == []


def test_another_adapter_on_the_server_is_found_out(remote: Writer, prompts: list[Prompt], vllm: FakeVllm) -> None:
    vllm.changes = {"logprobs": {"token_logprobs": [-0.1] * len(vllm.student.renderer.completion("Yes"))}}
    with pytest.raises(AlignmentError, match="another policy wrote them"):
        remote.rollouts(prompts)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"prompt_token_ids": [1, 2]}, AlignmentError, "other tokens than it was given"),
        ({"logprobs": {"token_logprobs": [-0.1]}}, AlignmentError, "1 log-probs for"),
        ({"logprobs": None}, AlignmentError, "0 log-probs for"),
        ({"token_ids": [], "logprobs": None}, AlignmentError, "0 log-probs for 0 drawn"),
        ({"token_ids": None}, TeacherRefused, r"onpolicy.vllm at http.*vLLM 0\.10\.2"),
    ],
)
def test_a_reply_that_does_not_fit_stops_the_run(
    remote: Writer, prompts: list[Prompt], vllm: FakeVllm, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    vllm.changes = changes
    with pytest.raises(error, match=match):
        remote.rollouts(prompts)


def test_a_server_that_does_not_load_adapters_is_one_line(
    remote: Writer, prompts: list[Prompt], vllm: FakeVllm
) -> None:
    vllm.refusal = 404, "Not Found"
    with pytest.raises(TeacherRefused, match="--enable-lora") as raised:
        remote.rollouts(prompts)
    assert "\n" not in str(raised.value)
    assert not vllm.bodies


def test_an_adapter_that_is_there_already_is_used(remote: Writer, prompts: list[Prompt], vllm: FakeVllm) -> None:
    vllm.refusal = 400, "The lora adapter 'x' has already been loaded."
    assert len(remote.rollouts(prompts)) == len(prompts)


def test_what_it_does_not_draw_is_missed(remote: Writer, prompts: list[Prompt], vllm: FakeVllm) -> None:
    long = remote.student.renderer.prompt(prompts[0].messages)
    vllm.handler = lambda body, r: error_reply(400, "too long") if body["prompt"] == long else vllm.draw(body, r)
    with pytest.raises(TeacherError, match=f"1 of {len(prompts)} rollouts were not written"):
        remote.rollouts(prompts)
    asked = len(vllm.bodies)
    vllm.handler = vllm.draw
    assert len(remote.rollouts(prompts)) == len(prompts)
    assert len(vllm.bodies) == asked + 1  # and nothing else is drawn again


def test_status_goes_on_showing_what_is_billed(remote: Writer, prompts: list[Prompt]) -> None:
    remote.rollouts(prompts)
    assert not list(remote.corpus.journal.glob("*.status.json"))


@pytest.mark.parametrize(
    ("server", "match"),
    [
        ({"base_url": "http://user:password@127.0.0.1/v1"}, r"onpolicy\.vllm\.base_url holds a user or a password"),
        ({"base_url": "127.0.0.1:8000"}, r"onpolicy\.vllm\.base_url must be http"),
        (
            {"base_url": "http://127.0.0.1/v1", "api_key_env": "NOT_SET"},
            r"onpolicy\.vllm\.api_key_env: .* NOT_SET is not set",
        ),
        ({"base_url": ""}, r"onpolicy\.vllm\.base_url"),
    ],
)
def test_a_server_that_cannot_be_reached_so_is_one_line_before_anything_is_paid(
    project_file: Path, capsys: pytest.CaptureFixture[str], server: dict[str, str], match: str
) -> None:
    given = json.dumps({"model": "base", **server})
    assert main(["sample", "--config", str(project_file), "--onpolicy.vllm", given]) == 2
    said = capsys.readouterr().err
    assert re.search(match, said)
    assert "password@" not in said
    assert len(said.strip().splitlines()) == 1
