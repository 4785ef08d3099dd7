"""Every answer is kept as it came, whatever it is, and only whole ones are learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from blackbox_kd import sample
from tests.fakes import FakeAPI, chat_reply, served
from tests.test_sample import corpus_of, last_line, write_config, write_prompts

COLUMNS = "c.text, c.reasoning, c.finish_reason, c.served_model, c.system_fingerprint"
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "Haus"}'}}


def of_message(finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": None, **message}}
    return chat_reply("") | {"choices": [choice]}


REPLIES = {
    "train 0": chat_reply("whole", system_fingerprint="fp_1"),
    "train 1": chat_reply("cut of", finish_reason="length"),
    "train 2": chat_reply("", finish_reason="content_filter"),
    "train 3": of_message(refusal="I cannot."),
    "train 4": of_message(content="4", reasoning_content="2 and 2"),
    "train 5": of_message("tool_calls", tool_calls=[CALL]),
    "train 6": chat_reply("served by another", model="m-2026-11-24"),
}


def collect(
    tmp_path: Path, reply: Callable[[dict[str, Any]], Any], *flags: str, **sections: Any
) -> tuple[int, FakeAPI]:
    with served(FakeAPI(lambda body, _: reply(body))) as api:
        return sample.main(["--config", write_config(tmp_path, api.url, **sections), *flags]), api


def by_prompt(body: dict[str, Any]) -> dict[str, Any]:
    return REPLIES[body["messages"][-1]["content"]]


def test_whatever_comes_back_is_a_row_with_its_reason_and_is_not_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "prompts", train=len(REPLIES))
    code, _ = collect(tmp_path, by_prompt, "--json")
    assert code == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == {
        "stop": 3, "length": 1, "content_filter": 1, "refusal": 1, "tool_calls": 1,
    }  # fmt: skip
    corpus = corpus_of(tmp_path)
    rows = corpus.rows(
        f"SELECT {COLUMNS} FROM completions c JOIN prompts p USING (prompt_id) ORDER BY p.messages::VARCHAR"
    )
    called = json.dumps({"tool_calls": [CALL]}, separators=(",", ":"))
    assert rows == [
        ("whole", None, "stop", "served-model", "fp_1"),
        ("cut of", None, "length", "served-model", None),
        ("", None, "content_filter", "served-model", None),
        ("I cannot.", None, "refusal", "served-model", None),
        ("4", "2 and 2", "stop", "served-model", None),
        (called, None, "tool_calls", "served-model", None),
        ("served by another", None, "stop", "m-2026-11-24", None),
    ]
    assert corpus.rows("SELECT text FROM sft ORDER BY text") == [("4",), ("served by another",), ("whole",)]
    code, again = collect(tmp_path, by_prompt)
    assert (code, again.bodies) == (0, [])


def test_several_choices_of_several_draws_are_all_rows_and_their_tokens_count_once(tmp_path: Path) -> None:
    def two(body: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {"index": i, "message": {"content": f"{body['seed']}{'ab'[i]}"}, "finish_reason": "stop"} for i in (0, 1)
        ]
        return chat_reply("") | {"choices": choices}

    write_prompts(tmp_path / "prompts", train=1)
    code, api = collect(tmp_path, two, teacher={"extra_body": {"n": 2}}, sample={"n": 3})
    corpus = corpus_of(tmp_path)
    assert code == 0
    seeds = {body["seed"] for body in api.bodies}
    assert len(seeds) == 3
    assert {text for (text,) in corpus.rows("SELECT text FROM completions")} == {f"{s}{c}" for s in seeds for c in "ab"}
    assert corpus.rows("SELECT count(*) FROM completions") == [(6,)]
    assert corpus.rows("SELECT sum(completion_tokens), count(DISTINCT choice_idx) FROM completions") == [(9, 2)]
    assert corpus.rows("SELECT sum(completion_tokens), count(*) FROM attempts") == [(9, 3)]


def test_a_conversation_of_several_turns_is_asked_and_kept_whole(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]]
    write_prompts(tmp_path / "prompts", train=1)
    (tmp_path / "prompts" / "train.jsonl").write_text(json.dumps({"messages": turns}))
    code, api = collect(tmp_path, lambda body: chat_reply("d"))
    assert code == 0
    assert [body["messages"] for body in api.bodies] == [turns]
    ((messages, text),) = corpus_of(tmp_path).rows("SELECT messages::VARCHAR, text FROM sft")
    assert (json.loads(messages), text) == (turns, "d")


def test_two_teachers_in_one_corpus_are_both_kept_and_the_last_one_is_learnt(tmp_path: Path) -> None:
    def signed(body: dict[str, Any]) -> dict[str, Any]:
        return chat_reply(body["model"], model=f"{body['model']}-dated")

    for name in ("one", "two"):
        code, api = collect(tmp_path, signed, name=name, teacher={"model": name})
        assert (code, len(api.bodies)) == (0, 4)
    corpus = corpus_of(tmp_path)
    assert corpus.rows("SELECT model, served_model, count(*) FROM completions GROUP BY ALL ORDER BY ALL") == [
        ("one", "one-dated", 4),
        ("two", "two-dated", 4),
    ]
    assert corpus.rows("SELECT DISTINCT text FROM sft") == [("two",)]


def test_cached_and_reasoning_tokens_are_kept_and_priced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 500,
        "prompt_tokens_details": {"cached_tokens": 600},
        "completion_tokens_details": {"reasoning_tokens": 450},
    }
    price = {"input": 2.0, "cached_input": 0.5, "output": 8.0}
    write_prompts(tmp_path / "prompts", train=1)
    code, _ = collect(tmp_path, lambda body: chat_reply("x", usage=usage), "--json", teacher={"price": price})
    assert code == 0
    # 400 fresh at 2.0, 600 cached at 0.5, 500 out (reasoning among them) at 8.0, by the million
    assert json.loads(capsys.readouterr().out)["spend"]["cost_usd"] == pytest.approx(0.0008 + 0.0003 + 0.004)
    for table in ("completions", "attempts"):
        assert corpus_of(tmp_path).rows(f"SELECT cached_tokens, reasoning_tokens FROM {table}") == [(600, 450)]


def test_required_logprobs_that_do_not_come_stop_early_with_exit_3_and_keep_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "prompts", train=20)
    strict = {"require_logprobs": True, "concurrency": 1}
    code, api = collect(tmp_path, lambda body: chat_reply("x"), teacher=strict, sample={"top_logprobs": 2})
    assert code == 3
    assert last_line(capsys) == (
        "error: m gave no logprobs 3 times in a row, and teacher.require_logprobs is set: "
        "ask another endpoint, or unset it to collect text"
    )
    assert len(api.bodies) == 3
    corpus = corpus_of(tmp_path)
    assert corpus.rows("SELECT count(*) FROM completions") == [(3,)]
    assert corpus.rows("SELECT count(*) FROM pending") == [(17,)]


def test_one_answer_without_them_is_no_reason_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mostly(body: dict[str, Any]) -> web.Response | dict[str, Any]:
        return chat_reply("x", logprobs=body["messages"][-1]["content"] != "train 1")

    strict = {"require_logprobs": True, "concurrency": 1}
    code, _ = collect(tmp_path, mostly, "--json", teacher=strict, sample={"top_logprobs": 1})
    assert code == 0
    assert json.loads(capsys.readouterr().out)["missing_logprobs"] == 1


@pytest.mark.parametrize(("strict", "code", "asked"), [(False, 0, 5), (True, 3, 3)])
def test_odd_logprobs_cost_one_call_and_no_text_and_are_said_once(
    strict: bool, code: int, asked: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(body: dict[str, Any]) -> dict[str, Any]:
        reply = chat_reply("x", logprobs=True)
        reply["choices"][0]["logprobs"]["content"][0]["logprob"] = None
        return reply

    write_prompts(tmp_path / "prompts", train=5)
    teacher = {"require_logprobs": strict, "concurrency": 1, "price": {"input": 1.0, "output": 1.0}}
    found, api = collect(tmp_path, odd, teacher=teacher, sample={"top_logprobs": 2})
    assert (found, len(api.bodies)) == (code, asked)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("m was asked for logprobs and gave none that can be read (Expected `float`, got `null`") == 1
    corpus = corpus_of(tmp_path)
    assert corpus.rows("SELECT count(*), sum(cost_usd) FROM attempts WHERE billed AND error IS NULL") == [
        (asked, pytest.approx(asked * 10 / 1e6))
    ]
    assert corpus.rows("SELECT count(*), (SELECT count(*) FROM logprobs) FROM completions") == [(asked, 0)]
