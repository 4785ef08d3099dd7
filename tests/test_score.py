"""`score` against a real, small language model in every dialect that scores given tokens; and spans by brute force."""

from __future__ import annotations

import asyncio
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from msgspec.structs import replace

from blackbox_kd.algorithms.base import Outcome
from blackbox_kd.algorithms.score import ScoreConfig, bounded
from blackbox_kd.align import Aligner
from blackbox_kd.align.spans import common_spans
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import BudgetExhausted, ConfigError, TeacherError, TeacherRefused
from blackbox_kd.student.render import Renderer
from blackbox_kd.teachers import scores
from blackbox_kd.teachers.base import Capabilities, TeacherConfig
from blackbox_kd.teachers.budget import BudgetConfig
from blackbox_kd.teachers.local import LocalTeacherConfig
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Completion, Rollout, SamplingParams, TeacherTokens, TopK
from tests.conftest import GGUF, RUN_ID
from tests.fakes import error_reply, served
from tests.records import prompt, token
from tests.rollouts import renderer, rollout, tools
from tests.speaking import LanguageModel, SpeakingAPI
from tests.tiny import make_tiny
from tests.vocabularies import (
    StudentTokenizer,
    TeacherVocab,
    deepseek,
    deepseek_student,
    mistral,
    mistral_student,
    scored,
    smollm2,
    tekken,
)

__all__ = ["renderer"]  # a fixture

WAY = {"vllm": "prompt_logprobs", "together": "echo", "fireworks": "echo", "sglang": "generate", "llama.cpp": "forced"}
K = 5


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokens are single bytes: what it writes is always what its tokenizer would make of it."""
    return make_tiny(tmp_path_factory.mktemp("letters"), seed=3, vocab_size=258)


@pytest.fixture(scope="module")
def lm(letters: Path) -> LanguageModel:
    return LanguageModel(letters)


@pytest.fixture(scope="module")
def byte_renderer(letters: Path) -> Renderer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(letters)
    return Renderer(tokenizer, [tokenizer.eos_token_id])


def teacher_config(api: SpeakingAPI, folder: Path | None = None, **options: Any) -> OpenAITeacherConfig:
    given = {"model": "m", "base_url": api.url, "api_key_env": None, "tokenizer": folder and str(folder),
             "capabilities": {"scoring": WAY[api.dialect], "top_logprobs_max": 20}}  # fmt: skip
    return OpenAITeacherConfig(**given | options)


def feedback(
    corpus: Corpus, renderer: Renderer, rollouts: list[Rollout], teacher: TeacherConfig,
    caps: BudgetConfig | None = None, **config: Any,
) -> Outcome:  # fmt: skip
    async def ask() -> Outcome:
        async with Teacher(teacher, corpus, RUN_ID, caps=caps) as asked:
            algorithm = ScoreConfig(**{"top_logprobs": K, "alpha": 1} | config).build(tools(asked, renderer))
            return await algorithm.feedback(rollouts, 1)

    return asyncio.run(ask())


def truth(lm: LanguageModel, one: Rollout) -> list[tuple[int, int, float]]:
    """(first byte, last byte, log p) of each of the model's own tokens in a text and the token that ends it."""
    before, found, at = lm.ids(lm.prompt(one.prompt.messages)), [], 0
    for i in [*lm.ids(one.completion.text), lm.end]:
        size = 0 if i == lm.end else len(lm.tokenizer.decode([i]).encode())
        found.append((at, at + size, lm.shown(before, i)["logprob"]))
        before, at = [*before, i], at + size
    return found


def advantages(lm: LanguageModel, renderer: Renderer, one: Rollout) -> list[float]:
    """By brute force: of each student token, all of the model's inside the shortest run that both cut alike."""
    teacher, at, places = truth(lm, one), 0, []
    for i in one.completion_ids:
        size = 0 if i == renderer.end_id else len(renderer.tokenizer.decode([i]).encode())
        places.append((at, at + size))
        at += size
    cuts = sorted({start for start, _ in places} & {start for start, _, _ in teacher} | {at})
    found = []
    for start, end in places:
        lo, hi = max(c for c in cuts if c <= start), min([c for c in cuts if c >= end and c > start] or [end])
        if start == end:
            found.append(teacher[-1][2] - one.logprobs[-1])
            continue
        own = sum(p for (s, e), p in zip(places, one.logprobs, strict=True) if lo <= s and e <= hi and e > s)
        found.append(sum(p for s, e, p in teacher if lo <= s and e <= hi and e > s) - own)
    return found


