"""`label`: the teacher's top-k out of a real corpus, in the student's tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from blackbox_kd.align import SoftLabels
from blackbox_kd.corpus import Corpus
from blackbox_kd.soft_labels import Labelled, label, labelled_tokens
from blackbox_kd.student.render import Renderer
from blackbox_kd.types import Completion, TokenLogprob, TopLogprob
from tests.records import CONTEXT, answered, completion, prompt, request, token
from tests.soft import soft_labels

SCORER = f"m@{CONTEXT}"


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return Renderer(tokenizer, [tokenizer.eos_token_id])


def with_id(renderer: Renderer, token_id: int, logprob: float, *top: tuple[int, float]) -> TokenLogprob:
    """A token as an endpoint with the student's own tokenizer shows it."""

    def shown(i: int) -> dict[str, Any]:
        text = renderer.tokenizer.decode([i])
        return {"token": text, "id": i, "bytes": None if i == renderer.end_id else list(text.encode())}

    others = [TopLogprob(logprob=value, **shown(i)) for i, value in top]
    return TokenLogprob(logprob=logprob, top_logprobs=others, **shown(token_id))


def ln(*masses: float) -> list[float]:
    return [math.log(mass) for mass in masses]


def store(corpus: Corpus, texts: dict[str, list[TokenLogprob] | None]) -> list[Completion]:
    """Answers of m with these tokens."""
    made = [completion(request(prompt(text)), text=text, logprobs=tokens) for text, tokens in texts.items()]
    assert corpus.try_ingest([answered(each, scorer=SCORER) for each in made])
    return made


def labels_of(corpus: Corpus, renderer: Renderer, *made: Completion, by: str = SCORER) -> Labelled:
    return label(corpus, renderer, "m", by, [(each.completion_id, each.text.strip()) for each in made])


def masses(soft: SoftLabels | None, t: int, renderer: Renderer) -> dict[str, float]:
    """Student token -> probability, of one row."""
    assert soft is not None
    filled = soft.logprobs[t] > -np.inf
    pieces = [renderer.tokenizer.convert_ids_to_tokens(int(i)) for i in soft.ids[t][filled]]
    return dict(zip(pieces, np.exp(soft.logprobs[t][filled]).tolist(), strict=True))


def shares(found: Labelled) -> dict[str, float]:
    """What alignment is measured by."""
    metrics = found.metrics()
    return {name: metrics[name] for name in ("coverage", "captured_mass", "ambiguous_mass")}


def near(wanted: dict[str, float]) -> Any:
    """Stored logprobs are rounded to 1e-3 nats."""
    return pytest.approx(wanted, abs=1e-3)


def same_tokens(renderer: Renderer) -> list[TokenLogprob]:
    one, two, yes = (renderer.completion(text)[0] for text in ("one", " two", "yes"))
    end = renderer.end_id
    return [
        with_id(renderer, one, *ln(0.7), *zip((one, yes), ln(0.7, 0.2), strict=True)),
        with_id(renderer, two, *ln(0.1), *zip((end, yes), ln(0.6, 0.25), strict=True)),  # drawn outside its top-k
        with_id(renderer, end, *ln(0.9), (end, ln(0.9)[0])),
    ]


def words(*, end: bool = False) -> list[TokenLogprob]:
    """A teacher whose pieces are not the student's: one| tw|o."""
    first = token("one", *ln(0.9), ("one", ln(0.9)[0]), ("yes", ln(0.05)[0]))
    shown = zip((" tw", " th", " ten"), ln(0.6, 0.2, 0.1), strict=True)
    found = [first, token(" tw", ln(0.6)[0], *shown), token("o", -0.0, ("o", -0.0))]
    return [*found, token("", ln(0.8)[0], ("", ln(0.8)[0]), (" th", ln(0.1)[0]))] if end else found


def test_the_students_own_tokens_come_out_as_they_are(corpus: Corpus, renderer: Renderer) -> None:
    (made,) = store(corpus, {"one two": same_tokens(renderer)})
    found = labels_of(corpus, renderer, made)
    assert found.same
    (soft,) = found.labels
    assert masses(soft, 0, renderer) == near({"one": 0.7, "yes": 0.2})
    assert masses(soft, 1, renderer) == near({"<|im_end|>": 0.6, "yes": 0.25, "Ġtwo": 0.1})
    assert masses(soft, 2, renderer) == near({"<|im_end|>": 0.9})
    # 0.9, 0.95 and 0.9 of three tokens
    assert shares(found) == near({"coverage": 1.0, "captured_mass": 2.75 / 3, "ambiguous_mass": 0.0})


