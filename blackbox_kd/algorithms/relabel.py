"""`relabel`: the teacher says what the student should have written, and the student learns that.

What it is: DAgger (Ross et al. 2011) with whole answers as actions. `rewrite` corrects the student's own draft, so
the target stays near what the student writes; `afresh` is the teacher's own answer to the prompts where the student
is least sure, and is on-policy only through that selection.
Needs: chat. Costs: one call for each of the `worst_fraction` of rollouts, those that the student is least sure of:
unless told otherwise all of them for a rewrite, and half of them afresh. Loss: `ce` on the whole target; `topk_kl` if
it is afresh, at temperature 1, and comes with alternatives (a rewrite's are about another question).
What it does not do: it does not tell the student which words of the draft were wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from blackbox_kd.algorithms.base import Algorithm, AlgorithmConfig, Outcome, Tools, ce_sample
from blackbox_kd.judging import RewritePrompt, usable_text
from blackbox_kd.soft_labels import label
from blackbox_kd.types import Completion, Feedback, Request, Rollout, SamplingParams, scorer


class RelabelConfig(AlgorithmConfig):
    """The teacher rewrites or answers afresh."""

    name: Literal["relabel"] = "relabel"
    mode: Literal["rewrite", "afresh"] = "rewrite"
    template: str = "prompts/rewrite.md.j2"
    """Jinja file of the question in mode rewrite; it may use {{ prompt }} and {{ draft }}."""
    examples: str | None = None
    """JSONL of example rewrites, in the shape that the template renders."""
    worst_fraction: float | None = Field(None, gt=0, le=1)
    """Share of rollouts that is asked about, the least sure ones; null: all for a rewrite, half of them afresh."""
    temperature: float = Field(1.0, ge=0)
    max_completion_length: int = Field(256, ge=1)
    """Tokens."""

    @property
    def learning_rate(self) -> float:
        """Of a text, but for an answer whose alternatives can be learnt."""
        return super().learning_rate if self.mode == "afresh" and self.temperature == 1 else 1e-5

    @property
    def calls_per_rollout(self) -> float:
        """The share that is asked about."""
        return self.worst_fraction or {"rewrite": 1.0, "afresh": 0.5}[self.mode]

    @property
    def reply_tokens(self) -> int:
        """Of a rewrite or an answer."""
        return self.max_completion_length

    def files_hash(self) -> str:
        """Of template and examples."""
        return RewritePrompt(None, self.template, self.examples, "onpolicy.algorithm").content_hash

    def build(self, tools: Tools) -> Relabel:
        """With its template and examples read."""
        return Relabel(self, tools)


class Relabel(Algorithm):
    """See the module."""

    def __init__(self, config: RelabelConfig, tools: Tools) -> None:
        teacher = tools.teacher
        self._config, self._teacher, self._renderer = config, teacher, tools.renderer
        self._soft = tools.soft if config.mode == "afresh" and config.temperature == 1 else None
        length, top = config.max_completion_length, teacher.sample.top_logprobs if self._soft else None
        self._sampling = SamplingParams(temperature=config.temperature, max_completion_length=length, top_logprobs=top)
        system = teacher.config.prompt.template
        self._rewrite = RewritePrompt(system, config.template, config.examples, "onpolicy.algorithm")

    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """One target for each rollout that is asked about."""
        teacher, join, asked = self._teacher, self._renderer.join, least_sure(rollouts, self._config.calls_per_rollout)
        requests = [self._request(rollout, round_) for rollout in asked]
        targets = await teacher.answers(requests, round_=round_, description=self._config.mode)
        found = list[tuple[Rollout, Request, Completion, str]]()
        for rollout, request in zip(asked, requests, strict=True):
            target = targets.get(request.request_key)
            if target and (text := usable_text(target)):
                found.append((rollout, request, target, text))
        by = scorer(teacher.config.model, teacher.context.context_hash)
        texts = [(target.completion_id, text) for *_, target, text in found if self._soft]
        soft = label(teacher.corpus, self._renderer, teacher.config.model, by, texts)
        return Outcome(
            feedback=[self._said(rollout, request, target) for rollout, request, target, _ in found],
            samples=[
                ce_sample(
                    target.completion_id, join(rollout.prompt_ids, self._renderer.completion(text)), labels, self._soft
                )
                for (rollout, _, target, text), labels in zip(found, soft.labels or [None] * len(found), strict=True)
            ],
            asked=len(asked),
            failed=len(asked) - len(found),
            metrics=soft.metrics(),
        )

    def _said(self, rollout: Rollout, request: Request, target: Completion) -> Feedback:
        return Feedback(
            completion_id=rollout.completion.completion_id,
            kind=self._config.mode,
            scorer=scorer(request.model, request.context_hash),
            target_completion_id=target.completion_id,
        )

    def _request(self, rollout: Rollout, round_: int) -> Request:
        if self._config.mode == "afresh":  # a further draw of the teacher's own answer in each round
            draw = self._teacher.sample.n + round_ - 1
            return self._teacher.request(rollout.prompt, "relabel", self._sampling, sample_idx=draw)
        return self._teacher.request(
            rollout.prompt,
            "relabel",
            self._sampling,
            messages=self._rewrite.messages(rollout),
            context=self._rewrite.context,
            completion_id=rollout.completion.completion_id,
        )


def least_sure(rollouts: Sequence[Rollout], fraction: float) -> list[Rollout]:
    """The share of rollouts with the lowest mean logprob a token, at least one of them."""
    ranked = sorted(rollouts, key=lambda r: sum(r.logprobs) / max(1, len(r.logprobs)))
    return ranked[: max(1, round(fraction * len(ranked)))]
