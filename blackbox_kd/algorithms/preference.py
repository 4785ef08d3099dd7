"""`preference`: the teacher's answer is chosen, the student's own sample is rejected.

What it is: DPO (Rafailov et al. 2023) with the teacher as the winner, anchored by the NLL of the chosen answer so that
its likelihood does not fall with that of the rejected one (Pang et al. 2024). `snapshot` rejects what the base model
wrote before any training, once (SODA, 2604.03873); `fresh` rejects what the student writes in each round.
Needs: chat. Costs: nothing for prompts that `sample` has answered, which come first; one call for each other prompt.
Loss: `pair` against the checkpoint that the stage started from, and `ce` on the chosen answer with weight `anchor`.
What it does not do: it asks no judge. An answer of the student that equals the teacher's makes no pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from blackbox_kd.algorithms.base import Algorithm, AlgorithmConfig, Outcome, Tools, on_completion
from blackbox_kd.judging import usable_text
from blackbox_kd.types import Completion, Feedback, Rollout, TrainSample, scorer


class PreferenceConfig(AlgorithmConfig):
    """The teacher's answer over the student's."""

    name: Literal["preference"] = "preference"
    rejected: Literal["snapshot", "fresh"] = "snapshot"
    """Whose sample is rejected: the base model's, or the student's of this round."""
    beta: float = Field(0.1, gt=0)
    """Of DPO, 1/nats: how far the margin may take the student from where the stage started."""
    anchor: float = Field(1.0, ge=0)
    """Weight of the chosen answer's NLL, a token."""

    @property
    def learning_rate(self) -> float:
        """Of texts."""
        return 1e-5

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Of DPO."""
        return {"pair": {"beta": self.beta}}

    @property
    def writer(self) -> Literal["student", "base"]:
        """By `rejected`."""
        return "base" if self.rejected == "snapshot" else "student"

    @property
    def prompts(self) -> Literal["fresh", "sampled"]:
        """The teacher's answers to these are paid for."""
        return "sampled"

    @property
    def calls_per_rollout(self) -> float:
        """At most: prompts that `sample` has answered cost none."""
        return 1.0

    @property
    def reply_tokens(self) -> None:
        """As by `sample`."""
        return None

    def build(self, tools: Tools) -> Preference:
        """No files to read."""
        return Preference(self, tools)


class Preference(Algorithm):
    """See the module."""

    def __init__(self, config: PreferenceConfig, tools: Tools) -> None:
        self._config, self._teacher, self._renderer = config, tools.teacher, tools.renderer
        self._dropped = tools.dropped

    async def feedback(self, rollouts: Sequence[Rollout], round_: int) -> Outcome:
        """A pair for each rollout that differs from the teacher's answer."""
        requests = [self._teacher.answer(rollout.prompt) for rollout in rollouts]
        answers = await self._teacher.answers(requests, round_=round_, description="preference")
        feedback, samples, failed, equal, dropped = list[Feedback](), list[TrainSample](), 0, 0, 0
        for rollout, request in zip(rollouts, requests, strict=True):
            answer = answers.get(request.request_key)
            text = usable_text(answer)
            if answer is None or text is None or not rollout.completion_ids:
                failed += 1
            elif answer.completion_id in self._dropped:
                dropped += 1
            elif text == rollout.completion.text.strip():
                equal += 1
            else:
                samples += self._pair(rollout, answer, text)
                by = scorer(request.model, request.context_hash)
                feedback.append(
                    Feedback(
                        completion_id=rollout.completion.completion_id,
                        kind="preference",
                        scorer=by,
                        target_completion_id=answer.completion_id,
                    )
                )
        return Outcome(
            feedback=feedback,
            samples=samples,
            asked=len(rollouts),
            failed=failed,
            dropped=dropped,
            metrics={"equal_answers": equal / max(1, len(rollouts))},
        )

    def _pair(self, rollout: Rollout, answer: Completion, text: str) -> list[TrainSample]:
        chosen_ids, rejected_ids = self._renderer.completion(text), rollout.completion_ids
        pair_id = rollout.completion.completion_id
        chosen = {"pair": on_completion(rollout.prompt_ids, 1.0, len(chosen_ids))}
        if self._config.anchor:
            chosen["ce"] = on_completion(rollout.prompt_ids, self._config.anchor, len(chosen_ids))
        return [
            TrainSample(
                sample_id=f"{pair_id}/chosen/{answer.completion_id}",
                input_ids=[*rollout.prompt_ids, *chosen_ids],
                weights=chosen,
                pair_id=pair_id,
            ),
            TrainSample(
                sample_id=f"{pair_id}/rejected",
                input_ids=[*rollout.prompt_ids, *rejected_ids],
                weights={"pair": on_completion(rollout.prompt_ids, -1.0, len(rejected_ids))},
                pair_id=pair_id,
            ),
        ]
