"""`score`: the teacher's log-probabilities of the student's own tokens.

What it is: on-policy distillation (GKD, Agarwal et al. 2024; Lu et al. 2025). `pg` is the policy gradient of the
reverse KL: a token's advantage is how much likelier the teacher finds it than the student that drew it,
`A = log(pi_T / pi_old)`, bounded from below as `log(alpha pi_T / pi_old + 1 - alpha)` (TOP-D). `kl` draws the student
to the teacher's likeliest tokens at each of its own. With two tokenizers, what is compared is the shortest runs of
tokens that spell the same, and candidates are mapped as for soft labels (`align`).
Needs: scoring; `kl` also alternatives beside the given tokens. Costs: one question a rollout, of its length in prompt
tokens; forced decoding sends it as one call a token. Loss: `pg`, or `topk_kl` with `beta`.
What it does not do: it looks no further than one token ahead (no discounted sum of later advantages), and it does not
say what is meant by a text that the teacher finds unlikely for its wording only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from blackbox_kd import health
from blackbox_kd.algorithms.base import Algorithm, AlgorithmConfig, Outcome, Tools, pg_sample, soft_sample
from blackbox_kd.align import SoftLabels, Span
from blackbox_kd.errors import AlignmentError
from blackbox_kd.progress import say
from blackbox_kd.soft_labels import aligner_of
from blackbox_kd.student.render import Renderer
from blackbox_kd.teachers.base import Capabilities
from blackbox_kd.teachers.teacher import Teacher
from blackbox_kd.types import Feedback, Rollout, TeacherTokens, TopK, TrainSample, scorer


class ScoreConfig(AlgorithmConfig):
    """The teacher scores the student's tokens."""

    name: Literal["score"] = "score"
    loss: Literal["pg", "kl"] = "pg"
    """Reverse KL by policy gradient on the drawn tokens, or a KL on the teacher's likeliest tokens at each of them."""
    alpha: float = Field(0.9, gt=0, le=1)
    """Of pg: no advantage is below log(1 - alpha). 1: unbounded."""
    spread: Literal["whole", "even"] = "whole"
    """Of pg, where a run of several tokens is compared: each of them gets all of its advantage, or an equal part."""
    clip: float | None = Field(0.2, gt=0)
    """Of pg: how far from 1 an importance ratio is still pushed (PPO); null: not clipped."""
    beta: float = Field(1.0, ge=0, le=1)
    """Of kl: 0 forward KL, 1 reverse KL, between them GKD's Jensen-Shannon divergence."""
    top_logprobs: int = Field(20, ge=1)
    """Alternatives asked for at each token; no more than the endpoint was seen to give."""

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Of `pg` or `topk_kl`."""
        return {"pg": {"clip": self.clip}} if self.loss == "pg" else {"topk_kl": {"beta": self.beta}}

    def lacking(self, can: Capabilities) -> str | None:
        """Scoring; alternatives for kl."""
        if can.scoring == "none":
            return "the endpoint cannot score given tokens, as far as is known (scoring: none); run `probe`"
        if self.loss == "kl" and not can.top_logprobs_max:
            return "loss kl needs alternatives beside tokens (top_logprobs_max: 0); run `probe`, or take loss pg"
        return None

    @property
    def calls_per_rollout(self) -> float:
        """One question."""
        return 1.0

    def calls_for(self, can: Capabilities, length: int) -> float:
        """Forced decoding makes one for each token, the end token included."""
        return length + 1.0 if can.scoring == "forced" else 1.0

    @property
    def reply_tokens(self) -> int:
        """One is written beside those that are scored."""
        return 1

    def build(self, tools: Tools) -> Score:
        """No files to read."""
        return Score(self, tools.teacher, tools.renderer)


class Scored(NamedTuple):
    """A rollout with the teacher's view of its S tokens."""

    rollout: Rollout
    tokens: TeacherTokens
    spans: list[Span]
    labels: SoftLabels


