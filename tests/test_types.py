"""Identities: what is asked has one name, for ever. The literal hashes were made with `printf ... | sha256sum`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackbox_kd.hashing import canonical_json, content_id, file_hash, phase_seed
from blackbox_kd.types import Completion, Prompt, Request, TokenLogprob, TopLogprob, scorer

BODY: dict[str, Any] = {
    "temperature": 1.0,
    "model": "m",
    "messages": [{"role": "user", "content": "Grüß Gott"}],
    "max_tokens": 8,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def ask(**changes: Any) -> Request:
    return Request(**{"purpose": "sample", "prompt_id": "p", "body": BODY, **changes})


def answer(**changes: Any) -> Completion:
    given = {
        "request_key": "8ae47153-e4ef-6d8e-ca09-0bc52be71b9f",
        "prompt_id": "p",
        "author": "teacher",
        "model": "m",
        "text": "Servus",
        "finish_reason": "stop",
        "choice_idx": 1,
    }
    return Completion(**{**given, **changes})


def test_the_key_of_a_request_is_the_hash_that_it_always_was() -> None:
    assert ask().request_key == "9131bdb1-00c8-a34c-c55c-c4e201c6bc1e"


def test_the_order_of_keys_in_a_body_does_not_change_the_request() -> None:
    assert ask(body=dict(reversed(BODY.items()))).request_key == ask().request_key


@pytest.mark.parametrize(
    "why",
    [
        {"purpose": "evaluate"},
        {"prompt_id": "another"},
        {"context_hash": content_id("a private prompt")},
        {"completion_id": content_id("a draft"), "cut_byte": 3},
    ],
)
def test_why_something_is_asked_is_not_in_the_key(why: dict[str, Any]) -> None:
    assert ask(**why).request_key == ask().request_key


def test_whatever_the_endpoint_sees_is_in_the_key() -> None:
    others = [
        ask(sample_idx=1),
        ask(endpoint="generate"),
        ask(body=BODY | {"model": "n"}),
        ask(body=BODY | {"temperature": 0.9}),
        ask(body=BODY | {"max_tokens": 9}),
        ask(body=BODY | {"seed": 0}),
        ask(body=BODY | {"messages": [{"role": "user", "content": "Grüß Gott "}]}),
    ]
    assert len({request.request_key for request in [ask(), *others]}) == 1 + len(others)


def test_a_key_that_is_handed_in_is_not_believed() -> None:
    assert ask(request_key="made up").request_key == ask().request_key
    assert answer(completion_id="made up").completion_id == answer().completion_id


def test_an_answer_is_named_by_its_request_choice_author_and_text() -> None:
    assert answer().completion_id == "3537271a-48ff-a851-de22-f46185553922"
    same = answer(finish_reason="length", round=2, model="n")
    assert same.completion_id == answer().completion_id
    others = [answer(choice_idx=0), answer(text="servus"), answer(author="student"), answer(request_key="q")]
    assert len({c.completion_id for c in [answer(), *others]}) == 5


def test_a_prompt_is_named_by_its_messages_alone() -> None:
    hi = Prompt(messages=[{"role": "user", "content": "Hi"}], split="train", source="a.jsonl")
    elsewhere = Prompt(messages=[{"content": "Hi", "role": "user"}], split="ood", source="b.jsonl", meta={"n": 1})
    assert hi.prompt_id == elsewhere.prompt_id == "557f6d95-86f5-7ae7-2d24-a7d34f47ed21"


def test_the_text_of_a_prompt_is_its_last_user_message() -> None:
    turns = [("system", "s"), ("user", "first"), ("assistant", "a"), ("user", "second")]
    prompt = Prompt(messages=[{"role": r, "content": c} for r, c in turns], split="train", source="x")
    assert prompt.text == "second"


def test_what_flows_between_rooms_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ask().sample_idx = 3  # type: ignore[misc]


def test_a_completion_with_logprobs_survives_msgpack() -> None:
    top = TopLogprob(token="é", logprob=-0.1, bytes=[195, 169], id=7)
    sent = answer(logprobs=[TokenLogprob(token="e", logprob=-2.5, top_logprobs=[top])])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Completion) == sent


def test_a_scorer_is_a_model_with_its_context() -> None:
    assert scorer("m", None) == "m@bare"
    assert scorer("org/m@2", "h") == "org/m@2@h"


def test_canonical_json_has_sorted_keys_no_blanks_and_plain_utf8() -> None:
    assert canonical_json({"b": [1, 1.0, None, True], "a": {"ä": "é\n"}}) == '{"a":{"ä":"é\\n"},"b":[1,1.0,null,true]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_cannot_write_has_no_hash(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_id({"a": value})


@settings(deadline=None)
@given(JSON)
def test_canonical_json_keeps_the_value(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


def test_a_content_id_is_the_first_half_of_sha256() -> None:
    assert content_id({"a": 1}) == "015abd7f-5cc5-7a2d-d94b-7590f04ad808"


def test_a_file_is_named_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"adapter")
    assert file_hash(tmp_path / "a") == "ae1eae1d76e5b7c865c4122ce366a080"


def test_each_phase_of_each_round_has_its_own_seed_and_keeps_it() -> None:
    assert phase_seed(42, 3, "rollout") == 0x15406197 // 2  # sha256("42/3/rollout") begins with 15406197
    seeds = {phase_seed(s, r, p) for s in range(3) for r in range(5) for p in ("rollout", "update")}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**31 for seed in seeds)
