"""Probe, scores and rollouts of a real vLLM, on the CPU and in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from msgspec.structs import replace

from blackbox_kd.__main__ import main
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, SamplingParams, TeacherTokens
from tests.conftest import GGUF, RUN_ID
from tests.fakes import unused_port
from tests.records import prompt
from tests.test_probe import project

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

START_S = 300.0
OPTIONS = "--host 127.0.0.1 --dtype float32 --max-model-len 2048 --max-num-seqs 8 --enforce-eager --max-logprobs 50000"
LORA = " --enable-lora --max-lora-rank 16"
"""Of a second server: with it, prompt_logprobs of more than one prompt at a time end vLLM 0.32 on the CPU."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}


@contextmanager
def started(options: str, log: Path) -> Iterator[str]:
    """Base URL of a server over SmolLM2."""
    from blackbox_kd.student.load import model_source

    port = unused_port()
    command = [os.environ["VLLM"], "serve", model_source(GGUF), "--served-model-name", "smollm2", "--port", str(port)]
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [*command, *options.split()],
            env=os.environ | ENVIRONMENT,
            stdout=said,
            stderr=said,
            start_new_session=True,  # it starts processes of its own
        ) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The teacher's."""
    with started(OPTIONS, tmp_path_factory.mktemp("vllm") / "log") as url:
        yield url


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")


def test_vllm_really_is_what_the_probe_says(vllm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project(tmp_path, {"provider": "openai", "model": "smollm2", "base_url": vllm, "api_key_env": None})
    assert main(["probe", "--config", path, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = shown["capabilities"]
    assert found.pop("determinism_nats") < 1e-2
    assert found == {
        "chat": True, "top_logprobs_max": 100, "has_bytes": True, "token_ids": False, "scoring": "prompt_logprobs",
        "prefill": "continue_final_message", "prefill_reply": "new", "n_max": 8, "seed_honoured": True,
        "temperature_honoured": True, "reasoning_hidden": False, "rate_headers": False,
    }, shown["details"]  # fmt: skip


def test_an_unknown_model_is_refused(vllm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project(tmp_path, {"provider": "openai", "model": "gpt-9", "base_url": vllm, "api_key_env": None})
    assert main(["probe", "--config", path]) == 3
    assert "gpt-9" in capsys.readouterr().err


def test_vllm_scores_an_answer_as_it_wrote_it(vllm: str, corpus: Corpus) -> None:
    """Drawn at temperature 1; then as if a student had written it. The end token is scored as well."""
    config = OpenAITeacherConfig(model="smollm2", base_url=vllm, api_key_env=None,
                                 capabilities={"scoring": "prompt_logprobs", "top_logprobs_max": 20})  # fmt: skip

    async def ask() -> tuple[Completion, TeacherTokens]:
        async with Teacher(config, corpus, RUN_ID) as teacher:
            request = teacher.request(
                prompt("Name a colour."), "sample", SamplingParams(max_completion_length=24, top_logprobs=5)
            )
            wrote = (await teacher.answers([request]))[request.request_key]
            copy = replace(wrote, author="student")
            return copy, (await teacher.score([(prompt("Name a colour."), copy)], top=5))[copy.completion_id]

    wrote, scored = asyncio.run(ask())
    tokens = wrote.logprobs or []
    vocab = corpus.vocab("smollm2")
    assert len(tokens) in (len(scored.token_ids), len(scored.token_ids) - 1)
    assert [t.token for t in tokens] == [vocab[i].text for i in scored.token_ids.tolist()][: len(tokens)]
    assert scored.token_logprobs[: len(tokens)] == pytest.approx([t.logprob for t in tokens], abs=5e-3)
    assert vocab[int(scored.token_ids[-1])].text == "<|im_end|>"
    assert scored.top_ids.shape == (len(scored.token_ids), 5)


def test_rounds_are_written_by_each_rounds_adapter_and_scored(vllm: str, tmp_path: Path) -> None:
    """The whole loop: one vLLM is the teacher, with a private prompt, another draws the student's rollouts."""
    questions = [f"Name {n} colours." for n in ("two", "three", "four", "five", "six", "seven")]
    for split, rows in (("train", questions), ("heldout", ["Name a tree."])):
        lines = [json.dumps({"prompt": row}) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "system.md.j2").write_text("Answer in capital letters, in three words.")
    teacher = {"provider": "openai", "base_url": vllm, "model": "smollm2", "api_key_env": None}
    config = {
        "run_dir": str(tmp_path / "run"),
        "prompts": {"path": str(tmp_path)},
        "teacher": {**teacher, "prompt": {"template": str(tmp_path / "system.md.j2")}},
        "sample": {"max_prompts": 3, "max_completion_length": 16},
        "student": {"model": GGUF, "device": "cpu", "max_length": 128, "lora": {"r": 8}},
        "sft": {"dev_fraction": 0, "trainer": {"max_steps": 4, "learning_rate": 1e-3}},
        "onpolicy": {
            "algorithm": {"name": "score", "loss": "kl"},
            "rounds": 2,
            "prompts_per_round": 3,
            "max_completion_length": 16,
            "vllm": {"base_url": "http://127.0.0.1:1/v1", "model": "smollm2"},
            "update": {"max_steps": 2, "learning_rate": 1e-3},
        },
        "evaluate": {"every_steps": None},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    for stage in ("probe", "sample", "sft"):
        assert main([stage, "--config", str(path)]) == 0
    with started(OPTIONS + LORA, tmp_path / "log") as url:
        assert main(["onpolicy", "--config", str(path), "--onpolicy.vllm.base_url", url]) == 0
    corpus = tmp_path / "run/corpus.duckdb"
    wrote = query(corpus, "SELECT round, count(*), count(DISTINCT policy) FROM rollouts GROUP BY ALL ORDER BY ALL")[1]
    assert wrote == [(1, 3, 1), (2, 3, 1)]
    assert query(corpus, "SELECT count(DISTINCT policy) FROM rollouts")[1] == [(2,)]
    by_vllm = "SELECT count(*) FROM attempts JOIN requests USING (request_key) WHERE purpose = 'rollout'"
    assert query(corpus, by_vllm)[1] == [(6,)]
    scored = "SELECT round, count(*) FROM feedback WHERE kind = 'score' GROUP BY ALL ORDER BY ALL"
    assert query(corpus, scored)[1] == [(1, 3), (2, 3)]
    apart = "SELECT max(value) FROM metrics WHERE name = 'rollout_logprob_gap'"
    assert query(corpus, apart)[1][0][0] < 5e-3