@pytest.mark.parametrize("dialect", WAY)
def test_every_dialect_gives_the_logprobs_of_the_model_itself(
    dialect: str, corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel, letters: Path
) -> None:
    """Same tokenizer: an advantage is the exact difference of two logprobs, and the labels are its likeliest tokens."""
    rollouts = [rollout(byte_renderer, f"Say {i}", text) for i, text in enumerate(["one (two)", "yes", "no no"])]
    with served(SpeakingAPI(lm, dialect)) as api:
        config = teacher_config(api, None if dialect == "llama.cpp" else letters)
        outcome = feedback(corpus, byte_renderer, rollouts, config)
        soft = feedback(corpus, byte_renderer, rollouts, config, loss="kl")
    assert (outcome.asked, outcome.failed) == (3, 0)
    for one, sample in zip(rollouts, outcome.samples, strict=True):
        expected = [p - q for (_, _, p), q in zip(truth(lm, one), one.logprobs, strict=True)]
        assert sample.weights["pg"] == pytest.approx([0.0] * len(one.prompt_ids) + expected, abs=1e-3)
        assert sample.logprobs["old"][len(one.prompt_ids) :] == one.logprobs
    for one, sample in zip(rollouts, soft.samples, strict=True):
        assert sample.weights["topk_kl"] == [0.0] * len(one.prompt_ids) + [1.0] * len(one.completion_ids)
        for row, i in enumerate(range(len(one.prompt_ids), len(sample.input_ids))):
            shown = lm.with_top(sample.input_ids[:i], sample.input_ids[i], K)
            expected = {t["id"]: t["logprob"] for t in [shown, *shown["top_logprobs"]] if t["logprob"] > -20}
            got = dict(zip(sample.soft.ids[row].tolist(), sample.soft.logprobs[row].tolist(), strict=True))
            got = {i: p for i, p in got.items() if p > -20}
            assert got == pytest.approx(expected, abs=2e-3)
    assert outcome.metrics["coverage"] == outcome.metrics["one_to_one"] == 1.0
    weights = np.concatenate(
        [s.weights["pg"][len(r.prompt_ids) :] for r, s in zip(rollouts, outcome.samples, strict=True)]
    )
    assert outcome.metrics["reverse_kl"] == pytest.approx(-weights.mean(), abs=1e-9)
    assert 0 < outcome.metrics["captured_mass_first"] <= 1.01


@pytest.mark.parametrize("dialect", WAY)
def test_with_another_tokenizer_runs_of_the_same_bytes_are_compared(
    dialect: str, corpus: Corpus, renderer: Renderer, lm: LanguageModel, letters: Path
) -> None:
    rollouts = [rollout(renderer, "Say 1", "one two three four, (x)"), rollout(renderer, "Say 2", "yes no")]
    assert len(rollouts[0].completion_ids) < len("one two three four, (x)")
    with served(SpeakingAPI(lm, dialect)) as api:
        config = teacher_config(api, None if dialect == "llama.cpp" else letters)
        outcome = feedback(corpus, renderer, rollouts, config)
    for one, sample in zip(rollouts, outcome.samples, strict=True):
        expected = advantages(lm, renderer, one)
        assert sample.weights["pg"][len(one.prompt_ids) :] == pytest.approx(expected, abs=2e-2)
    assert outcome.metrics["coverage"] == 1.0
    assert outcome.metrics["one_to_one"] < 1.0


