"""`prefix`: the student's draft is cut where it was least sure, the teacher goes on, and the student learns how.

What it is: DAgger (Ross et al. 2011) on states of the student's own: it sees the beginning that it wrote itself, and
learns what the teacher would have written behind it. Cf. SKD (2410.11325), which interleaves the two token by token.
Needs: chat with prefill. Costs: `cuts` calls a rollout, each with the draft up to the cut in its prompt.
Loss: on the continuation only, `topk_kl` on tokens whose top-k the teacher shows and `ce` on the others.
What it does not do: it teaches nothing of the draft's beginning, however bad that is (`replay` does), and never cuts at
the start, in a word or behind a space (see `cuts`). A continuation that is cut off is dropped; one that ends the answer
at once is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from blackbox_kd.algorithms.base import Algorithm, AlgorithmConfig, Outcome, Tools, ce_sample
from blackbox_kd.algorithms.cuts import Cut, cannot_go_on, go_on, peaks, said, unusable
from blackbox_kd.align import SoftLabels
from blackbox_kd.errors import AlignmentError
from blackbox_kd.progress import say
from blackbox_kd.sections import SoftLossConfig
from blackbox_kd.soft_labels import Labelled, Scored, aligned, aligner_of
from blackbox_kd.student.render import IGNORE, Rendered
from blackbox_kd.student.vocabulary import student_vocab
from blackbox_kd.teachers.base import Capabilities, PrefillReply
from blackbox_kd.teachers.prefill import what_is_new
from blackbox_kd.types import Completion, Request, Rollout, SamplingParams, TrainSample, scorer


class PrefixConfig(AlgorithmConfig):
    """The teacher goes on where the student was least sure."""

    name: Literal["prefix"] = "prefix"
    cuts: int = Field(1, ge=1)
    """Continuations of one draft, those at its places of highest entropy."""
    within: float = Field(0.75, gt=0, le=1)
    """The first share of a draft's tokens, in which it is cut: behind it little is left to learn."""
    temperature: float = Field(1.0, ge=0)
    max_completion_length: int = Field(256, ge=1)
    """Tokens of a continuation."""
    top_logprobs: int = Field(20, ge=0)
    """Alternatives asked for at each token, as far as the endpoint shows any; 0 learns the drawn tokens only."""

    @model_validator(mode="after")
    def _one_distribution(self) -> PrefixConfig:
        if self.top_logprobs and self.temperature != 1:
            raise ValueError(
                f"onpolicy.algorithm: API logprobs are those of temperature 1, but continuations are drawn at "
                f"{self.temperature:g}; set top_logprobs to 0, or temperature to 1"
            )
        return self

    def lacking(self, can: Capabilities) -> str | None:
        """Prefill."""
        return cannot_go_on(can)

    @property
    def calls_per_rollout(self) -> float:
        """At most: a short draft has fewer places."""
        return self.cuts

    @property
    def reply_tokens(self) -> int:
        """Of a continuation."""
        return self.max_completion_length

    def build(self, tools: Tools) -> Prefix:
        """No files to read."""
        return Prefix(self, tools)


class Continuation(NamedTuple):
    """What the teacher wrote behind a cut."""

    cut: Cut
    completion: Completion
    text: str
    """What is new, without whitespace at its end; empty where the answer was to end here."""
    ids: list[int]
    """Its tokens as the student has them behind the cut, and the end token."""


