"""Provider `scripted`: the real engine behind a teacher that never leaves the process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import ConfigError, TransientError
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig, ScriptedTransport
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.teachers.wire import Decoder
from blackbox_kd.types import Completion, Prompt, Request, SamplingParams
from tests.conftest import RUN_ID

ASKED = {
    "model": "s",
    "messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Say one two"}],
}


def answer(body: dict[str, Any], **options: Any) -> Completion:
    async def once() -> Reply:
        async with ScriptedTeacherConfig(**options).connect() as transport:
            return await transport.send(body)

    request = Request(purpose="sample", body=body, prompt_id="p")
    (completion,), _ = Decoder().decode(asyncio.run(once()).data, request, "teacher", 0)
    return completion


def test_the_default_reply_shows_the_last_message() -> None:
    made = answer(ASKED)
    assert (made.text, made.finish_reason, made.served_model) == ("You said: Say one two", "stop", "s")


def test_a_reply_may_use_all_messages() -> None:
    made = answer(ASKED, reply="{{ messages[0].content }}, {{ text | upper }} ({{ messages | length }})")
    assert made.text == "Be kind, SAY ONE TWO (2)"


def test_usage_counts_words() -> None:
    made = answer(ASKED, reply="a b c")
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 3)


def test_logprobs_are_the_words_and_the_same_each_time() -> None:
    made, again = (answer({**ASKED, "logprobs": True, "top_logprobs": 3}, reply="Grüß Gott dir dir") for _ in range(2))
    assert made.logprobs == again.logprobs
    assert made.logprobs is not None
    assert "".join(token.token for token in made.logprobs) == made.text
    assert b"".join(bytes(token.bytes or []) for token in made.logprobs).decode() == made.text
    assert made.logprobs[2].logprob == made.logprobs[3].logprob
    assert all(-1.01 < token.logprob < 0 for token in made.logprobs)
    assert all(token.top_logprobs[0].token == token.token for token in made.logprobs)


def test_logprobs_come_only_when_they_are_asked_for() -> None:
    assert answer(ASKED).logprobs is None


def test_a_script_is_any_function_and_may_fail() -> None:
    def script(body: dict[str, Any]) -> str:
        raise TransientError("not today")

    transport = ScriptedTransport(script)
    with pytest.raises(TransientError, match="not today"):
        asyncio.run(transport.send(ASKED))
    assert transport.bodies == [ASKED]


@pytest.mark.parametrize("reply", ["{{ nobody }}", "{{ text", "{% if %}"])
def test_a_reply_that_cannot_be_rendered_is_a_config_error_before_anything_is_asked(reply: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.reply") as raised:
        ScriptedTeacherConfig(reply=reply).check()
    assert "\n" not in str(raised.value)


def test_a_reply_that_fails_on_a_question_stops_with_one_line(corpus: Corpus, prompts: list[Prompt]) -> None:
    async def ask() -> None:
        async with Teacher(ScriptedTeacherConfig(reply="{{ messages[7].content }}"), corpus, RUN_ID) as teacher:
            request = teacher.request(prompts[0], "sample", SamplingParams())
            async for _ in teacher.complete([request]):
                pass

    with pytest.raises(ConfigError, match=r"teacher\.reply"):
        asyncio.run(ask())


def test_the_engine_behind_it_is_the_real_one(corpus: Corpus, prompts: list[Prompt]) -> None:
    async def ask() -> tuple[list[Completion], int, int]:
        async with Teacher(ScriptedTeacherConfig(price={"input": 1.0, "output": 2.0}), corpus, RUN_ID) as teacher:
            sampling = SamplingParams(top_logprobs=1)
            requests = [teacher.request(prompt, "sample", sampling) for prompt in prompts]
            first = [made async for made in teacher.complete(requests)]
            again = [made async for made in teacher.complete(requests)]
            assert {made.completion_id for made in first} == {made.completion_id for made in again}
            return first, teacher.engine.asked, teacher.engine.cached

    answers, asked, cached = asyncio.run(ask())
    assert sorted(made.text for made in answers) == [f"You said: Say {i}" for i in range(6)]
    assert (asked, cached) == (6, 6)
    # 2 words in at 1.0 and 4 out at 2.0, six times
    spend = corpus.spend(RUN_ID)
    assert spend.pop("cost_usd") == pytest.approx(60e-6)
    assert spend == {"calls": 6, "prompt_tokens": 12, "completion_tokens": 24, "unknown_calls": 0}
    assert corpus.rows("SELECT DISTINCT k, len(token_ids) FROM logprobs") == [(1, 4)]
