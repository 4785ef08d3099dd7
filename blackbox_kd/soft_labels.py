"""Soft labels for stored answers: the teacher's top-k in the student's tokens, read from the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from blackbox_kd.align import Aligner, SoftLabels, StudentVocab, learn_end_ids, same_tokenizer
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import AlignmentError, ModelError
from blackbox_kd.progress import counting, say
from blackbox_kd.student.render import Renderer
from blackbox_kd.student.vocabulary import student_vocab
from blackbox_kd.types import TeacherTokens, VocabToken

NARROW = -5.0
"""Below this, text and logprobs are of two distributions."""
LEARN_FROM = 2000
"""Stored answers that an aligner looks at before it aligns others."""
SMALLEST_TAIL = 1e-6
"""Of the mass outside the top-k; less is rounding."""


Scored = tuple[str, TeacherTokens, list[int]]
"""A text, the scorer's tokens and the student's tokens of it."""


class Labelled(NamedTuple):
    """Soft labels of some answers."""

    labels: list[SoftLabels | None]
    """None where the scorer gave no logprobs, or they cannot be aligned."""
    same: bool
    """One tokenizer on both sides: then a tail-KL is never above the true KL."""
    surprise_z: float = 0.0
    """See `surprise_z`."""

    def metrics(self) -> dict[str, float]:
        """`coverage` (of the tokens of answers that have labels), `captured_mass` and `ambiguous_mass` (means over
        labelled tokens); {} without labels.
        """
        tokens = sum(len(each.ids) for each in self.labels if each is not None)
        labelled = [labelled_tokens(each) for each in self.labels]
        if not sum(labelled):
            return {}
        return {
            "coverage": sum(labelled) / tokens,
            "captured_mass": self._mean("mapped", labelled),
            "ambiguous_mass": self._mean("ambiguous", labelled),
            "surprise_z": self.surprise_z,
        }

    def _mean(self, name: str, labelled: Sequence[int]) -> float:
        total = sum(getattr(each, name) * n for each, n in zip(self.labels, labelled, strict=True) if each is not None)
        return float(total / sum(labelled))


def labelled_tokens(labels: SoftLabels | None) -> int:
    """How many tokens of an answer have a label."""
    return 0 if labels is None else int((labels.logprobs > -np.inf).any(1).sum())


def surprise_z(scored: Iterable[TeacherTokens]) -> float:
    """Standard score of how surprising the drawn tokens are beside what their own logprobs promise.

    Text that is drawn from these distributions has `-log p` of mean `H_t` (entropy of the top-k and one bucket for the
    rest), so this is near N(0, 1). Far below 0, the endpoint draws from a narrower distribution than it shows: a lower
    temperature, or a top_k, top_p or min_p of its own. Then text and soft labels are two different targets.
    """
    deficit = variance = 0.0
    for tokens in scored:
        if not tokens.top_ids.size:
            continue
        p = np.exp(tokens.top_logprobs)
        p = np.concatenate([p, np.clip(1 - p.sum(1, keepdims=True), SMALLEST_TAIL, 1)], 1)
        drawn = tokens.top_ids == tokens.token_ids[:, None]
        drawn = np.concatenate([drawn, ~drawn.any(1, keepdims=True)], 1) & (p > 0)
        nats = -np.log(p, where=p > 0, out=np.zeros_like(p))
        mean = (p * nats).sum(1)
        deficit += float(((nats * drawn).sum(1) / np.maximum(drawn.sum(1), 1) - mean).sum())
        variance += float(((p * nats**2).sum(1) - mean**2).sum())
    return deficit / variance**0.5 if variance > 0 else 0.0


def label(corpus: Corpus, renderer: Renderer, model: str, by: str, answers: Sequence[tuple[str, str]]) -> Labelled:
    """Soft labels for whole answers, given as (completion_id, text as it is trained on).

    `by` is the scorer that gave the logprobs, `model` whose tokens they are. What cannot be aligned is counted, and
    said: some answers, or all of them where the student's tokenizer changes texts (see `student_vocab`).
    """
    with corpus.connect():
        scored, vocab = corpus.scored_tokens([completion_id for completion_id, _ in answers], by), corpus.vocab(model)
    # by what the answers themselves show: the same answers have the same labels, whatever else is asked afterwards
    shown = {i for t in scored.values() for i in (*t.token_ids.tolist(), *t.top_ids[t.top_logprobs > -np.inf].tolist())}
    vocab = {token_id: token for token_id, token in vocab.items() if token_id in shown}
    none = Labelled([None] * len(answers), same=False)
    if not any(tokens.top_ids.size for tokens in scored.values()):
        return none
    try:
        student = student_vocab(renderer.tokenizer, renderer.end_id)
    except ModelError as error:
        say(f"no soft labels: {error}")
        return none
    triples = {i: (text, scored[i], renderer.completion(text)) for i, text in answers if i in scored}
    aligner = learnt(vocab, student, list(triples.values()))
    return aligned(aligner, [triples.get(completion_id) for completion_id, _ in answers])


def aligner_of(
    corpus: Corpus,
    student: StudentVocab,
    renderer: Renderer,
    model: str,
    by: str,
    more: Sequence[Scored],
    *,
    written_by_teacher: bool = True,
) -> Aligner:
    """An aligner for the scorer `by` of a model that has learnt from `more` and from stored whole answers.

    Where `more` is not of the teacher's own writing, it says nothing of what becomes of the teacher's tokens.
    """
    with corpus.connect():
        stored, vocab = corpus.whole_scored(by, LEARN_FROM), corpus.vocab(model)
        tokens = corpus.scored_tokens([completion_id for completion_id, _ in stored], by)
    texts = [(text.strip(), tokens[completion_id]) for completion_id, text in stored]
    own = [(text, each, renderer.completion(text)) for text, each in texts]
    return learnt(vocab, student, [*more, *own], own=None if written_by_teacher else own)


def learnt(
    vocab: Mapping[int, VocabToken],
    student: StudentVocab,
    answers: Sequence[Scored],
    *,
    own: Sequence[Scored] | None = None,
) -> Aligner:
    """From whole answers: which tokens end one, whether there is one tokenizer, what comes of ambiguous tokens.

    The last is learnt from what the teacher wrote by itself: `own`, else all of them.
    """
    ends = learn_end_ids(vocab, [(text, tokens) for text, tokens, _ in answers])
    same = same_tokenizer(vocab, student, answers, end_ids=ends)
    aligner = Aligner(vocab, student, end_ids=ends, same=same)
    aligner.observe(answers if own is None else own)
    return aligner


def aligned(aligner: Aligner, answers: Sequence[Scored | None]) -> Labelled:
    """Soft labels of each; what cannot be aligned has none, and is said."""
    labels, wrong = list[SoftLabels | None](), list[str]()
    with counting("aligning", len(answers)) as progress:
        for answer in answers:
            labels.append(None)
            if answer is not None:
                try:
                    labels[-1] = aligner.align(*answer)
                except AlignmentError as error:
                    wrong.append(str(error))
            progress.advance()
    if wrong:
        say(f"soft labels: {len(wrong)} of {len(answers)} answers have none, their tokens do not fit ({wrong[0]})")
    z = surprise_z(answer[1] for answer in answers if answer is not None)
    if z < NARROW:
        say(
            f"soft labels: the answers are less surprising than their own logprobs promise (z {z:.1f}): the endpoint "
            "draws from a narrower distribution than it shows (a top_k or min_p of its own?), see teacher.extra_body"
        )
    return Labelled(labels, aligner.same, z)
