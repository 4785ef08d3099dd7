"""`forks`: what would the teacher write next, at the places of a draft where the student was least sure?

What it is: the teacher's top-k distribution at states of the student, from a chat API: the draft up to such a place is
given back as the beginning of the answer, and one token is asked for. On-policy distillation (GKD, 2306.13649) at m
places of a draft instead of all; a teacher with other tokens is mapped by `align`. Ours; OmniOPD (2606.01476) asks for
whole continuations at such places.
Needs: chat with prefill and top_logprobs. Costs: `forks` calls of one token a rollout, each with the draft up to there
in its prompt. Loss: `topk_kl` (forward KL, the rest of the mass as one bucket) on exactly those tokens.
What it does not do: it asks nothing in a word or behind a space (see `cuts`), and nothing of what comes after the next
token. Between the forks the student learns from `replay` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from blackbox_kd import health
from blackbox_kd.algorithms.base import Algorithm, AlgorithmConfig, Outcome, Tools, soft_sample
from blackbox_kd.algorithms.cuts import Cut, cannot_go_on, go_on, peaks, said, unusable
from blackbox_kd.align import Aligner
from blackbox_kd.align.spelling import REPLACED
from blackbox_kd.errors import AlignmentError
from blackbox_kd.progress import say
from blackbox_kd.soft_labels import Scored, aligner_of
from blackbox_kd.student.vocabulary import student_vocab
from blackbox_kd.teachers.base import Capabilities, PrefillReply
from blackbox_kd.teachers.prefill import what_is_new
from blackbox_kd.types import (
    Completion,
    Request,
    Rollout,
    SamplingParams,
    TeacherTokens,
    TopK,
    TrainSample,
    scorer,
)

NOT_GREEDY_NATS = 0.05
"""By so much less likely than the likeliest, a token that was asked for at temperature 0 is out of place."""


class ForksConfig(AlgorithmConfig):
    """The teacher's next token, where the student was least sure."""

    name: Literal["forks"] = "forks"
    forks: int = Field(4, ge=1)
    """Places in each draft that are asked about: those of highest entropy."""
    top_logprobs: int = Field(20, ge=1)
    """Alternatives asked for, at most as many as the endpoint shows."""
    beta: float = Field(0.0, ge=0, le=1)
    """0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence (as in TRL)."""
    tail: Literal["bucket", "renormalise", "none"] = "bucket"
    """What becomes of the mass outside the top-k, see `losses.topk_kl`."""

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Of the soft labels."""
        return {"topk_kl": {"beta": self.beta, "tail": self.tail}}

    def lacking(self, can: Capabilities) -> str | None:
        """Prefill, and alternatives."""
        if not can.top_logprobs_max:
            return "the endpoint is not known to show top_logprobs; run `probe`"
        return cannot_go_on(can)

    @property
    def calls_per_rollout(self) -> float:
        """At most: a short draft has fewer places."""
        return self.forks

    @property
    def reply_tokens(self) -> int:
        """One."""
        return 1

    def build(self, tools: Tools) -> Forks:
        """No files to read."""
        return Forks(self, tools)


class Reply(NamedTuple):
    """One token of the teacher."""

    cut: Cut
    answer: Completion
    tokens: TeacherTokens
    """T = 1."""
    new: str
    """What it adds to the text before the cut."""

    @property
    def ends(self) -> bool:
        """Whether the token is the end of the answer."""
        return self.answer.finish_reason == "stop" and not self.new


class Fork(NamedTuple):
    """A place, and what the teacher would write there."""

    cut: Cut
    completion_id: str
    """Of the teacher's reply."""
    soft: TopK
    """(1, K) in the student's tokens."""

    @property
    def student(self) -> TopK:
        """(1, K) of the student's own."""
        top, at = self.cut.rollout.top, slice(self.cut.token, self.cut.token + 1)
        return TopK(top.ids[at], top.logprobs[at])