def test_a_run_of_several_student_tokens_shares_or_repeats_its_advantage(
    corpus: Corpus, byte_renderer: Renderer, tmp_path: Path
) -> None:
    folder = make_tiny(tmp_path / "words", seed=3)
    words, one = LanguageModel(folder), rollout(byte_renderer, "Say 1", "three")
    pieces = len(words.ids("three"))
    assert pieces < len("three")
    whole, even = (_by_hand(byte_renderer, words, one, corpus, spread) for spread in ("whole", "even"))
    expected = advantages(words, byte_renderer, one)
    assert whole == pytest.approx(expected, abs=1e-2)
    runs = [whole.count(value) for value in whole]
    assert even == pytest.approx([value / size for value, size in zip(whole, runs, strict=True)])


def _by_hand(renderer: Renderer, lm: LanguageModel, one: Rollout, corpus: Corpus, spread: str) -> list[float]:
    """Through the algorithm, with the scores put into the corpus: this model would not pass for what it writes."""
    from blackbox_kd.algorithms.score import Score

    class Known(Teacher):
        async def score(self, items: Any, *, top: int, round_: int = 0) -> dict[str, TeacherTokens]:
            ids = [*lm.ids(one.completion.text), lm.end]
            values = np.array([p for _, _, p in truth(lm, one)])
            none = np.zeros((len(ids), 0))
            return {one.completion.completion_id: TeacherTokens(np.array(ids), values, none.astype(int), none)}

    from blackbox_kd.corpus.ingest import insert

    with corpus.connect() as con:
        rows = [{"model": "m", "token_id": i, "text": lm.tokenizer.decode([i]), "bytes": None}
                for i in range(len(lm.tokenizer))]  # fmt: skip
        insert(con, "vocab", rows)
    teacher = Known(OpenAITeacherConfig(model="m", api_key_env=None), corpus, RUN_ID)
    algorithm: Score = ScoreConfig(alpha=1, spread=spread).build(tools(teacher, renderer))
    (sample,) = asyncio.run(algorithm.feedback([one], 1)).samples
    return sample.weights["pg"][len(one.prompt_ids) :]


@pytest.mark.parametrize("dialect", WAY)
def test_nothing_is_asked_twice(
    dialect: str, corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel, letters: Path
) -> None:
    rollouts = [rollout(byte_renderer, f"Say {i}", "one") for i in range(2)]
    corpus.add_completions([r.completion for r in rollouts], scorer="s@p", run_id=RUN_ID)
    with served(SpeakingAPI(lm, dialect)) as api:
        config = teacher_config(api, None if dialect == "llama.cpp" else letters)
        first = feedback(corpus, byte_renderer, rollouts, config)
        asked = len(api.asked_paths)
        again = feedback(corpus, byte_renderer, rollouts, config)
        assert len(api.asked_paths) == asked
    assert [s.weights for s in again.samples] == [s.weights for s in first.samples]
    keys = corpus.rows("SELECT count(*), count(DISTINCT request_key) FROM requests WHERE purpose = 'score'")
    assert keys == [(2, 2)]
    calls = corpus.rows("SELECT count(*) FROM attempts JOIN requests USING (request_key) WHERE purpose = 'score'")
    assert calls == [(2 * (len("one") + 1) if dialect == "llama.cpp" else 2,)]
    rows = corpus.rows("SELECT completion_id::VARCHAR, scorer FROM logprobs ORDER BY ALL")
    assert {i for i, _ in rows} == {r.completion.completion_id for r in rollouts}
    assert {by.split("@")[0] for _, by in rows} == {"m"}
    assert corpus.rows("SELECT count(*) FROM pending") == [(0,)]
    assert corpus.rows("SELECT DISTINCT billed FROM attempts") == [(True,)]
    assert corpus.rows("SELECT min(prompt_tokens) > 0 FROM attempts") == [(True,)]


