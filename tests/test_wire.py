"""Bodies out and replies in, in every dialect of facts/teachers.md."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

import pytest

from blackbox_kd.errors import RateLimited, RequestRejected, TeacherError, TeacherRefused, TransientError
from blackbox_kd.hashing import draw_seed
from blackbox_kd.teachers import checks
from blackbox_kd.teachers.base import Reply
from blackbox_kd.teachers.failures import error_of, kept, retry_after
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.ways import PromptLogprobs
from blackbox_kd.teachers.wire import CHECKED_REPLIES, Decoder, chat_body, usage_of
from blackbox_kd.types import Completion, Request, SamplingParams, Usage
from tests.fakes import chat_reply

MESSAGES = [{"role": "user", "content": "Say 1"}]
REQUEST = Request(purpose="sample", body={"model": "m", "messages": MESSAGES}, prompt_id="p")


def body(sampling: SamplingParams | None = None, draw: int = 0, **options: Any) -> dict[str, Any]:
    config = OpenAITeacherConfig(model="m", **options)
    return chat_body(config, MESSAGES, sampling or SamplingParams(), draw)


async def never(body: dict[str, Any], path: str) -> Any:
    raise AssertionError(path)


def decode(reply: dict[str, Any] | bytes) -> tuple[list[Completion], Usage]:
    data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return Decoder().decode(data, REQUEST, "teacher", 3)


def choice(text: str | None, index: int = 0, **message: Any) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}


def test_a_body_holds_the_sampling_parameters_and_nothing_that_was_not_asked_for() -> None:
    sampling = SamplingParams(temperature=0.7, top_p=0.9, max_completion_length=40)
    assert body(sampling) == {
        "model": "m", "messages": MESSAGES, "temperature": 0.7, "top_p": 0.9, "max_tokens": 40,
        "seed": draw_seed(0, MESSAGES, 0),
    }  # fmt: skip


@pytest.mark.parametrize("k", [0, 5])
def test_logprobs_are_asked_for_with_their_number_of_alternatives(k: int) -> None:
    made = body(SamplingParams(top_logprobs=k))
    assert (made["logprobs"], made["top_logprobs"]) == (True, k)


def test_the_token_limit_goes_by_the_name_that_the_endpoint_wants() -> None:
    made = body(SamplingParams(max_completion_length=9), token_limit_param="max_completion_tokens")
    assert made["max_completion_tokens"] == 9
    assert "max_tokens" not in made


def test_each_draw_of_each_question_has_its_own_seed() -> None:
    asked = [
        (seed, messages, draw)
        for seed in (0, 100)
        for messages in (MESSAGES, [*MESSAGES, *MESSAGES])
        for draw in range(3)
    ]
    seeds = [
        chat_body(OpenAITeacherConfig(model="m", seed=seed), messages, SamplingParams(), draw)["seed"]
        for seed, messages, draw in asked
    ]
    assert seeds == [draw_seed(*each) for each in asked]
    assert len(set(seeds)) == len(asked)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_without_a_seed_none_is_sent() -> None:
    assert "seed" not in body(draw=2, seed=None)


def test_reasoning_effort_is_sent_only_when_it_is_set() -> None:
    assert body(reasoning_effort="low")["reasoning_effort"] == "low"
    assert "reasoning_effort" not in body()


def test_extra_body_is_added_and_wins() -> None:
    made = body(extra_body={"top_k": 50, "temperature": 0.3})
    assert (made["top_k"], made["temperature"]) == (50, 0.3)


def test_omitted_parameters_are_left_out_whoever_set_them() -> None:
    sampling = SamplingParams(top_logprobs=3)
    made = body(sampling, omit_params=["seed", "top_p", "top_logprobs", "user"], extra_body={"user": "me"})
    assert set(made) == {"model", "messages", "temperature", "max_tokens", "logprobs"}


def test_whatever_changes_the_body_changes_the_key_and_nothing_else_does() -> None:
    def key(**options: Any) -> str:
        return Request(purpose="sample", body=body(**options), prompt_id="p").request_key

    same = {
        key(),
        key(base_url="http://elsewhere/v1"),
        key(api_key_env="OTHER"),
        key(extra_headers={"x": "y"}),
        key(concurrency=99),
    }
    assert len(same) == 1
    changed = [{"seed": 1}, {"extra_body": {"top_k": 1}}, {"omit_params": ["seed"]}, {"reasoning_effort": "low"},
               {"token_limit_param": "max_completion_tokens"}]  # fmt: skip
    assert len(same | {key(**options) for options in changed}) == 1 + len(changed)


def test_a_plain_reply_becomes_one_completion_with_its_usage() -> None:
    completions, usage = decode(chat_reply("Yes.", system_fingerprint="fp_1", finish_reason="length"))
    (answer,) = completions
    assert answer == Completion(
        request_key=REQUEST.request_key, prompt_id="p", author="teacher", model="m", text="Yes.", round=3,
        finish_reason="length", served_model="served-model", system_fingerprint="fp_1",
        usage=Usage(prompt_tokens=7, completion_tokens=3),
    )  # fmt: skip
    assert usage == Usage(prompt_tokens=7, completion_tokens=3)


def test_several_choices_keep_their_index_and_share_one_usage() -> None:
    completions, usage = decode(chat_reply("") | {"choices": [choice("b", 1), choice("a", 0), choice("c", 2)]})
    assert [(c.text, c.choice_idx) for c in completions] == [("b", 1), ("a", 0), ("c", 2)]
    assert len({c.completion_id for c in completions}) == 3
    assert [c.usage for c in completions] == [usage, Usage(), Usage()]


def test_choices_that_all_claim_the_same_index_are_numbered_in_order() -> None:
    completions, _ = decode(chat_reply("") | {"choices": [choice("a"), choice("b"), choice("c")]})
    assert [(c.text, c.choice_idx) for c in completions] == [("a", 0), ("b", 1), ("c", 2)]


def test_a_choice_without_an_index_is_the_first() -> None:
    reply = chat_reply("x")
    del reply["choices"][0]["index"]
    assert decode(reply)[0][0].choice_idx == 0


def test_a_refusal_is_the_text() -> None:
    completions, _ = decode({"choices": [choice(None, refusal="I cannot.")]})
    assert completions[0].text == "I cannot."
    assert completions[0].finish_reason == "refusal"  # so that it is not learnt


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_apart_from_the_text(field: str) -> None:
    completions, _ = decode({"choices": [choice("4", **{field: "2 and 2"})]})
    assert (completions[0].text, completions[0].reasoning) == ("4", "2 and 2")


def test_missing_content_usage_finish_reason_and_model_are_no_error() -> None:
    completions, usage = decode(b'{"choices":[{"message":{"role":"assistant"}}]}')
    (answer,) = completions
    assert (answer.text, answer.finish_reason, answer.served_model, answer.logprobs) == ("", "unknown", None, None)
    assert usage == answer.usage == Usage()


def test_null_everywhere_that_servers_put_it_is_no_error() -> None:
    completions, usage = decode(
        b'{"id":null,"model":null,"system_fingerprint":null,"service_tier":null,"error":null,'
        b'"choices":[{"index":0,"finish_reason":null,"logprobs":null,"message":{"role":"assistant","content":null,'
        b'"refusal":null,"reasoning_content":null,"tool_calls":null}}],'
        b'"usage":{"prompt_tokens":4,"completion_tokens":null,"prompt_tokens_details":null,'
        b'"completion_tokens_details":{"reasoning_tokens":null}}}'
    )
    assert (completions[0].text, completions[0].logprobs) == ("", None)
    assert usage == Usage(prompt_tokens=4)


def test_cached_and_reasoning_tokens_are_read_from_the_details() -> None:
    _, usage = decode(
        chat_reply(
            "x",
            usage={
                "prompt_tokens": 1000,
                "completion_tokens": 50,
                "prompt_tokens_details": {"cached_tokens": 400},
                "completion_tokens_details": {"reasoning_tokens": 30},
            },
        )
    )
    assert usage == Usage(prompt_tokens=1000, completion_tokens=50, cached_tokens=400, reasoning_tokens=30)


@pytest.mark.parametrize(
    ("total", "reasoning", "written"),
    [(135, 94, 103), (None, 94, 103), (41, 5, 9), (None, 5, 9), (30, 0, 9), (135, None, 103)],
)
def test_reasoning_that_is_counted_beside_the_answer_is_paid_for_like_it(
    total: int | None, reasoning: int | None, written: int
) -> None:
    bill = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": total}
    _, usage = decode(chat_reply("x", usage={**bill, "completion_tokens_details": {"reasoning_tokens": reasoning}}))
    assert usage == Usage(prompt_tokens=32, completion_tokens=written, reasoning_tokens=reasoning or 0)


def test_logprobs_keep_bytes_and_ids_where_they_are_given() -> None:
    shown = {"id": 28705, "token": " é", "bytes": [32, 195, 169], "logprob": -0.25}
    end = {"id": 2, "token": "", "bytes": [], "logprob": -0.5, "top_logprobs": []}
    content = [{**shown, "top_logprobs": [shown, {"token": "e", "logprob": -3.5, "bytes": [101]}]}, end]
    (answer,), _ = decode({"choices": [choice(" é") | {"logprobs": {"content": content, "refusal": None}}]})
    assert answer.logprobs is not None
    first, last = answer.logprobs
    assert (first.id, first.token, first.bytes, first.logprob) == (28705, " é", [32, 195, 169], -0.25)
    assert [(t.token, t.id, t.logprob) for t in first.top_logprobs] == [(" é", 28705, -0.25), ("e", None, -3.5)]
    assert (last.token, last.bytes, last.top_logprobs) == ("", [], [])


def test_logprobs_without_bytes_ids_or_alternatives_are_logprobs() -> None:
    content = [{"token": "Hi", "logprob": -1, "bytes": None}, {"token": "!", "logprob": -2.0, "top_logprobs": []}]
    (answer,), _ = decode({"choices": [choice("Hi!") | {"logprobs": {"content": content}}]})
    assert answer.logprobs is not None
    assert [(t.token, t.bytes, t.id, t.logprob) for t in answer.logprobs] == [
        ("Hi", None, None, -1.0), ("!", None, None, -2.0),
    ]  # fmt: skip


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}])
def test_empty_logprobs_count_as_none(logprobs: dict[str, Any] | None) -> None:
    (answer,), _ = decode({"choices": [choice("Hi") | {"logprobs": logprobs}]})
    assert answer.logprobs is None


def bytes_as(value: Any) -> dict[str, Any]:
    return {"content": [{"token": "Hi", "logprob": -1.0, "bytes": value, "top_logprobs": []}]}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("value", ["Hi", [-1], [300], [1.5], ["H"], {}, True])
def test_odd_bytes_are_left_out_and_the_logprobs_kept(value: Any, warm: bool) -> None:
    decoder = warmed() if warm else Decoder()
    reply = json.dumps({"choices": [choice("Hi") | {"logprobs": bytes_as(value)}]}).encode()
    (answer,), _ = decoder.decode(reply, REQUEST, "teacher", 0)
    assert answer.logprobs is not None
    assert [(t.token, t.logprob, t.bytes) for t in answer.logprobs] == [("Hi", -1.0, None)]
    assert decoder.odd == ""


def warmed() -> Decoder:
    """One that leaves bytes out, since they were always those of the text."""
    decoder = Decoder()
    for _ in range(CHECKED_REPLIES):
        decoder.decode(json.dumps(chat_reply("Hi", logprobs=True)).encode(), REQUEST, "teacher", 0)
    return decoder


def test_bytes_that_are_left_out_come_back_for_tokens_that_may_be_cut_and_for_no_others() -> None:
    def entry(text: str, *raw: int) -> dict[str, Any]:
        return {"token": text, "logprob": -1.0, "bytes": list(raw)}

    content = [
        entry("a", 97) | {"top_logprobs": [entry("b", 98), entry("\ufffd", 0xE2)]},
        entry("c", 99) | {"top_logprobs": [entry("d", 100)]},
        entry("\\xe2", 0xE2) | {"top_logprobs": []},
    ]
    reply = json.dumps({"choices": [choice("acx") | {"logprobs": {"content": content}}]}).encode()
    (answer,), _ = warmed().decode(reply, REQUEST, "teacher", 0)
    assert answer.text_bytes
    assert [(t.token, t.bytes) for t in answer.logprobs or []] == [("a", None), ("c", None), ("\\xe2", [0xE2])]
    tops = [(t.token, t.bytes) for token in answer.logprobs or [] for t in token.top_logprobs]
    assert tops == [("b", None), ("\ufffd", [0xE2]), ("d", None)]


ODD_LOGPROBS = [
    '{"content":{}}', '{"content":"Hi"}', '{"content":[null]}', '{"content":["Hi"]}', "[]", "5", '"none"', "true",
    '{"content":[{"token":"Hi"}]}', '{"content":[{"token":"Hi","logprob":null}]}',
    '{"content":[{"token":"Hi","logprob":"-1"}]}', '{"content":[{"token":null,"logprob":-1}]}',
    '{"content":[{"token":"Hi","logprob":-Infinity}]}', '{"content":[{"token":"Hi","logprob":NaN}]}',
    '{"content":[{"token":"Hi","logprob":-1,"top_logprobs":null}]}',
    '{"content":[{"token":"Hi","logprob":-1,"top_logprobs":{}}]}',
    '{"content":[{"token":"Hi","logprob":-1,"id":"7"}]}',
]  # fmt: skip


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("odd", ODD_LOGPROBS)
def test_odd_logprobs_cost_no_text_and_the_reason_is_kept(odd: str, warm: bool) -> None:
    data = json.dumps(chat_reply("Hi")).replace('"finish_reason"', f'"logprobs": {odd}, "finish_reason"').encode()
    decoder = warmed() if warm else Decoder()
    (answer,), usage = decoder.decode(data, REQUEST, "teacher", 0)
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("Hi", "stop", None)
    assert usage == answer.usage == usage_of(data) == Usage(prompt_tokens=7, completion_tokens=3)
    assert decoder.odd


def test_every_kind_of_reply_says_what_it_cost() -> None:
    bill = {"prompt_tokens": 7, "completion_tokens": 3}
    completions = {"choices": [{"index": 0, "text": "Hi", "logprobs": None}], "usage": bill}
    native = {"text": "Hi", "meta_info": {**bill, "cached_tokens": 2, "finish_reason": {"type": "length"}}}
    assert usage_of(json.dumps(completions).encode()) == Usage(prompt_tokens=7, completion_tokens=3)
    assert usage_of(json.dumps(native).encode()) == Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=2)
    assert usage_of(b"[]") == Usage()


def test_half_a_character_in_a_text_is_shown_as_one_that_is_broken() -> None:
    token = '{"token":"\\ud83d","logprob":-1}'
    data = '{"choices":[{"message":{"content":"Hi \\ud83d"},"logprobs":{"content":[' + token + "]}}]}"
    (answer,), _ = decode(data.encode())
    assert answer.text == "Hi \ufffd\ufffd\ufffd"
    assert answer.logprobs is not None
    assert (answer.logprobs[0].token, answer.logprobs[0].logprob) == ("\ufffd\ufffd\ufffd", -1)


@pytest.mark.parametrize("one_odd", [None, [], {"content": [{"token": "b", "logprob": None}]}])
def test_a_choice_with_odd_logprobs_costs_no_other_choice(one_odd: Any) -> None:
    reply = {"choices": [choice("a") | {"logprobs": bytes_as([72, 105])}, choice("b", 1) | {"logprobs": one_odd}]}
    (one, other), _ = decode(reply)
    assert (one.text, other.text, other.logprobs) == ("a", "b", None)
    assert one.logprobs is not None
    assert (one.logprobs[0].token, one.logprobs[0].bytes) == ("Hi", [72, 105])


def test_togethers_parallel_arrays_are_logprobs() -> None:
    arrays = {
        "tokens": ["Hi", "!"], "token_logprobs": [-0.5, -1], "token_ids": [7, 8],
        "top_logprobs": [{"Hi": -0.5, "Ho": -2.0}, None],
    }  # fmt: skip
    (answer,), _ = decode({"choices": [choice("Hi!") | {"logprobs": arrays}]})
    assert answer.logprobs is not None
    assert [(t.token, t.logprob, t.id, len(t.top_logprobs)) for t in answer.logprobs] == [
        ("Hi", -0.5, None, 2), ("!", -1.0, None, 0),
    ]  # fmt: skip
    assert [(t.token, t.logprob) for t in answer.logprobs[0].top_logprobs] == [("Hi", -0.5), ("Ho", -2.0)]
    assert not answer.text_bytes


def test_togethers_ids_are_kept_where_no_alternative_lacks_one() -> None:
    arrays = {"tokens": ["Hi", "!"], "token_logprobs": [-0.5, -1], "token_ids": [7, 8]}
    (answer,), _ = decode({"choices": [choice("Hi!") | {"logprobs": arrays}]})
    assert [t.id for t in answer.logprobs or []] == [7, 8]


@pytest.mark.parametrize(
    "arrays",
    [
        {"tokens": ["Hi", "!"], "token_logprobs": [-0.5]},
        {"tokens": ["Hi"], "token_logprobs": [None]},
        {"tokens": "Hi", "token_logprobs": -0.5},
        {"tokens": ["Hi"], "token_logprobs": [-0.5], "top_logprobs": [{"Hi": None}]},
        {"tokens": ["Hi"], "token_logprobs": [-0.5], "token_ids": [1, 2]},
        {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": None},
        {"reasoning_content": [{"token": "Hm", "logprob": -1, "bytes": None}], "content": None},
    ],
)
def test_arrays_that_are_not_whole_count_as_none(arrays: dict[str, Any]) -> None:
    (answer,), _ = decode({"choices": [choice("Hi") | {"logprobs": arrays}]})
    assert (answer.text, answer.logprobs) == ("Hi", None)


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        ({"message": "overloaded", "code": 502}, TransientError, 502),
        ({"message": "slow down", "code": 429}, RateLimited, 429),
        ({"message": "slow down", "code": "429"}, RateLimited, 429),
        ({"message": "no such thing", "code": 404}, RequestRejected, 404),
        ({"message": "bad key", "code": 401}, TeacherRefused, 401),
        ({"message": "upstream died", "code": "server_error"}, TransientError, 500),
        ({"message": "pay first", "code": "insufficient_quota"}, TeacherRefused, 500),
        ({"message": "odd", "code": 7}, TransientError, 500),
        ({"message": "odd", "code": None}, TransientError, 500),
        ("something broke", TransientError, 500),
    ],
)
@pytest.mark.parametrize("choices", [{}, {"choices": []}, {"choices": None}])
def test_an_error_inside_a_200_is_an_error(
    error: Any, kind: type[TeacherError], status: int, choices: dict[str, Any]
) -> None:
    with pytest.raises(kind) as raised:
        decode({"error": error, **choices})
    assert type(raised.value) is kind
    assert raised.value.status == status
    assert (error if isinstance(error, str) else error["message"]) in str(raised.value)


WHOLE = json.dumps(chat_reply("a long answer")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"42", b"<html>Gateway</html>", b"\xff\xfe\x00", WHOLE[:-1], WHOLE[: len(WHOLE) // 2],
        b"{}", b'{"choices":[]}', b'{"object":"list","data":[]}', b'{"choices":[{"text":"legacy"}]}',
        b'{"choices":[{"message":"Hi"}]}', b'{"choices":{"0":{}}}', b'{"choices":[{"message":{"content":7}}]}',
        b'{"choices":[{"message":{"content":"\xff"}}]}', b"[" * 100_000,
        b'{"choices":[{"message":' + b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_a_200_that_cannot_be_read_is_worth_asking_again(data: bytes) -> None:
    with pytest.raises(TransientError) as raised:
        decode(data)
    assert raised.value.status == 200
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestRejected), (404, RequestRejected), (405, RequestRejected), (413, RequestRejected),
        (422, RequestRejected), (401, TeacherRefused), (402, TeacherRefused), (403, TeacherRefused),
        (408, TransientError), (409, TransientError), (425, TransientError), (500, TransientError),
        (502, TransientError), (503, TransientError), (504, TransientError), (529, TransientError),
        (429, RateLimited),
    ],
)  # fmt: skip
def test_a_status_says_what_to_do(status: int, kind: type[TeacherError]) -> None:
    error = error_of(status, b'{"error":{"message":"that went wrong","code":"some_code"}}', {})
    assert type(error) is kind
    assert error.status == status
    assert "that went wrong (some_code)" in str(error)
    assert f"HTTP {status}" in str(error)


QUOTA = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, QUOTA),
        (429, {"message": "no money", "type": "billing_hard_limit_reached", "code": None}),
        (429, QUOTA | {"message": "You exceeded your current quota. " * 20}),
        (400, {"message": "top up", "code": "credit_balance_too_low"}),
        (403, {"message": "top up", "code": "insufficient_credits"}),
        (429, {"message": "top up", "code": 429, "type": "insufficient_quota"}),
        (429, "insufficient_quota"),
    ],
)
def test_an_empty_account_is_refused_for_good_whatever_the_status(status: int, error: Any) -> None:
    assert type(error_of(status, json.dumps({"error": error}).encode(), {"retry-after": "1"})) is TeacherRefused


LIMITED = "Rate limit reached for gpt-4o in organization org-1 on tokens per min (TPM): "
LARGE = "Request too large for gpt-4o in organization org-1 on tokens per min (TPM): "


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (LARGE + "Limit 30000, Requested 45001. The input or output tokens must be reduced.", RequestRejected),
        (LARGE + "Limit: 6000, Requested: 7000, please reduce your message size.", RequestRejected),
        ("Request too large for this tier.", RequestRejected),
        (LIMITED + "Limit 30000, Used 5, Requested 30001. Please try again in 6s.", RequestRejected),
        (LIMITED + "Limit 30000, Used 29000, Requested 2000. Please try again in 2s.", RateLimited),
        (LIMITED + "Limit 30000, Requested 30000.", RateLimited),
        ("Rate limit reached for requests. Limit: 3 / min. Please try again in 20s.", RateLimited),
        ("slow down", RateLimited),
    ],
)
def test_a_429_for_more_than_the_whole_limit_will_never_succeed(message: str, kind: type[TeacherError]) -> None:
    error = {"message": message, "type": "tokens", "param": None, "code": "rate_limit_exceeded"}
    found = error_of(429, json.dumps({"error": error}).encode(), {"retry-after": "1"})
    assert (type(found), found.status) == (kind, 429)
    assert type(error_of(500, json.dumps({"error": error}).encode(), {})) is TransientError


def test_a_prompt_about_quotas_that_an_error_echoes_does_not_stop_the_run() -> None:
    echoed = {"detail": [{"loc": ["body"], "msg": "too long", "input": "What does insufficient_quota mean?"}]}
    assert type(error_of(422, json.dumps(echoed).encode(), {})) is RequestRejected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error"}}', "too long (400)"),
        (b'{"error":{"message":"bad","type":"invalid_request_error","code":null}}', "bad (invalid_request_error)"),
        (b'{"error":{"message":"bad"}}', "bad"),
        (b'{"error":"just text"}', "just text"),
        (b'{"error":null,"message":"beside it"}', "beside it"),
        (b'{"object":"error","message":"vllm, old","code":400}', "vllm, old"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"detail":[{"loc":["body","model"],"msg":"field required"}]}', "field required"),
        (b"Internal   Server\nError", "Internal Server Error"),
        (b"\xff\xfe broken", "broken"),
        (b'"a JSON text"', "a JSON text"),
        (b"", "HTTP 400"),
    ],
)
def test_what_the_body_says_is_shown_in_whichever_shape_it_comes(data: bytes, said: str) -> None:
    assert said in str(error_of(400, data, {}))
    assert "\n" not in str(error_of(400, data, {}))


@pytest.mark.parametrize("depth", [994, 996, 5000])
def test_what_is_nested_too_deeply_to_read_is_shown_as_text(depth: int) -> None:
    for shown in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth):
        assert len(str(error_of(400, b'{"error":' + shown + b"}", {}))) < 400
        assert not checks.read(Reply(shown)).choices
        with pytest.raises(TransientError):
            PromptLogprobs(OpenAITeacherConfig(model="m"), never).scored(REQUEST, [Reply(shown[:depth])])
    assert "cannot be read" in checks.read(Reply(b"[" * 5000)).no


def test_a_score_that_cannot_be_read_is_kept_with_the_attempt() -> None:
    with pytest.raises(TransientError, match="cannot be read") as raised:
        PromptLogprobs(OpenAITeacherConfig(model="m"), never).scored(REQUEST, [Reply(b"{}"), Reply(b"<html>")])
    assert kept(raised.value).endswith("; the reply: <html>")


def test_a_long_error_page_is_cut() -> None:
    assert len(str(error_of(500, b"<p>" * 10_000, {}))) < 400


@pytest.mark.parametrize("status", [429, 503])
def test_an_error_carries_how_long_to_wait(status: int) -> None:
    assert error_of(status, b"", {"retry-after": "7"}).retry_after_s == 7.0
    assert error_of(status, b"", {}).retry_after_s is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after-ms": "inf", "retry-after": "9"}, 9.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": "Mon, 99 Foo 2000 99:99:99 GMT"}, None),
        ({"retry-after": "Mon, 30 Feb 99999999 00:00:00 GMT"}, None),
    ],
)
def test_retry_after_is_read_or_ignored(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize(("ahead", "low", "high"), [(30, 28.0, 30.0), (-3600, 0.0, 0.0)])
def test_retry_after_may_be_a_date(ahead: int, low: float, high: float) -> None:
    seconds = retry_after({"retry-after": email.utils.formatdate(time.time() + ahead, usegmt=True)})
    assert seconds is not None
    assert low <= seconds <= high
