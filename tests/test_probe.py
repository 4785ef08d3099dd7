"""The probe against hosted dialects on a real socket: what works is found, what only looks as if is not believed."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from blackbox_kd.__main__ import main
from blackbox_kd.command import overrides
from blackbox_kd.config import load_config
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import AlignmentError, ConfigError, TeacherRefused, TransientError
from blackbox_kd.probe import ensure
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.teachers import checks, scores
from blackbox_kd.teachers.base import Capabilities, Reply
from blackbox_kd.teachers.caller import PATHS
from blackbox_kd.teachers.checks import Answer
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.prefill import PREFILLS, prefilled, what_is_new
from blackbox_kd.teachers.probe import capabilities, probe
from blackbox_kd.types import Request
from tests.conftest import GGUF, RUN_ID
from tests.endpoints import Dialect, Endpoint
from tests.fakes import FakeAPI, Handler, chat_reply, error_reply, served
from tests.records import token


def hosted(url: str, **options: Any) -> OpenAITeacherConfig:
    return OpenAITeacherConfig(**{"model": "m", "base_url": url, "api_key_env": None} | options)


def probed(handler: Handler, **options: Any) -> dict[str, tuple[Any, str]]:
    """Everything that is found at an endpoint that answers like this."""

    async def ask_all(config: OpenAITeacherConfig) -> dict[str, tuple[Any, str]]:
        async with config.connect() as transport:

            async def ask(request: Request) -> Reply:
                assert request.purpose == "probe"
                return await transport.send(request.body, PATHS[request.endpoint])

            return await probe(config, ask)

    with served(FakeAPI(handler)) as api:
        return asyncio.run(ask_all(hosted(api.url, **options)))


def values(found: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    return {name: value for name, (value, _) in found.items()}


OPENAI = Dialect(headers={"x-ratelimit-remaining-requests": "9"})
DEEPSEEK = Dialect(prefill=("prefix",), refuses_assistant_last=True, seed=False)
TOGETHER = Dialect(logprobs="arrays", completions="legacy", echo="prompt", prefill=("assistant_last",))
FIREWORKS = Dialect(max_top=5, completions="content", echo="works", prefill=("assistant_last",))
VLLM = Dialect(max_top=1000, prefill=("continue_final_message",), prompt_logprobs="works", completions="legacy",
               echo="works")  # fmt: skip
LLAMA_CPP = Dialect(max_top=1000, ids=True, max_n=4, prefill=("assistant_last",), repeats_prefill=True,
                    completions="content", bias="works")  # fmt: skip
LLAMA_CPP_PYTHON = Dialect(bytes=False, n="ignored", completions="legacy", echo="shifted")
TRANSFORMERS = Dialect(logprobs="dropped", n="ignored", temperature="cold", seed=False, refuses_assistant_last=True)
GEMINI = Dialect(logprobs="refused", seed=False, usage={"total_tokens": 40})
ANTHROPIC = Dialect(logprobs="dropped", n="ignored", seed=False, prefill=("assistant_last",),
                    headers={"anthropic-ratelimit-tokens-remaining": "9"})  # fmt: skip
REASONING = Dialect(logprobs="refused", temperature="refused", n="refused", prompt_logprobs="refused",
                    usage={"completion_tokens_details": {"reasoning_tokens": 64}})  # fmt: skip
DEEPSEEK_REASONER = Dialect(logprobs="refused", reasoning="Let me see.", prefill=("prefix",),
                            usage={"completion_tokens_details": {"reasoning_tokens": 64}})  # fmt: skip

NO_LOGPROBS = {"top_logprobs_max": 0, "has_bytes": False, "determinism_nats": None}


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (OPENAI, {"rate_headers": True}),
        (DEEPSEEK, {"prefill": "prefix", "seed_honoured": False}),
        (TOGETHER, {"prefill": "assistant_last", "scoring": "echo", **NO_LOGPROBS, "determinism_nats": 0.0}),
        (FIREWORKS, {"prefill": "assistant_last", "scoring": "echo", "top_logprobs_max": 5}),
        (VLLM, {"prefill": "continue_final_message", "scoring": "prompt_logprobs", "top_logprobs_max": 100}),
        (LLAMA_CPP, {"prefill": "assistant_last", "prefill_reply": "whole", "scoring": "forced",
                     "top_logprobs_max": 100, "n_max": 4, "token_ids": True}),
        (LLAMA_CPP_PYTHON, {"has_bytes": False, "n_max": 1}),
        (TRANSFORMERS, {**NO_LOGPROBS, "n_max": 1, "seed_honoured": False, "temperature_honoured": False}),
        (GEMINI, {**NO_LOGPROBS, "seed_honoured": False, "reasoning_hidden": True}),
        (ANTHROPIC, {**NO_LOGPROBS, "n_max": 1, "seed_honoured": False, "prefill": "assistant_last",
                     "rate_headers": True}),
        (REASONING, {**NO_LOGPROBS, "n_max": 1, "seed_honoured": False, "temperature_honoured": False,
                     "reasoning_hidden": True}),
        (DEEPSEEK_REASONER, {**NO_LOGPROBS, "prefill": "prefix"}),
    ],
    ids=["openai", "deepseek", "together", "fireworks", "vllm", "llama.cpp", "llama-cpp-python", "transformers",
         "gemini", "anthropic", "reasoning", "deepseek-reasoner"],
)  # fmt: skip
def test_hosted_dialects(dialect: Dialect, expected: dict[str, Any]) -> None:
    usual = {"chat": True, "top_logprobs_max": 20, "has_bytes": True, "token_ids": False, "scoring": "none",
             "prefill": "none", "prefill_reply": "new", "n_max": 8, "seed_honoured": True, "temperature_honoured": True,
             "determinism_nats": 0.0, "reasoning_hidden": False, "rate_headers": False}  # fmt: skip
    endpoint = Endpoint(dialect)
    found = probed(endpoint)
    assert values(found) == usual | expected, found
    assert endpoint.calls <= 18
    assert set(found) == set(Capabilities.__struct_fields__)
    assert all(detail for _, detail in found.values())


LIES: list[tuple[str, dict[str, Any], str, Any, str]] = [
    ("n ignored", {"n": "ignored"}, "n_max", 1, "got 1"),
    ("n copies", {"n": "copies"}, "n_max", 1, "8, 1 different"),
    ("always greedy", {"temperature": "cold"}, "temperature_honoured", False, "at temperature 1"),
    ("never greedy", {"temperature": "hot"}, "temperature_honoured", False, "at temperature 0"),
    (
        "never greedy, no logprobs",
        {"temperature": "hot", "logprobs": "dropped"},
        "temperature_honoured",
        False,
        "at temp",
    ),
    ("always greedy: no seed", {"temperature": "cold"}, "seed_honoured", False, "every seed"),
    ("seed ignored", {"seed": False}, "seed_honoured", False, "the same seed"),
    ("logprobs dropped", {"logprobs": "dropped"}, "top_logprobs_max", 0, "got none with a 200"),
    ("fewer than asked for", {"max_top": 5, "clamps": True}, "top_logprobs_max", 5, "asked for 20"),
    ("echo ignored", {"completions": "content"}, "scoring", "none", "echo: ignored"),
    ("echo shifted", {"completions": "legacy", "echo": "shifted"}, "scoring", "none", "off by 1."),
    ("echo made up", {"completions": "content", "echo": "made-up"}, "scoring", "none", "off by 1."),
    ("replicas that differ", {"completions": "legacy", "echo": "works", "noise": 0.2}, "scoring", "none", "off by 0.2"),
    ("prompt_logprobs noisy", {"prompt_logprobs": "works", "noise": 0.2}, "scoring", "none", "off by 0.2"),
    ("determinism", {"noise": 0.03}, "determinism_nats", 0.03, "two greedy answers"),
    ("bias counted", {"completions": "content", "ids": True, "bias": "counted"}, "scoring", "none", "off by"),
    ("bias ignored", {"completions": "content", "ids": True}, "scoring", "none", "another token comes back"),
    ("new turn", {"prefill": ()}, "prefill", "none", "does not go on with the same token"),
    ("new turn, no logprobs", {"logprobs": "dropped"}, "prefill", "none", "does not go on with the same words"),
]


@pytest.mark.parametrize(("dialect", "name", "value", "said"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_servers_that_lie_are_not_believed(dialect: dict[str, Any], name: str, value: Any, said: str) -> None:
    found, detail = probed(Endpoint(Dialect(**dialect)))[name]
    assert found == pytest.approx(value) if isinstance(value, float) else found == value
    assert said in detail


@pytest.mark.parametrize("form", PREFILLS)
@pytest.mark.parametrize("logprobs", ["content", "dropped"])
@pytest.mark.parametrize("repeats", [True, False])
def test_every_form_of_prefill_is_found(form: str, logprobs: str, repeats: bool) -> None:
    dialect = Dialect(prefill=(form,), logprobs=logprobs, repeats_prefill=repeats)
    found = values(probed(Endpoint(dialect)))
    assert (found["prefill"], found["prefill_reply"]) == (form, "whole" if repeats else "new")


@pytest.mark.parametrize("repeats", [True, False])
def test_a_reply_that_lost_its_first_space_is_noticed(repeats: bool) -> None:
    dialect = Dialect(prefill=("prefix",), repeats_prefill=repeats, strips_prefilled=True)
    assert probed(Endpoint(dialect))["prefill_reply"] == (
        "stripped", "what is new lacks the space that it should begin with"
    )  # fmt: skip


def test_what_is_new_is_told_by_what_the_probe_found() -> None:
    assert what_is_new("A fox ran.", "A fox", "whole") == " ran."
    assert what_is_new(" ran.", "A fox", "new") == " ran."
    assert what_is_new("A A A", "A", "new") == "A A A"
    with pytest.raises(AlignmentError, match=r"begins with .*'new'.*`probe`"):
        what_is_new("A fox ran.", "A fox", "new")
    with pytest.raises(AlignmentError, match=r"does not begin with .*'whole'"):
        what_is_new(" ran.", "A fox", "whole")
    with pytest.raises(AlignmentError, match="'stripped'"):
        what_is_new("ran.", "A fox", "stripped")


def test_a_prefilled_body_leaves_the_other_alone() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    made = prefilled(body, "Ser", "prefix")
    assert made["messages"][1:] == [{"role": "assistant", "content": "Ser", "prefix": True}]
    assert len(body["messages"]) == 1


def test_parameters_of_the_config_go_into_every_call() -> None:
    bodies: list[dict[str, Any]] = []
    endpoint = Endpoint(LLAMA_CPP)

    def handler(body: dict[str, Any], request: Any) -> Any:
        bodies.append(body)
        return endpoint(body, request)

    found = probed(handler, extra_body={"provider": "x"}, omit_params=["seed", "n"])
    assert all(body["provider"] == "x" and not {"seed", "n"} & set(body) for body in bodies)
    assert found["n_max"] == (1, "n is in teacher.omit_params")
    assert found["seed_honoured"][0] is False


@pytest.mark.parametrize("status", [400, 404, 422, 500, 501])
def test_a_failing_extra_only_means_no(status: int) -> None:
    endpoint = Endpoint(OPENAI)

    def handler(body: dict[str, Any], request: Any) -> Any:
        return error_reply(status, "not here") if request.path == "/v1/completions" else endpoint(body, request)

    value, detail = probed(handler)["scoring"]
    assert value == "none"
    assert f"echo: HTTP {status}: not here" in detail


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "invalid_api_key", TeacherRefused),
        (429, "insufficient_quota", TeacherRefused),
        (503, "busy", TransientError),
    ],
)
def test_key_quota_and_a_busy_server_stop_the_probe(status: int, code: str, kind: type[Exception]) -> None:
    endpoint = Endpoint(OPENAI)

    def handler(body: dict[str, Any], request: Any) -> Any:
        return error_reply(status, "no", code) if endpoint.calls == 3 else endpoint(body, request)

    with pytest.raises(kind):
        probed(handler)


def test_an_endpoint_that_answers_nothing_is_refused() -> None:
    with pytest.raises(TeacherRefused, match=r"m answers neither chat nor completions \(HTTP 404: no such model"):
        probed(lambda *_: error_reply(404, "no such model"))


def test_a_base_model_answers_completions_only() -> None:
    endpoint = Endpoint(VLLM)

    def handler(body: dict[str, Any], request: Any) -> Any:
        return endpoint(body, request) if "prompt" in body else error_reply(400, "no chat template")

    found = values(probed(handler))
    assert (found["chat"], found["scoring"], found["prefill"]) == (False, "echo", "none")
    assert set(found) == set(Capabilities.__struct_fields__)


ODD: list[Any] = [
    b"not json",
    [1],
    {},
    {"choices": None},
    {"choices": ["x"]},
    {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": ["part"]}, "logprobs": {"content": [{"token": 1}]}}]},
    {"choices": [{"text": 3, "logprobs": {"tokens": 3}}], "usage": [], "prompt_logprobs": [3, {"a": 1}]},
]


@pytest.mark.parametrize("data", ODD, ids=str)
def test_odd_replies_are_read_as_nothing(data: Any) -> None:
    answer = checks.read(Reply(data if isinstance(data, bytes) else json.dumps(data).encode()))
    assert not any(answer.texts)
    assert answer.tokens == []
    assert bool(answer.no) != bool(answer.choices)
    assert not checks.hides_reasoning(answer)[0]
    assert scores.echoed_tokens(answer.data) == []
    assert all(t.logprob == -math.inf for t in scores.prompt_tokens(answer.data))


def test_logprobs_that_are_all_alike_prove_nothing() -> None:
    sure = [token(word, -0.01) for word in ("a", " b", " c")]
    assert checks.agreement(sure, sure) == (False, "the endpoint's own logprobs are too alike to check it by")


def test_the_last_occurrence_counts() -> None:
    wrote = [token(" a", -1.0), token(" b", -2.0)]
    given = [token(" a", -9.0), token(" b", -9.0), token("x", -1.0), token("Ġa", -1.01), token("▁b", -2.02)]
    assert scores.off_by(wrote, given) == pytest.approx(0.02)


def test_greedy_answers_compare_up_to_where_they_part() -> None:
    first = [token("a", -1.0), token("b", -0.7, ("b", -0.7), ("c", -0.71)), token("d", -3.0)]
    second = [token("a", -1.01), token("c", -0.7, ("c", -0.7), ("b", -0.73)), token("d", -1.0)]
    assert scores.apart(first, second) == pytest.approx(0.03)


def test_the_cut_is_where_the_answer_was_least_sure() -> None:
    words = ["One", " two", " three", " four", " five", " six", "teen", " eight"]
    tokens = [token(word, -0.1 - (word == " four") - 5 * (word == "teen")) for word in words]
    text = "".join(words)
    given = checks.cut(text, tokens)
    assert given == ("One two three", " four five sixteen eight", tokens[3])
    assert checks.cut(text, []) == ("One two three four", " five sixteen eight", None)
    assert checks.cut("Oneword", []) is None


def test_a_reply_without_an_answer_proves_nothing() -> None:
    given = checks.cut("One two three four", [])
    assert given
    assert checks.continues(Answer(no="HTTP 400: no"), given) == (False, "HTTP 400: no")


def project(tmp_path: Path, teacher: dict[str, Any]) -> str:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Hi"}) + "\n")
    config = {
        "run_dir": str(tmp_path / "run"),
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "teacher": teacher,
        "student": {"model": "unused"},
        "onpolicy": {"algorithm": {"name": "relabel"}},
    }
    path = tmp_path / "project.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_the_command_prints_keeps_and_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = Endpoint(VLLM)
    with served(FakeAPI(endpoint)) as api:
        path = project(tmp_path, {"provider": "openai", "model": "m", "base_url": api.url, "api_key_env": None})
        with_password = api.url.replace("//", "//user:hunter2@")
        assert main(["probe", "--config", path, "--teacher.base_url", with_password]) == 2
        refused = capsys.readouterr().err
        assert "holds a user or a password" in refused
        assert "hunter2" not in refused
        assert main(["probe", "--config", path, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["capabilities"]["scoring"] == "prompt_logprobs"
        assert shown["base_url"] == api.url
        endpoint.dialect = OPENAI
        assert main(["probe", "--config", path, "--teacher.capabilities.n_max", "3"]) == 0
        table = capsys.readouterr().out
    assert "scoring\tnone\t" in table
    assert "n_max\t3\tset in teacher.capabilities; found 8 (" in table
    corpus = Corpus(tmp_path / "run" / "corpus.duckdb")
    rows = corpus.rows("SELECT name, value, base_url, detail FROM capabilities WHERE name IN ('scoring', 'n_max')")
    assert sorted((name, json.loads(value)) for name, value, *_ in rows) == [("n_max", 8), ("scoring", "none")]
    assert {url for *_, url, _ in rows} == {api.url}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


def test_what_a_user_says_wins_over_what_was_found_and_that_over_the_defaults(corpus: Corpus) -> None:
    config = hosted("http://a/v1", capabilities={"prefill": "prefix"})
    assert capabilities(corpus, config) == Capabilities(prefill="prefix")
    corpus.set_capabilities("m", "http://a/v1", {"n_max": (4, ""), "prefill": ("none", "")}, run_id=RUN_ID)
    assert capabilities(corpus, config) == Capabilities(prefill="prefix", n_max=4)
    assert capabilities(corpus, hosted("http://b/v1")) == Capabilities()


@pytest.mark.parametrize(
    ("value", "said"), [({"prefil": "prefix"}, "prefil"), ({"scoring": "guess"}, "guess"), ({"n_max": "x"}, "n_max")]
)
def test_a_wrong_override_is_a_config_error(
    value: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project(tmp_path, {"provider": "openai", "model": "m", "capabilities": value})
    assert main(["probe", "--config", path]) == ConfigError.exit_code
    assert said in capsys.readouterr().err


def test_an_older_corpus_gets_the_new_table(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "c.duckdb")
    corpus.rows("DROP TABLE capabilities")
    assert Corpus(corpus.path).capabilities("m", "") == {}


def test_a_scripted_teacher_can_be_probed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--config", project(tmp_path, {"provider": "scripted"}), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["capabilities"]
    assert (found["chat"], found["top_logprobs_max"], found["n_max"]) == (True, 1, 1)
    assert found["scoring"] == "prompt_logprobs"


def test_a_rate_limit_is_no_answer_to_the_question() -> None:
    replies = iter([chat_reply("One two three four five"), error_reply(429, "slow down")])
    with pytest.raises(Exception, match="slow down"):
        probed(lambda *_: next(replies))


PREFIX = ["--onpolicy.algorithm", "{name: prefix}", "--teacher.capabilities", "{n_max: 2}"]
"""An algorithm that depends on what the endpoint can do, which nobody has told."""


def test_a_run_probes_once_and_is_refused_before_anything_else_is_paid(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Corpus(project_file.parent / "run" / "corpus.duckdb")
    calls = "SELECT purpose, count(*) FROM attempts JOIN requests USING (request_key) GROUP BY ALL"
    asked = list[Any]()
    for probes in (1, 0):
        assert main(["run", "--config", str(project_file), *PREFIX]) == 3
        said = capsys.readouterr().err
        assert said.count("probing scripted") == probes
        assert "algorithm prefix: the endpoint is not known to go on with a given text" in said
        asked += corpus.rows(calls)
    assert asked == [("probe", asked[0][1])] * 2


def test_what_another_run_has_probed_meanwhile_counts(project_file: Path) -> None:
    other = ["--run_dir", str(project_file.parent / "other")]
    other += ["--corpus", str(project_file.parent / "run" / "corpus.duckdb")]
    with (
        Project(load_config(Config, str(project_file), overrides(PREFIX))) as ours,
        Project(load_config(Config, str(project_file), overrides([*PREFIX, *other]))) as theirs,
    ):
        theirs.teacher.set_capabilities({"prefill": ("prefix", "tried")})
        asyncio.run(ensure(ours))
        assert ours.corpus.rows("SELECT count(*) FROM attempts") == [(0,)]


@pytest.mark.slow
def test_llama_cpp_really_is_what_the_probe_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project(tmp_path, {"provider": "local", "model": "smollm2", "gguf": GGUF})
    assert main(["probe", "--config", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["capabilities"]
    assert found.pop("determinism_nats") < 1e-3
    assert found == {
        "chat": True, "top_logprobs_max": 100, "has_bytes": True, "token_ids": True, "scoring": "forced",
        "prefill": "assistant_last", "prefill_reply": "whole", "n_max": 4, "seed_honoured": True,
        "temperature_honoured": True,
        "reasoning_hidden": False, "rate_headers": False,
    }  # fmt: skip