class Forks(Algorithm):
    """See the module."""

    def __init__(self, config: ForksConfig, tools: Tools) -> None:
        self._config, self._teacher, self._renderer = config, tools.teacher, tools.renderer
        self._vocab = student_vocab(tools.renderer.tokenizer, tools.renderer.end_id)
        self._scorer = scorer(tools.teacher.config.model, tools.teacher.context.context_hash)

    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """A sample for each rollout that has a place with an answer."""
        can = self._teacher.capabilities
        cuts = [cut for rollout in rollouts for cut in peaks(rollout, self._vocab, self._config.forks, start=True)]
        requests = [self._request(cut, can) for cut in cuts]
        answers = await self._teacher.answers(requests, round_=round_, description="forks")
        replies, wrong = self._read(cuts, [answers.get(request.request_key) for request in requests], can)
        forks = self._map(replies, wrong)
        if wrong:
            say(f"forks: {unusable(wrong, len(cuts))}")
        return Outcome(
            feedback=[said(fork.cut, "fork", fork.completion_id, self._scorer) for fork in forks],
            samples=[_sample(list(mine)) for _, mine in groupby(forks, key=lambda fork: id(fork.cut.rollout))],
            asked=len(cuts),
            failed=len(wrong),
            metrics=metrics(forks),
        )

    def _request(self, cut: Cut, can: Capabilities) -> Request:
        sampling = SamplingParams(
            temperature=0, max_completion_length=1, top_logprobs=min(self._config.top_logprobs, can.top_logprobs_max)
        )
        return go_on(self._teacher, cut, "fork", sampling, can.prefill)

    def _read(
        self, cuts: Sequence[Cut], answers: Sequence[Completion | None], can: Capabilities
    ) -> tuple[list[Reply], list[str]]:
        """The replies of one token, and why others are none."""
        given = [answer.completion_id for answer in answers if answer is not None]
        tokens = self._teacher.corpus.scored_tokens(given, self._scorer)
        replies, wrong = list[Reply](), list[str]()
        for cut, answer in zip(cuts, answers, strict=True):
            try:
                replies.append(_reply(cut, answer, tokens, can.prefill_reply))
            except AlignmentError as error:
                wrong.append(str(error))
        return replies, wrong

    def _map(self, replies: Sequence[Reply], wrong: list[str]) -> list[Fork]:
        """Into the student's tokens; why some have no image is added to `wrong`."""
        corpus, end_id = self._teacher.corpus, self._vocab.end_id
        ended: list[Scored] = [("", each.tokens, [end_id]) for each in replies if each.ends]
        model = self._teacher.config.model
        aligner = aligner_of(corpus, self._vocab, self._renderer, model, self._scorer, ended)
        forks = []
        for each in replies:
            try:
                forks.append(_fork(aligner, each, least=2 if self._config.tail == "renormalise" else 1))
            except AlignmentError as error:
                wrong.append(str(error))
        return forks


def _reply(cut: Cut, answer: Completion | None, scored: Mapping[str, TeacherTokens], form: PrefillReply) -> Reply:
    """A reply of one token with alternatives.

    Raises:
        AlignmentError: it is none, or what is new in its text is not to be told.
    """
    if answer is None:
        raise AlignmentError("no answer")
    tokens = scored.get(answer.completion_id)
    shown = 0 if tokens is None else len(tokens.token_ids)
    if tokens is None or shown != 1 or not tokens.top_ids.size:
        raise AlignmentError(f"{shown} tokens with alternatives came back where one was asked for")
    if tokens.token_logprobs[0] < tokens.top_logprobs.max() - NOT_GREEDY_NATS:
        raise AlignmentError(
            "the token is not the likeliest, as it is at temperature 0: its logprobs are of another place"
        )
    return Reply(cut, answer, tokens, what_is_new(answer.text, cut.text, form))


def _fork(aligner: Aligner, reply: Reply, least: int) -> Fork:
    """Its candidates in the student's tokens, at least so many: one that is renormalised says nothing.

    Raises:
        AlignmentError: the token is not what is new in the text, or too few candidates have an image.
    """
    spelled = aligner.spelled.get(int(reply.tokens.token_ids[0]))
    if spelled and not reply.ends and REPLACED not in reply.new and spelled != reply.new.encode():
        raise AlignmentError(f"the token of a reply spells {spelled!r}, but what is new in its text is {reply.new!r}")
    labels = aligner.candidates(reply.tokens)
    if (labels.logprobs > -np.inf).sum() < least:
        raise AlignmentError(
            f"fewer candidates than {least} behind {reply.cut.text[-20:]!r} begin a token of the student"
        )
    return Fork(reply.cut, reply.answer.completion_id, TopK(labels.ids, labels.logprobs))


def _sample(forks: Sequence[Fork]) -> TrainSample:
    """Of one rollout, whose forks are in order."""
    rollout, width = forks[0].cut.rollout, max(fork.soft.ids.shape[1] for fork in forks)
    ids = np.concatenate([_wide(fork.soft.ids, width, 0) for fork in forks])
    logprobs = np.concatenate([_wide(fork.soft.logprobs, width, -np.inf) for fork in forks])
    at = {fork.cut.token for fork in forks}
    return soft_sample(rollout, [i in at for i in range(len(rollout.completion_ids))], TopK(ids, logprobs))


def _wide(row: np.ndarray, width: int, empty: float) -> np.ndarray:
    return np.pad(row, ((0, 0), (0, width - row.shape[1])), constant_values=empty)


def metrics(forks: Sequence[Fork]) -> dict[str, float]:
    """Whether the two think alike at the forks.

    `overlap_top_k`: share of the teacher's candidates among the student's top-k. `captured_mass`: of the teacher's
    candidates that have an image. `fork_kl`: `health.least_kl` before the update, nats. `fork_entropy`: the student's.
    """
    if not forks:
        return {}
    values = {
        "overlap_top_k": [health.overlap(fork.soft, fork.student) for fork in forks],
        "captured_mass": [float(np.exp(fork.soft.logprobs).sum()) for fork in forks],
        "fork_kl": [float(health.least_kl(fork.soft, fork.student)[0]) for fork in forks],
        "fork_entropy": [fork.cut.entropy for fork in forks],
    }
    depths = [fork.cut.depth for fork in forks]
    found = {"fork_depth": float(np.mean(depths))}
    for name, each in values.items():
        found |= {name: float(np.mean(each))} | health.by_depth(name, each, depths)
    return found