def test_the_same_answers_have_the_same_labels_whatever_is_asked_afterwards(corpus: Corpus, renderer: Renderer) -> None:
    """A teacher that is seen to own " three" would no longer begin it with " th"."""
    (made,) = store(corpus, {"one two": words()})
    before = labels_of(corpus, renderer, made)
    store(corpus, {"three": [token(" three", -0.5, (" three", -0.5))]})
    after = labels_of(corpus, renderer, made)
    assert masses(before.labels[0], 1, renderer) == masses(after.labels[0], 1, renderer)
    assert before.metrics() == after.metrics()


def test_another_tokenizer_meets_the_student_where_both_cut(corpus: Corpus, renderer: Renderer) -> None:
    """The student writes one| two. Of " th" it may make " t" or " three": ambiguous. " ten" begins with its " t"."""
    (made,) = store(corpus, {"one two": words()})
    found = labels_of(corpus, renderer, made)
    assert not found.same
    (soft,) = found.labels
    assert masses(soft, 0, renderer) == near({"one": 0.9, "yes": 0.05})
    assert masses(soft, 1, renderer) == near({"Ġtwo": 0.6, "Ġt": 0.1})
    assert masses(soft, 2, renderer) == {}  # no end token was shown
    assert labelled_tokens(soft) == 2
    assert shares(found) == near({"coverage": 2 / 3, "captured_mass": (0.95 + 0.7) / 2, "ambiguous_mass": 0.2 / 2})


def test_the_end_of_an_answer_has_a_label_where_the_teacher_shows_it(corpus: Corpus, renderer: Renderer) -> None:
    (made,) = store(corpus, {"one two": words(end=True)})
    (soft,) = labels_of(corpus, renderer, made).labels
    assert masses(soft, 2, renderer) == near({"<|im_end|>": 0.8})


def test_whitespace_around_an_answer_is_not_learnt_and_costs_no_label_inside(
    corpus: Corpus, renderer: Renderer
) -> None:
    text = " \none two\n"
    (made,) = store(corpus, {text: [token(" \n", -0.1, (" \n", -0.1)), *words(), token("\n", -0.2, ("\n", -0.2))]})
    (soft,) = labels_of(corpus, renderer, made).labels
    assert masses(soft, 0, renderer) == near({"one": 0.9, "yes": 0.05})
    assert masses(soft, 1, renderer) == near({"Ġtwo": 0.6, "Ġt": 0.1})
    assert masses(soft, 2, renderer) == {}


def test_answers_without_logprobs_have_no_labels_and_spoil_none(
    corpus: Corpus, renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    made = store(corpus, {"yes": None, "one two": words(), "no": []})
    found = labels_of(corpus, renderer, *made)
    assert [labelled_tokens(each) for each in found.labels] == [0, 2, 0]
    assert found.labels[0] is None
    assert shares(found) == near({"coverage": 2 / 3, "captured_mass": 0.825, "ambiguous_mass": 0.1})
    assert not capsys.readouterr().err  # nothing is wrong with them


def test_tokens_of_another_text_are_counted_and_said(
    corpus: Corpus, renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    made = store(corpus, {"one two": words(), "yes no": words(), "two two": words()})
    found = labels_of(corpus, renderer, *made)
    assert [each is None for each in found.labels] == [False, True, True]
    said = capsys.readouterr().err
    assert "2 of 3 answers have none, their tokens do not fit (the teacher's tokens spell b'one two'" in said
    assert said.count("\n") == 1


def test_sampled_logprobs_alone_and_another_scorer_give_nothing(corpus: Corpus, renderer: Renderer) -> None:
    (made,) = store(corpus, {"one two": [token("one", -0.1), token(" two", -0.2)]})
    assert labels_of(corpus, renderer, made) == Labelled([None], same=False)
    (made,) = store(corpus, {"two one": words()})
    assert labels_of(corpus, renderer, made, by="m@bare") == Labelled([None], same=False)
    assert labels_of(corpus, renderer) == Labelled([], same=False)


def test_metrics_weigh_answers_by_their_labelled_tokens() -> None:
    """1 of 2 tokens with 0.5, and 3 of 4 with 0.9: coverage 4/6, mass (0.5 + 3 x 0.9) / 4 = 0.8."""
    few = soft_labels(np.array([[1], [0]]), np.log(np.array([[0.5], [1e-300]])))
    few.logprobs[1] = -np.inf
    few = few._replace(coverage=0.5, mapped=0.5, ambiguous=0.2)
    many = soft_labels(np.ones((4, 1)), np.log(np.full((4, 1), 0.9)))
    many.logprobs[3] = -np.inf
    many = many._replace(coverage=0.75, mapped=0.9, ambiguous=0.0)
    assert shares(Labelled([few, None, many], same=False)) == pytest.approx(
        {"coverage": 4 / 6, "captured_mass": 0.8, "ambiguous_mass": 0.05}
    )


def test_without_a_label_there_are_no_metrics() -> None:
    empty = SoftLabels(np.zeros((2, 1), np.int32), np.full((2, 1), -np.inf, np.float32), *[0.0] * 5)
    assert Labelled([None, empty], same=False).metrics() == {}