def test_the_same_text_of_a_later_round_is_answered_from_the_corpus(
    corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel
) -> None:
    one = rollout(byte_renderer, "Say 1", "one")
    later = rollout(byte_renderer, "Say 1", "one")
    later = replace(later, completion=replace(later.completion, request_key="00000000-0000-4000-8000-00000000000a"))
    with served(SpeakingAPI(lm, "vllm")) as api:
        first = feedback(corpus, byte_renderer, [one], teacher_config(api))
        asked = len(api.asked_paths)
        second = feedback(corpus, byte_renderer, [later], teacher_config(api))
        assert len(api.asked_paths) == asked
    assert first.samples[0].weights == second.samples[0].weights
    assert first.samples[0].sample_id != second.samples[0].sample_id


@pytest.mark.parametrize("dialect", WAY)
def test_scores_of_other_tokens_are_not_believed(
    dialect: str, corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel, letters: Path
) -> None:
    with served(SpeakingAPI(lm, dialect, shift=1)) as api:
        config = teacher_config(api, None if dialect == "llama.cpp" else letters)
        with pytest.raises(TeacherRefused, match="gives other logprobs when it scores") as raised:
            feedback(corpus, byte_renderer, [rollout(byte_renderer, "Say 1", "one")], config)
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value)
    assert corpus.rows("SELECT count(*) FROM logprobs") == [(0,)]


def test_another_template_is_not_believed(corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel) -> None:
    one = rollout(byte_renderer, "Say 1", "one")
    refused = pytest.raises(TeacherRefused, match="other logprobs when it scores")
    with served(SpeakingAPI(lm, "llama.cpp", template=False)) as api, refused:
        feedback(corpus, byte_renderer, [one], teacher_config(api))


def test_the_probe_finds_sglangs_own_endpoint(corpus: Corpus, lm: LanguageModel) -> None:
    from blackbox_kd.teachers.probe import probe

    async def ask(config: TeacherConfig) -> dict[str, tuple[Any, str]]:
        async with Teacher(config, corpus, RUN_ID) as teacher:
            return await probe(config, teacher.engine.call)

    with served(SpeakingAPI(lm, "sglang")) as api:
        value, why = asyncio.run(ask(teacher_config(api)))["scoring"]
        shifted = SpeakingAPI(lm, "sglang", shift=1)
    assert value == "generate", why
    with served(shifted) as api:
        assert asyncio.run(ask(teacher_config(api)))["scoring"][0] == "none"


@pytest.mark.parametrize("transport", ["fast", "openai"])
def test_both_transports_find_what_lies_beside_v1(
    transport: str, corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel, letters: Path
) -> None:
    with served(SpeakingAPI(lm, "sglang")) as api:
        config = teacher_config(api, letters, transport=transport)
        outcome = feedback(corpus, byte_renderer, [rollout(byte_renderer, "Say 1", "one")], config)
    assert len(outcome.samples) == 1
    assert api.asked_paths[-1] == "/generate"


def test_raw_text_needs_a_template(corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel, tmp_path: Path) -> None:
    one = rollout(byte_renderer, "Say 1", "one")
    with served(SpeakingAPI(lm, "together")) as api:
        with pytest.raises(ConfigError, match=r"teacher\.tokenizer: m scores raw text"):
            feedback(corpus, byte_renderer, [one], teacher_config(api))
        with pytest.raises(ConfigError, match=r"teacher\.tokenizer: cannot load"):
            feedback(corpus, byte_renderer, [one], teacher_config(api, tmp_path / "none"))


def test_what_cannot_be_scored_is_dropped_and_counted(
    corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel
) -> None:
    """Special tokens in a text are data."""
    rollouts = [rollout(byte_renderer, f"Say {i}", t) for i, t in enumerate(["one", "a<|im_start|>b"])]
    with served(SpeakingAPI(lm, "llama.cpp")) as api:
        outcome = feedback(corpus, byte_renderer, rollouts, teacher_config(api))
    assert (outcome.asked, outcome.failed, len(outcome.samples)) == (2, 1, 1)


