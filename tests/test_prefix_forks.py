"""`prefix` and `forks`: where a draft is cut, what the teacher is shown of it, and what is learnt from the reply."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from blackbox_kd.__main__ import main
from blackbox_kd.algorithms.base import AlgorithmConfig, Outcome
from blackbox_kd.algorithms.cuts import peaks, places
from blackbox_kd.algorithms.forks import ForksConfig
from blackbox_kd.algorithms.prefix import PrefixConfig
from blackbox_kd.align import StudentVocab
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.errors import AlignmentError
from blackbox_kd.sections import SampleConfig, SoftLossConfig, StudentConfig
from blackbox_kd.student.load import end_ids, load_base
from blackbox_kd.student.render import Renderer
from blackbox_kd.student.vocabulary import student_vocab
from blackbox_kd.teachers.base import Capabilities
from blackbox_kd.teachers.local import LocalTeacherConfig
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.prefill import what_is_new
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Rollout, SamplingParams, TopK
from tests.conftest import GGUF, RUN_ID
from tests.fakes import FakeAPI, served
from tests.rollouts import renderer, rollout, tools

__all__ = ["renderer"]  # a fixture

CAN = {"prefill": "assistant_last", "top_logprobs_max": 20, "has_bytes": True}

LLAMA_CPP = {**CAN, "prefill_reply": "whole", "token_ids": True}


@pytest.fixture(scope="module")
def smol() -> Renderer:
    model, tokenizer = load_base(StudentConfig(model=GGUF))
    return Renderer(tokenizer, end_ids(model, tokenizer))


@pytest.fixture
def vocab(renderer: Renderer) -> StudentVocab:
    return student_vocab(renderer.tokenizer, renderer.end_id)


def unsure(one: Rollout, *nats: float) -> Rollout:
    """The student hesitates between two tokens, about as much as told, at the tokens in turn; then not at all."""
    size = len(one.completion_ids)
    p = np.array([*nats, *[0.0] * size][:size]) / 2
    top = TopK(np.tile([5, 6], (size, 1)), np.log(np.maximum(np.stack([1 - p, p], 1), 1e-30)))
    return msgspec.structs.replace(one, top=top)


def drafted(renderer: Renderer, text: str, *nats: float) -> Rollout:
    return unsure(rollout(renderer, "Say 1", text), *nats)


def feedback(
    corpus: Corpus,
    renderer: Renderer,
    rollouts: list[Rollout],
    config: AlgorithmConfig,
    reply: str,
    soft: SoftLossConfig | None = None,
    **can: Any,
) -> Outcome:
    async def ask() -> Outcome:
        teacher = ScriptedTeacherConfig(reply=reply, capabilities=CAN | can)
        async with Teacher(teacher, corpus, RUN_ID, sample=SampleConfig()) as asked:
            return await config.build(tools(asked, renderer, soft=soft)).feedback(rollouts, 1)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("text", "cut"),
    [("one two", ["one"]), ("one, two", ["one", "one,"]), ("yes\nno", ["yes"]), ("one", ["one"]), ("éé ö", ["éé"])],
)
def test_a_draft_is_cut_between_words_and_not_behind_a_space(
    renderer: Renderer, vocab: StudentVocab, text: str, cut: list[str]
) -> None:
    start, *found = [place.text for place in places(drafted(renderer, text), vocab)]
    assert start == ""
    assert [t for t in found if t != text] == [t for t in cut if t != text]
    assert found[-1:] == [text]  # before the end token
    assert all(text.startswith(t) for t in found)


def test_the_cut_is_where_the_student_was_least_sure(renderer: Renderer, vocab: StudentVocab) -> None:
    draft = drafted(renderer, "one two three four", 0.9, 0.1, 0.5, 0.3)  # nothing is cut before the first token
    two = [(p.text, p.token) for p in peaks(draft, vocab, 2)]
    by_entropy = sorted(places(draft, vocab)[1:], key=lambda p: -p.entropy)[:2]
    assert two == sorted(((p.text, p.token) for p in by_entropy), key=lambda p: p[1])
    assert all(p.depth <= 0.5 for p in peaks(draft, vocab, 9, within=0.5))
    assert peaks(draft, vocab, 1, start=True)[0].token == 0


def test_a_draft_is_cut_only_where_its_tokens_spell_its_text(renderer: Renderer, vocab: StudentVocab) -> None:
    one = drafted(renderer, "one two three", 0.5)
    texts = {
        "one too three": ["one"],
        "other": [],
        "one <|im_start|>": ["one"],
        "one two thr\ufffd": ["one", "one two"],
    }
    for text, cut in texts.items():
        other = msgspec.structs.replace(one, completion=msgspec.structs.replace(one.completion, text=text))
        assert [place.text for place in places(other, vocab)] == ["", *cut]
    with pytest.raises(AlignmentError, match="no distribution for each of its"):
        peaks(msgspec.structs.replace(one, top=None), vocab, 1)


@pytest.mark.parametrize(("reply", "kind"), [(" three", "new"), ("{{ text }} three", "whole")])
def test_only_the_continuation_is_learnt_behind_the_students_own_tokens(
    corpus: Corpus, renderer: Renderer, reply: str, kind: str
) -> None:
    draft = drafted(renderer, "one two", 0.0, 0.9)
    outcome = feedback(corpus, renderer, [draft], PrefixConfig(top_logprobs=0), reply, prefill_reply=kind)
    (sample,) = outcome.samples
    learnt = [i for i, w in zip(sample.input_ids, sample.weights["ce"], strict=True) if w]
    assert renderer.decode(learnt) == " three"
    assert learnt[-1] == renderer.end_id
    given = sample.input_ids[: len(sample.input_ids) - len(learnt)]
    assert given[: len(draft.prompt_ids)] == draft.prompt_ids
    before = given[len(draft.prompt_ids) :]
    assert before == draft.completion_ids[: len(before)]
    (said,) = outcome.feedback
    assert (said.kind, said.detail["cut_byte"]) == ("prefix", len(renderer.decode(before).encode()))
    asked = corpus.rows("select purpose, cut_byte, body->'messages'->-1->>'content' from requests")
    assert asked == [("prefix", said.detail["cut_byte"], renderer.decode(before))]


def test_a_reply_of_another_kind_than_probed_is_a_failure(corpus: Corpus, renderer: Renderer) -> None:
    draft = drafted(renderer, "one two three", 0.0, 0.0, 0.9)
    outcome = feedback(corpus, renderer, [draft], PrefixConfig(), "four", prefill_reply="whole")
    assert (outcome.samples, outcome.asked, outcome.failed) == ([], 1, 1)


def test_what_is_new_is_certain_or_refused() -> None:
    assert what_is_new("a b c", "a b", "whole") == " c"
    assert what_is_new(" c", "a b", "new") == " c"
    assert what_is_new("no no", "no", "new") == "no no"
    for text, kind in (("c", "whole"), ("a b c", "new"), ("c", "stripped")):
        with pytest.raises(AlignmentError, match="run `probe` again"):
            what_is_new(text, "a b", kind)  # type: ignore[arg-type]


def test_a_fork_learns_the_teachers_next_token_there_and_nowhere_else(
    corpus: Corpus, renderer: Renderer, vocab: StudentVocab
) -> None:
    draft = drafted(renderer, "one two", 0.0, 0.9, 0.9, 0.9)
    outcome = feedback(corpus, renderer, [draft], ForksConfig(forks=1), "yes no")
    (sample,) = outcome.samples
    (place,) = [i for i, w in enumerate(sample.weights["topk_kl"]) if w]
    (cut,) = peaks(draft, vocab, 1)
    assert place == len(draft.prompt_ids) + cut.token
    assert sample.input_ids == [*draft.prompt_ids, *draft.completion_ids]
    ids = sample.soft.ids[0][np.isfinite(sample.soft.logprobs[0])]
    assert ids.tolist() == vocab.encode("yes")[:1]  # the scripted teacher shows what it takes
    ((logprob,),) = corpus.rows("select token_logprobs[1] from logprobs")
    assert float(sample.soft.logprobs.max()) == pytest.approx(logprob, abs=1e-3)
    assert 0 <= outcome.metrics["overlap_top_k"] <= 1
    assert sum(name.startswith("captured_mass_") for name in outcome.metrics) == 1


def test_a_fork_at_the_start_is_the_plain_question(corpus: Corpus, renderer: Renderer) -> None:
    outcome = feedback(corpus, renderer, [drafted(renderer, "one two", 0.9)], ForksConfig(forks=1), "yes no")
    (sample,) = outcome.samples
    assert sample.weights["topk_kl"].index(1.0) == len(renderer.prompt([{"role": "user", "content": "Say 1"}]))
    asked = corpus.rows("select cut_byte, body->'messages'->-1->>'content' from requests")
    assert asked == [(None, "Say 1")]


def test_more_forks_are_more_labels_in_the_order_of_the_text(corpus: Corpus, renderer: Renderer) -> None:
    drafts = [drafted(renderer, "one two three four", *[0.9] * 9), drafted(renderer, "yes no", *[0.9] * 9)]
    outcome = feedback(corpus, renderer, drafts, ForksConfig(forks=3), "two")
    assert outcome.failed == 0
    labelled = [sum(w > 0 for w in sample.weights["topk_kl"]) for sample in outcome.samples]
    assert labelled == [len(sample.soft.ids) for sample in outcome.samples]
    assert sum(labelled) == outcome.asked == len(outcome.feedback)


@pytest.mark.parametrize("config", [PrefixConfig(), ForksConfig()], ids=lambda config: config.name)
def test_an_endpoint_that_cannot_is_refused_before_anything_is_paid(
    config: AlgorithmConfig, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config.lacking(Capabilities()) is not None
    assert config.lacking(Capabilities(prefill="prefix", top_logprobs_max=5)) is None
    flags = ["--onpolicy.algorithm", f"{{name: {config.name}}}", "--teacher.capabilities", "{prefill: none}"]
    assert main(["onpolicy", "--config", str(trained), *flags]) == 3
    assert "run `probe`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prefix", "forks"])
def test_the_stage_runs_and_asks_about_its_own_samples(project_file: Path, name: str) -> None:
    flags = ["--onpolicy.algorithm", f"{{name: {name}}}", "--teacher.reply", "' two'" if name == "prefix" else "two"]
    flags += ["--sft.trainer.learning_rate", "1e-2", "--sft.trainer.num_train_epochs", "20"]  # it writes words
    for stage in ("sample", "sft", "onpolicy"):
        assert main([stage, "--config", str(project_file), *flags, "--onpolicy.max_failed_feedback", "1"]) == 0
    corpus = project_file.parent / "run" / "corpus.duckdb"
    about = """select count(*), count(completions.completion_id) from requests
               left join completions on completions.completion_id = requests.completion_id
               where requests.purpose in ('prefix', 'fork')"""
    ((asked, found),) = query(corpus, about)[1]
    assert asked == found > 0
    values = query(corpus, "select value from metrics where stage = 'onpolicy' and name = 'topk_kl_count'")[1]
    assert values
    assert all(value > 0 and math.isfinite(value) for (value,) in values)


def test_a_continuation_with_alternatives_is_learnt_softly(corpus: Corpus, renderer: Renderer) -> None:
    draft = drafted(renderer, "one two", 0.0, 0.9)
    outcome = feedback(corpus, renderer, [draft], PrefixConfig(), " yes no")
    (sample,) = outcome.samples
    start = len(sample.input_ids) - len(renderer.completion(" yes no"))
    kinds = list(zip(sample.weights["topk_kl"], sample.weights["ce"], strict=True))
    assert set(kinds[:start]) == {(0.0, 0.0)}
    assert set(kinds[start:]) == {(1.0, 0.0), (0.0, 1.0)}  # each token once; the end has no label here
    assert kinds[-1] == (0.0, 1.0)
    labelled = [i for i, (soft, _) in zip(sample.input_ids, kinds, strict=True) if soft]
    assert labelled == [row[np.isfinite(p)][0] for row, p in zip(sample.soft.ids, sample.soft.logprobs, strict=True)]
    assert 0 < outcome.metrics["coverage"] < 1
    assert outcome.metrics["continuation_length"] == len(sample.input_ids) - start


def test_one_candidate_that_is_renormalised_says_nothing(corpus: Corpus, renderer: Renderer) -> None:
    """The scripted teacher shows one."""
    draft, soft = drafted(renderer, "one two", 0.0, 0.9), SoftLossConfig(tail="renormalise")
    (sample,) = feedback(corpus, renderer, [draft], PrefixConfig(), " yes no", soft).samples
    assert "topk_kl" not in sample.weights
    assert sum(sample.weights["ce"]) == len(renderer.completion(" yes no"))
    outcome = feedback(corpus, renderer, [draft], ForksConfig(forks=1, tail="renormalise"), "yes no")
    assert (outcome.samples, outcome.asked, outcome.failed) == ([], 1, 1)


def test_a_teacher_that_ends_at_once_teaches_the_end(corpus: Corpus, renderer: Renderer) -> None:
    outcome = feedback(corpus, renderer, [drafted(renderer, "one two", 0.0, 0.9)], PrefixConfig(top_logprobs=0), " ")
    (sample,) = outcome.samples
    assert [i for i, w in zip(sample.input_ids, sample.weights["ce"], strict=True) if w] == [renderer.end_id]
    assert outcome.metrics["ended_at_once"] == 1


def test_soft_labels_of_another_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match=r"drawn at 0\.5; set top_logprobs to 0"):
        PrefixConfig(temperature=0.5)
    assert PrefixConfig(temperature=0.5, top_logprobs=0).calls_per_rollout == 1


def test_an_endpoint_that_loses_the_space_is_refused() -> None:
    can = Capabilities(prefill="prefix", prefill_reply="stripped", top_logprobs_max=5)
    for config in (PrefixConfig(), ForksConfig()):
        assert "space" in str(config.lacking(can))


def test_forks_need_alternatives() -> None:
    assert "top_logprobs" in str(ForksConfig().lacking(Capabilities(prefill="prefix")))


def next_token(renderer: Renderer, corpus: Corpus, draft: Rollout, reply: dict[str, Any]) -> Outcome:
    """One fork, answered by an endpoint that always says this."""

    async def ask(url: str) -> Outcome:
        teacher = OpenAITeacherConfig(model="m", base_url=url, api_key_env=None, capabilities=CAN)
        async with Teacher(teacher, corpus, RUN_ID) as asked:
            return await ForksConfig(forks=1).build(tools(asked, renderer)).feedback([draft], 1)

    with served(FakeAPI(lambda *_: reply)) as api:
        return asyncio.run(ask(api.url))


def choice(text: str, tokens: list[tuple[str, float]], finish: str = "length", shown: int = 1) -> dict[str, Any]:
    """A reply of `shown` tokens, the first of the alternatives each time."""
    entries = [{"token": t, "logprob": v, "bytes": list(t.encode())} for t, v in tokens]
    content = [{**entries[0], "top_logprobs": entries}] * shown
    return {"model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 1},
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                         "finish_reason": finish, "logprobs": {"content": content}}]}  # fmt: skip


def test_the_teachers_end_is_the_students_end(corpus: Corpus, renderer: Renderer) -> None:
    draft = drafted(renderer, "one two", 0.0, 0.9)
    outcome = next_token(renderer, corpus, draft, choice("", [("</s>", -0.1), (" yes", -2.5)], "stop"))
    (sample,) = outcome.samples
    found = dict(zip(sample.soft.ids[0].tolist(), sample.soft.logprobs[0].tolist(), strict=True))
    assert found[renderer.end_id] == pytest.approx(-0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (choice("yes", [("yes", -3.0), ("no", -0.1)]), "not the likeliest"),
        (choice("yes", [("no", -0.1)]), "spells b'no'"),
        (choice("yes yes", [("yes", -0.1)], shown=2), "2 tokens with alternatives"),
        (choice("one two yes", [(" yes", -0.1)]), "new in its text is 'one two yes'"),
    ],
    ids=["not greedy", "another token", "two tokens", "repeated"],
)
def test_logprobs_of_another_place_are_refused(
    corpus: Corpus, renderer: Renderer, capsys: pytest.CaptureFixture[str], reply: dict[str, Any], said: str
) -> None:
    outcome = next_token(renderer, corpus, drafted(renderer, "one two", 0.0, 0.0, 0.0, 0.9), reply)
    assert (outcome.samples, outcome.asked, outcome.failed, outcome.metrics) == ([], 1, 1, {})
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_llama_cpp_goes_on_and_shows_the_next_token_only(corpus: Corpus, smol: Renderer) -> None:
    """Its greedy answer, cut anywhere, goes on with the tokens and logprobs that it had."""
    config = LocalTeacherConfig(model="smollm2", gguf=GGUF, capabilities=LLAMA_CPP)
    draft = rollout(smol, "Name three colours.", "Red, green and")

    async def ask() -> tuple[Outcome, Outcome, Completion]:
        async with Teacher(config, corpus, RUN_ID) as teacher:
            whole = teacher.request(draft.prompt, "sample", SamplingParams(temperature=0, top_logprobs=20))
            (answer,) = (await teacher.answers([whole])).values()
            own = unsure(rollout(smol, "Name three colours.", answer.text), *[0.9] * 99)
            forks = await ForksConfig(forks=6).build(tools(teacher, smol)).feedback([own], 1)
            prefix = await PrefixConfig().build(tools(teacher, smol)).feedback([unsure(draft, 0, 0, 0.9)], 1)
            return forks, prefix, answer

    forks, prefix, answer = asyncio.run(ask())
    assert (forks.failed, prefix.failed) == (0, 0)
    assert answer.logprobs
    (sample,) = forks.samples
    start = len(smol.prompt(draft.prompt.messages))
    for at, ids, logprobs in zip(np.flatnonzero(sample.weights["topk_kl"]), *sample.soft, strict=True):
        token = answer.logprobs[int(at) - start]
        assert ids[logprobs.argmax()] == token.id == sample.input_ids[at]
        assert logprobs.max() == pytest.approx(token.logprob, abs=0.02)
    (learnt,) = prefix.samples
    assert smol.decode(learnt.input_ids[len(draft.prompt_ids) :]).startswith("Red")
    assert prefix.metrics["coverage"] == 1  # the end too: one tokenizer on both sides