class Score(Algorithm):
    """See the module."""

    def __init__(self, config: ScoreConfig, teacher: Teacher, renderer: Renderer) -> None:
        self._config, self._teacher, self._renderer = config, teacher, renderer
        self._by = scorer(teacher.config.model, teacher.context.context_hash)

    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """A sample of each rollout that the teacher could score."""
        top = min(self._config.top_logprobs, self._teacher.capabilities.top_logprobs_max or 1)
        items = [(rollout.prompt, rollout.completion) for rollout in rollouts]
        tokens = await self._teacher.score(items, top=top, round_=round_)
        scored = self._aligned([r for r in rollouts if r.completion.completion_id in tokens], tokens)
        make = {"pg": self._advantages, "kl": self._targets}[self._config.loss]
        samples = [sample for each in scored if (sample := make(each))]
        return Outcome(
            feedback=[self._feedback(each) for each in scored],
            samples=samples,
            asked=len(rollouts),
            failed=len(rollouts) - len(samples),
            metrics=metrics(scored),
        )

    def _aligned(self, rollouts: Sequence[Rollout], tokens: dict[str, TeacherTokens]) -> list[Scored]:
        """Those whose tokens spell the same on both sides."""
        from blackbox_kd.student.vocabulary import student_vocab

        triples = [(r.completion.text, tokens[r.completion.completion_id], r.completion_ids) for r in rollouts]
        student = student_vocab(self._renderer.tokenizer, self._renderer.end_id)
        teacher = self._teacher
        aligner = aligner_of(
            teacher.corpus, student, self._renderer, teacher.config.model, self._by, triples, written_by_teacher=False
        )
        found, wrong = list[Scored](), list[str]()
        for rollout, triple in zip(rollouts, triples, strict=True):
            try:
                labels = aligner.align(*triple, written_by_teacher=False)
                found.append(Scored(rollout, triple[1], aligner.spans(*triple), labels))
            except AlignmentError as error:
                wrong.append(str(error))
        if wrong:
            say(f"score: {len(wrong)} of {len(rollouts)} rollouts are left out, their tokens do not fit ({wrong[0]})")
        return found

    def _advantages(self, scored: Scored) -> TrainSample | None:
        config, rollout = self._config, scored.rollout
        ratios, sizes = log_ratios(scored)
        values = bounded(ratios, config.alpha) / (sizes if config.spread == "even" else 1)
        values = np.where(np.isfinite(values), values, 0.0)
        return pg_sample(rollout, values.tolist()) if values.any() else None

    def _targets(self, scored: Scored) -> TrainSample | None:
        labels = scored.labels
        labelled = with_label(labels)
        soft = TopK(labels.ids[labelled], labels.logprobs[labelled])
        return soft_sample(scored.rollout, labelled.tolist(), soft) if labelled.any() else None

    def _feedback(self, scored: Scored) -> Feedback:
        """The mean logprob that the teacher gives to what the student wrote, nats a token of the teacher's."""
        inside = np.concatenate([[], *(scored.tokens.token_logprobs[span.teacher] for span in scored.spans)])
        known = inside[np.isfinite(inside)]
        value = float(known.mean()) if len(known) else None
        return Feedback(
            completion_id=scored.rollout.completion.completion_id, kind="score", scorer=self._by, value=value
        )


def with_label(labels: SoftLabels) -> np.ndarray:
    """(S,) whether a token has any."""
    found: np.ndarray = np.any(labels.logprobs > -np.inf, axis=1)
    return found


def log_ratios(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """(S,) `log pi_T(g) - log pi_S(g)` of the span g that a token is in, in nats, and (S,) how many tokens g has.

    NaN where a token is in none, or the endpoint hides a logprob.
    """
    own = np.asarray(scored.rollout.logprobs)
    ratios, sizes = np.full(len(own), np.nan), np.ones(len(own))
    for student, teacher in scored.spans:
        ratios[student] = scored.tokens.token_logprobs[teacher].sum() - own[student].sum()
        sizes[student] = student.stop - student.start
    return ratios, sizes


def bounded(ratios: np.ndarray, alpha: float) -> np.ndarray:
    """`log(alpha r + 1 - alpha)` of log r: never below log(1 - alpha), and log r where alpha is 1 (TOP-D)."""
    return ratios if alpha == 1 else np.logaddexp(np.log(alpha) + ratios, np.log1p(-alpha))


def metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """How far the student is from the teacher on its own tokens, and how much of that the scores show.

    `reverse_kl`: mean `log pi_S - log pi_T`, nats a token. `coverage`: share of tokens that are compared; `one_to_one`:
    those alone with one of the teacher's. `overlap_top_k`: share of the teacher's candidates among the student's top-k.
    `captured_mass`: of the teacher's candidates that have an image.
    """
    tokens = sum(len(each.rollout.completion_ids) for each in scored)
    sums = [(ratios[s.start], s.stop - s.start, t.stop - t.start)
            for ratios, spans in ((log_ratios(each)[0], each.spans) for each in scored) for s, t in spans]  # fmt: skip
    known = [row for row in sums if np.isfinite(row[0])]
    if not known:
        return {}
    covered = sum(size for _, size, _ in known)
    found = {
        "reverse_kl": -float(sum(ratio for ratio, _, _ in known)) / covered,
        "coverage": covered / tokens,
        "one_to_one": sum(s == t == 1 for _, s, t in known) / tokens,
    }
    places = [place for each in scored for place in _places(each)]
    for name, values in {
        "captured_mass": [(place.mass, place.depth) for place in places],
        "overlap_top_k": [(place.overlap, place.depth) for place in places if place.overlap is not None],
    }.items():
        if values:
            numbers, depths = zip(*values, strict=True)
            found |= {name: float(np.mean(numbers))} | health.by_depth(name, numbers, depths)
    return found


class _Place(NamedTuple):
    """A token that has a label."""

    depth: float
    """0 at the start of its text, near 1 at its end."""
    mass: float
    overlap: float | None
    """None where the student's likeliest were not kept."""


def _places(scored: Scored) -> list[_Place]:
    own, labels = scored.rollout.top, scored.labels
    return [
        _Place(
            depth=i / len(labels.ids),
            mass=float(np.exp(labels.logprobs[i]).sum()),
            overlap=health.overlap(_row(labels, i), _row(own, i)) if own is not None else None,
        )
        for i in np.flatnonzero(with_label(labels)).tolist()
    ]


def _row(top: TopK | SoftLabels, i: int) -> TopK:
    return TopK(top.ids[i : i + 1], top.logprobs[i : i + 1])