@pytest.mark.parametrize("dialect", WAY)
def test_nothing_and_blanks_are_answers_too(
    dialect: str, corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel, letters: Path
) -> None:
    """Else a student that says nothing would never hear that this is no answer."""
    rollouts = [rollout(byte_renderer, f"Say {i}", text) for i, text in enumerate(["", "  ", "\n", "user"])]
    with served(SpeakingAPI(lm, dialect)) as api:
        config = teacher_config(api, None if dialect == "llama.cpp" else letters)
        outcome = feedback(corpus, byte_renderer, rollouts, config)
    for one, sample in zip(rollouts, outcome.samples, strict=True):
        expected = [p - q for (_, _, p), q in zip(truth(lm, one), one.logprobs, strict=True)]
        assert sample.weights["pg"][len(one.prompt_ids) :] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("dialect", ["vllm", "llama.cpp"])
def test_the_budget_counts_every_call(dialect: str, corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel) -> None:
    rollouts = [rollout(byte_renderer, f"Say {i}", "one two") for i in range(4)]
    checks = 2 if dialect == "vllm" else 18
    with served(SpeakingAPI(lm, dialect)) as api, pytest.raises(BudgetExhausted):
        feedback(
            corpus,
            byte_renderer,
            rollouts,
            teacher_config(api, concurrency=1),
            BudgetConfig(max_requests=checks + 2),
        )
    assert corpus.rows("SELECT count(*) FROM attempts") == [(checks + 2,)]


def test_a_call_that_fails_is_asked_again_alone(corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel) -> None:
    api, busy = SpeakingAPI(lm, "llama.cpp"), [28]
    answer = api.answer

    def failing(body: dict[str, Any], request: Any) -> Any:
        if request.path == "/v1/completions" and len(api.asked_paths) > busy[0]:
            busy[0] = 10**6
            return error_reply(500, "once")
        return answer(body, request)

    api.handler = failing
    with served(api):
        outcome = feedback(corpus, byte_renderer, [rollout(byte_renderer, "Say 1", "one two")], teacher_config(api))
    assert outcome.failed == 0
    found = corpus.rows(
        "SELECT status, count(*) FROM attempts JOIN requests USING (request_key) WHERE purpose = 'score' GROUP BY 1"
    )
    assert sorted(found) == [(200, len("one two") + 1), (500, 1)]


def test_an_answer_that_was_cut_off_has_no_end_to_learn(
    corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel
) -> None:
    one = rollout(byte_renderer, "Say 1", "one two")
    cut = replace(one, completion_ids=one.completion_ids[:-1], logprobs=one.logprobs[:-1])
    with served(SpeakingAPI(lm, "vllm")) as api:
        whole, short = (feedback(corpus, byte_renderer, [each], teacher_config(api)) for each in (one, cut))
    assert short.samples[0].weights["pg"] == whole.samples[0].weights["pg"][:-1]
    assert short.metrics["coverage"] == 1.0


def test_overlap_is_with_the_students_own_likeliest(corpus: Corpus, byte_renderer: Renderer, lm: LanguageModel) -> None:
    one = rollout(byte_renderer, "Say 1", "one")
    size = len(one.completion_ids)
    before = [[*one.prompt_ids, *one.completion_ids[:i]] for i in range(size)]
    shown = [lm.with_top(ids, i, K)["top_logprobs"] for ids, i in zip(before, one.completion_ids, strict=True)]
    same = TopK(*(np.array([[top[name] for top in row] for row in shown]) for name in ("id", "logprob")))
    other = TopK(np.full((size, 1), 300), np.zeros((size, 1)))
    with served(SpeakingAPI(lm, "vllm")) as api:
        found = [feedback(corpus, byte_renderer, [replace(one, top=top)], teacher_config(api)).metrics
                 for top in (same, other, None)]  # fmt: skip
    assert 0.8 < found[0]["overlap_top_k"] <= 1.0  # the label of an unlikely drawn token is one more
    assert found[1]["overlap_top_k"] == 0.0
    assert "overlap_top_k" not in found[2]


def test_the_bound() -> None:
    ratios = np.array([-50.0, -1.0, 0.0, 3.0])
    assert bounded(ratios, 1.0) is ratios
    assert bounded(ratios, 0.9)[0] == pytest.approx(math.log(0.1))
    assert bounded(ratios, 0.9) == pytest.approx(np.log(0.9 * np.exp(ratios) + 0.1))
    assert bounded(ratios, 0.9)[2] == pytest.approx(0.0)


