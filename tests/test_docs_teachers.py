"""What docs/teachers.md and docs/extending.md say of teachers: what each block sends, and a provider from outside."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from blackbox_kd.config import validate
from blackbox_kd.corpus import query
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.teacher import Questions
from blackbox_kd.types import Prompt
from tests.fakes import AnyPath, served
from tests.pages import PAGES, blocks, install, marked

SECTIONS = {
    block.heading: yaml.safe_load(block.text)["teacher"]
    for block in blocks("yaml", "docs/teachers.md")
    if block.text.startswith("teacher:")
}
COMMON = {"model", "messages", "temperature", "top_p", "logprobs", "top_logprobs", "seed"}


class Shape(NamedTuple):
    """What arrives at a provider."""

    name: str
    origin: str
    path: str
    auth: dict[str, str]
    """The header with the key."""
    more: dict[str, Any]
    """Of the body, beside COMMON."""


BEARER = {"authorization": "Bearer secret-1"}
SHAPES = [
    Shape("OpenAI", "https://api.openai.com", "/v1/chat/completions", BEARER, {"max_completion_tokens": 256}),
    Shape("DeepSeek", "https://api.deepseek.com", "/v1/chat/completions", BEARER, {"max_tokens": 256}),
    Shape(
        "OpenRouter", "https://openrouter.ai", "/api/v1/chat/completions", BEARER,
        {"max_tokens": 256, "provider": {
            "require_parameters": True, "data_collection": "deny", "enforce_distillable_text": True,
        }},
    ),
    Shape("vLLM", "http://127.0.0.1:8000", "/v1/chat/completions", {}, {"max_tokens": 256, "top_k": -1, "min_p": 0}),
    Shape(
        "Azure", "https://NAME.openai.azure.com",
        "/openai/deployments/my-deployment/chat/completions?api-version=2024-10-21",
        {"api-key": "secret-1"}, {"max_tokens": 256},
    ),
]  # fmt: skip


def test_every_provider_of_the_page_has_a_shape() -> None:
    assert list(SECTIONS) == [shape.name for shape in SHAPES]


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_what_a_block_sends(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    section = SECTIONS[shape.name]
    assert len(section) <= 6
    written = validate(OpenAITeacherConfig, section, "docs/teachers.md")
    assert (written.client_options.get("azure_endpoint") or written.url).startswith(shape.origin)
    if written.api_key_env:
        monkeypatch.setenv(written.api_key_env, "secret-1")
    with served(AnyPath()) as api:
        origin = api.url.removesuffix("/v1")
        monkeypatch.setenv("OPENAI_BASE_URL", written.url.replace(shape.origin, origin))
        moved = json.loads(json.dumps(section).replace(shape.origin, origin))
        teacher = validate(OpenAITeacherConfig, moved, "docs/teachers.md")
        teacher.check()
        asyncio.run(ask(teacher))
    assert api.paths == [shape.path]
    (headers,), (body,) = api.headers, api.bodies
    assert {name: headers.get(name) for name in shape.auth} == shape.auth
    assert shape.auth or "authorization" not in headers
    assert body["model"] == section["model"]
    assert {key: value for key, value in body.items() if key not in COMMON} == shape.more
    assert body.keys() >= COMMON


async def ask(teacher: OpenAITeacherConfig) -> None:
    prompt = Prompt(messages=[{"role": "user", "content": "Hi"}], split="train", source="test")
    async with teacher.connect() as transport:
        await transport.send(Questions(teacher).answer(prompt).body)


def test_a_reasoning_model_is_sent_no_sampling_parameters() -> None:
    line = re.search(r"add\n`(omit_params: .*?)` and `(reasoning_effort: \w+)`", PAGES["docs/teachers.md"])
    assert line
    section = SECTIONS["OpenAI"] | yaml.safe_load(line.group(1)) | yaml.safe_load(line.group(2))
    prompt = Prompt(messages=[{"role": "user", "content": "Hi"}], split="train", source="test")
    body = Questions(validate(OpenAITeacherConfig, section, "docs/teachers.md")).answer(prompt).body
    assert body.keys() == {"model", "messages", "max_completion_tokens", "reasoning_effort"}


def test_a_provider_from_outside_is_asked_as_any_other(project_file: Path, tmp_path: Path) -> None:
    (block,) = blocks("toml", "docs/extending.md")
    site = install(tmp_path / "site", "gateway", marked("gateway.py"), block.text)
    (chosen,) = blocks("yaml gateway", "docs/extending.md")
    teacher = json.dumps(yaml.safe_load(chosen.text)["teacher"])
    command = [sys.executable, "-m", "blackbox_kd", "sample", "--config", str(project_file), "--teacher", teacher]
    path = os.pathsep.join([str(site), str(Path(__file__).parent.parent)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = query(project_file.parent / "run" / "corpus.duckdb", "select distinct text from completions order by all")[1]
    assert rows[0] == ("Howdy Say train 0",)
    assert len(rows) == 6