class Prefix(Algorithm):
    """See the module."""

    def __init__(self, config: PrefixConfig, tools: Tools) -> None:
        self._config, self._teacher, self._renderer = config, tools.teacher, tools.renderer
        self._vocab = student_vocab(tools.renderer.tokenizer, tools.renderer.end_id)
        self._scorer = scorer(tools.teacher.config.model, tools.teacher.context.context_hash)
        self._learnt_by = SoftLossConfig(tail=tools.soft.tail) if tools.soft else None

    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """A sample for each continuation."""
        config, can = self._config, self._teacher.capabilities
        cuts = [cut for r in rollouts for cut in peaks(r, self._vocab, config.cuts, within=config.within)]
        requests = [self._request(cut, can) for cut in cuts]
        answers = await self._teacher.answers(requests, round_=round_, description="prefix")
        found, wrong = list[Continuation](), list[str]()
        for cut, request in zip(cuts, requests, strict=True):
            answer = answers.get(request.request_key)
            if answer is not None and answer.finish_reason == "stop":
                try:
                    found.append(self._continuation(cut, answer, can.prefill_reply))
                except AlignmentError as error:
                    wrong.append(str(error))
            else:
                wrong.append("no answer" if answer is None else f"an answer that ends by {answer.finish_reason!r}")
        if wrong:
            say(f"prefix: {unusable(wrong, len(cuts))}")
        soft = self._soft(found)
        return Outcome(
            feedback=[said(each.cut, "prefix", each.completion.completion_id, self._scorer) for each in found],
            samples=[_sample(each, labels, self._learnt_by) for each, labels in zip(found, soft.labels, strict=True)],
            asked=len(cuts),
            failed=len(wrong),
            metrics=_metrics(rollouts, found) | soft.metrics(),
        )

    def _request(self, cut: Cut, can: Capabilities) -> Request:
        sampling = SamplingParams(
            temperature=self._config.temperature,
            max_completion_length=self._config.max_completion_length,
            top_logprobs=min(self._config.top_logprobs, can.top_logprobs_max) or None,
        )
        return go_on(self._teacher, cut, "prefix", sampling, can.prefill)

    def _continuation(self, cut: Cut, answer: Completion, reply: PrefillReply) -> Continuation:
        """Joined with the student's own tokens before the cut; these are never tokenised again.

        Raises:
            AlignmentError: the tokens do not spell the student's text up to the cut and the teacher's behind it.
        """
        text = what_is_new(answer.text, cut.text, reply).rstrip()
        ids = [*self._vocab.encode(text), self._vocab.end_id]
        self._vocab.starts((cut.text + text).encode(), [*cut.rollout.completion_ids[: cut.token], *ids])
        return Continuation(cut, answer, text, ids)

    def _soft(self, found: Sequence[Continuation]) -> Labelled:
        """Soft labels of the continuations that came with alternatives."""
        corpus = self._teacher.corpus
        tokens = corpus.scored_tokens([each.completion.completion_id for each in found], self._scorer)
        scored: list[Scored | None] = [
            (each.text, tokens[i], each.ids) if (i := each.completion.completion_id) in tokens else None
            for each in found
        ]
        shown = [one for one in scored if one is not None and one[1].top_ids.size]
        if not shown:
            return Labelled([None] * len(found), same=False)
        model = self._teacher.config.model
        aligner = aligner_of(corpus, self._vocab, self._renderer, model, self._scorer, shown)
        return aligned(aligner, scored)


def _sample(each: Continuation, labels: SoftLabels | None, soft: SoftLossConfig | None) -> TrainSample:
    """The student's prompt and beginning weigh nothing."""
    rollout, continued = each.cut.rollout, each.completion.completion_id
    before = [*rollout.prompt_ids, *rollout.completion_ids[: each.cut.token]]
    rendered = Rendered([*before, *each.ids], [*[IGNORE] * len(before), *each.ids])
    return ce_sample(f"{rollout.completion.completion_id}/{each.cut.token}/{continued}", rendered, labels, soft)


def _metrics(rollouts: Sequence[Rollout], found: Sequence[Continuation]) -> dict[str, float]:
    cut = {each.cut.rollout.completion.completion_id for each in found}
    return {
        "drafts_continued": len(cut) / max(1, len(rollouts)),
        "cut_depth": _mean([each.cut.depth for each in found]),
        "cut_entropy": _mean([each.cut.entropy for each in found]),
        "continuation_length": _mean([len(each.ids) for each in found]),
        "ended_at_once": _mean([not each.text for each in found]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