def test_what_is_lacking() -> None:
    assert "cannot score" in str(ScoreConfig().lacking(Capabilities()))
    assert ScoreConfig().lacking(Capabilities(scoring="echo")) is None
    assert "top_logprobs_max" in str(ScoreConfig(loss="kl").lacking(Capabilities(scoring="echo")))
    assert ScoreConfig(loss="kl").lacking(Capabilities(scoring="forced", top_logprobs_max=5)) is None
    assert ScoreConfig(loss="kl", beta=0.5).losses == {"topk_kl": {"beta": 0.5}}
    assert ScoreConfig(clip=None).losses == {"pg": {"clip": None}}


@pytest.mark.parametrize(
    ("tokens", "text", "found"),
    [
        (["a", "b", "<e>"], "b", ["b", "<e>"]),
        (["b", "<e>", "b", "<e>", "\n"], "b", ["b", "<e>"]),
        (["x", "a", "b"], "ab", None),  # nothing behind it
        (["xa", "b", "<e>"], "ab", None),  # begins inside a token
        (["a", "bc", "<e>"], "ab", None),
        (["\u0120a", "\u0120b", ""], " a b", ["\u0120a", "\u0120b", ""]),
        (["n", "a\ufffd", "\ufffd", "v", "<e>"], "na\u00efv", ["n", "a\ufffd", "\ufffd", "v", "<e>"]),
        (["n", "a", "", "\u00ef", "v", "<e>"], "na\u00efv", ["n", "a", "", "\u00ef", "v", "<e>"]),
        (["h", "", "\u00ef", "v", "<e>"], "\u00efv", None),  # whose is the empty one?
        (["a(b", "<e>"], "a(b", ["a(b", "<e>"]),
    ],
)
def test_the_tokens_of_a_text_are_found_whole_or_not_at_all(
    tokens: list[str], text: str, found: list[str] | None
) -> None:
    given = [token(t, -1.0) for t in tokens]
    got = scores.of_text(given, text)
    assert (got and [t.token for t in got]) == found
    if found:
        assert scores.of_text(given, text, token(found[-1], -1.0)) == got
        assert scores.of_text(given, text, token("</s>", -1.0)) is None


def test_a_text_is_followed_by_its_end() -> None:
    given = [token(t, -float(i)) for i, t in enumerate(["b", "<e>", "b", "\n", "b", "<e>", "\n", "\n"])]
    end = token("<e>", 0.0)
    assert scores.of_text(given, "b", end) == given[4:6]
    assert scores.of_text(given, "b") == given[4:6]
    assert scores.of_text(given, "", end) == given[5:6]
    assert scores.of_text(given, "\n", end) is None
    assert scores.of_text([*given, end], "\n", end) == [given[-1], end]


TEXTS = [
    "The na\u00efve lighthouse-keeper paid \u20ac12.50.",
    "  def f(x):\n\treturn x**2",
    "\u4e16\u754c \U0001f642 ok",
    "I can't",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("student", [smollm2, deepseek_student, mistral_student])
@pytest.mark.parametrize("teacher", [mistral, tekken, deepseek])
def test_spans_are_the_runs_between_all_common_cuts(teacher: Any, student: Any, text: str) -> None:
    """By brute force: prefixes of one tokenisation whose bytes are those of a prefix of the other."""
    of_teacher: TeacherVocab = teacher()
    of_student: StudentTokenizer = student()
    given = text.strip() if teacher is mistral or student is mistral_student else text
    ids = [*of_teacher.encode(given), of_teacher.end_id]
    own = of_student.encode(given)
    aligner = Aligner(of_teacher.vocab, of_student.vocab, end_ids={of_teacher.end_id})
    spans = aligner.spans(given, scored(ids, vocab_size=1000, top=0), own)

    def prefixes(pieces: list[bytes]) -> list[bytes]:
        return [b"".join(pieces[:n]).removeprefix(b" " if dummy(pieces) else b"") for n in range(len(pieces) + 1)]

    def dummy(pieces: list[bytes]) -> bool:
        return b"".join(pieces) == b" " + given.encode()

    of = prefixes([of_teacher.vocab[i].bytes or b"" for i in ids[:-1]])
    to = prefixes([of_student.vocab.spelled[i] or b"" for i in own[:-1]])
    shared = sorted(set(of) & set(to), key=len)
    expected = [((to.index(a), to.index(b)), (of.index(a), of.index(b))) for a, b in pairwise(shared)]
    expected.append(((len(own) - 1, len(own)), (len(ids) - 1, len(ids))))
    assert [((s.start, s.stop), (t.start, t.stop)) for s, t in spans] == expected
    assert spans[0].student.start == spans[0].teacher.start == 0


def test_spans_need_common_cuts() -> None:
    spans = common_spans(np.array([0, 2, 4, 6]), np.array([0, 3, 4, 4, 9]), 6)
    assert [(s.start, s.stop, t.start, t.stop) for s, t in spans] == [(0, 2, 0, 2), (2, 3, 2, 4)]
    assert common_spans(np.array([0]), np.array([], int), 3) == []


def smollm2_teacher() -> TeacherConfig:
    return LocalTeacherConfig(model="smollm2", gguf=GGUF, capabilities={"scoring": "forced", "top_logprobs_max": 20})


@pytest.mark.slow
def test_llama_cpp_scores_answers_as_it_wrote_them(corpus: Corpus) -> None:
    """Drawn at temperature 1, under a system message, end tokens included; then as if a student had written them."""
    questions = ("Name a colour.", "Say na\u00efve \u4e16 to me, please.")
    prompts = [
        prompt(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}])
        for text in questions
    ]

    async def ask() -> list[tuple[Completion, TeacherTokens]]:
        async with Teacher(smollm2_teacher(), corpus, RUN_ID) as teacher:
            sampling = SamplingParams(max_completion_length=24, top_logprobs=3)
            requests = [teacher.request(each, "sample", sampling) for each in prompts]
            wrote = await teacher.answers(requests)
            copies = [
                (p, replace(wrote[r.request_key], author="student")) for p, r in zip(prompts, requests, strict=True)
            ]
            scored_tokens = await teacher.score(copies, top=3)
            return [(copy, scored_tokens[copy.completion_id]) for _, copy in copies]

    compared = 0
    for completion, tokens in asyncio.run(ask()):
        wrote = [(t.id, t.logprob) for t in completion.logprobs or []]
        ids = tokens.token_ids.tolist()
        if [i for i, _ in wrote] not in (ids, ids[:-1]):  # drawn in other pieces than the tokenizer's
            continue
        compared += len(wrote)
        assert tokens.token_logprobs[: len(wrote)] == pytest.approx([p for _, p in wrote], abs=2e-3)
        assert tokens.top_ids.shape == (len(ids), 3)
    assert compared > 10


@pytest.mark.slow
def test_llama_cpp_scores_nearly_as_the_model_in_process(corpus: Corpus) -> None:
    """One tokenizer; the activations of llama.cpp are quantised, those of torch are not."""
    from blackbox_kd.sections import StudentConfig
    from blackbox_kd.student.student import Student

    student = Student(StudentConfig(model=GGUF, device="cpu"))
    one = rollout(student.renderer, "What is the capital of France?", "The capital of France is Paris, on the Seine.")
    (own,) = student.logprobs([student.renderer.join(one.prompt_ids, one.completion_ids)], batch_size=1)
    outcome = feedback(corpus, student.renderer, [replace(one, logprobs=own)], smollm2_teacher())
    (sample,) = outcome.samples
    assert sum(w != 0 for w in sample.weights["pg"]) > 8
    assert np.abs(sample.weights["pg"]).mean() < 0.05
    assert abs(outcome.metrics["reverse_kl"]) < 0.05
    assert outcome.metrics["one_to_one"] == 1.0


class Forced:
    """Forced decoding of one rollout, one call at a time; `stop_at` has the endpoint refuse the call after so many."""

    def __init__(self, lm: LanguageModel, renderer: Renderer, corpus: Corpus) -> None:
        self.one, self.api = rollout(renderer, "Say 1", "some"), SpeakingAPI(lm, "llama.cpp")
        self.corpus, self.speak = corpus, self.api.handler
        self.rendered = lm.ids(lm.prompt(self.one.prompt.messages))
        self.folder = corpus.path.with_name(corpus.path.name + ".partial")

    @property
    def calls(self) -> list[tuple[int, ...]]:
        """Prompts of the calls about the rollout, not those of the self-check."""
        forced = [tuple(body["prompt"]) for body in self.api.bodies if "logit_bias" in body]
        return [ids for ids in forced if list(ids[: len(self.rendered)]) == self.rendered]

    def stop_at(self, count: int, answer: Any = None) -> None:
        def handler(body: dict[str, Any], request: Any) -> Any:
            if len(self.calls) != count:
                return self.speak(body, request)
            return answer(body, request) if answer else error_reply(401, "no")

        self.api.handler = handler

    def ask(self) -> TeacherTokens | None:
        async def score() -> TeacherTokens | None:
            config = teacher_config(self.api, concurrency=1, retry_dead_letters=True, max_retries=0)
            async with Teacher(config, self.corpus, RUN_ID) as teacher:
                found = await teacher.score([(self.one.prompt, self.one.completion)], top=2)
                return found.get(self.one.completion.completion_id)

        self.api.bodies.clear()
        return asyncio.run(score())


@pytest.fixture
def forced(lm: LanguageModel, byte_renderer: Renderer, corpus: Corpus) -> Forced:
    return Forced(lm, byte_renderer, corpus)


def test_calls_that_were_answered_before_a_kill_are_not_made_again(lm: LanguageModel, forced: Forced) -> None:
    """Twice forced decoding ends after some calls of a question, and half a line of what was kept is torn."""
    answered: list[tuple[int, ...]] = []
    with served(forced.api):
        for _ in range(2):
            forced.stop_at(2)
            with pytest.raises(TeacherRefused):
                forced.ask()
            answered += forced.calls[:1]
            (kept,) = forced.folder.iterdir()
            with kept.open("ab") as file:
                file.write(b'"half of')
        forced.api.handler = forced.speak
        tokens = forced.ask()
    assert tokens is not None
    assert len({*answered, *forced.calls}) == len(answered) + len(forced.calls) == len("some") + 1
    assert tokens.token_logprobs == pytest.approx([p for _, _, p in truth(lm, forced.one)], abs=2e-3)
    assert not kept.exists()


def test_what_another_place_said_is_not_mixed_in(
    forced: Forced, byte_renderer: Renderer, tmp_path: Path, corpus: Corpus
) -> None:
    other = LanguageModel(make_tiny(tmp_path / "other", seed=11, vocab_size=258))
    with served(forced.api):
        forced.stop_at(3)
        with pytest.raises(TeacherRefused):
            forced.ask()
    elsewhere = Forced(other, byte_renderer, corpus)
    with served(elsewhere.api):
        tokens = elsewhere.ask()
    assert tokens is not None
    assert tokens.token_logprobs == pytest.approx([p for _, _, p in truth(other, forced.one)], abs=2e-3)


def unbiased(forced: Forced) -> Any:
    return lambda body, request: forced.speak({**body, "logit_bias": {str(65): 100}}, request)


def garbage(_: Forced) -> Any:
    return lambda body, request: web.Response(text="<html>busy</html>")


@pytest.mark.parametrize("wrong", [unbiased, garbage])
def test_a_wrong_reply_in_the_middle_is_not_kept_for_ever(lm: LanguageModel, forced: Forced, wrong: Any) -> None:
    with served(forced.api):
        forced.stop_at(2, wrong(forced))
        with pytest.raises(TeacherError):
            forced.ask()
        forced.api.handler = forced.speak
        tokens = forced.ask()
    assert tokens is not None
    assert tokens.token_logprobs == pytest.approx([p for _, _, p in truth(lm, forced.one)], abs=2e-3)
