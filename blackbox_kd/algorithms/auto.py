"""`auto`: what came nearest to the teacher for the same teacher tokens, as far as the budget goes.

What it is: a choice, made once before the first round, after benchmarks/results/equal_spend.json (docs/equal_spend.md).
No loop was nearer there, on average over the spends, than `relabel` afresh and `preference` over fresh samples; `sft`
on soft labels without a loop was as near. The first brings new answers in, and is taken where the budget pays for them:
a budget in tokens or dollars counts as so many calls at their worst case. The second learns from the answers that
`sample` has. Needs: chat. Costs: half a call a rollout, or none for prompts that `sample` has answered.
What it does not do: it measures nothing, and it chooses an algorithm only. The study had the teacher's top-logprobs to
learn from, and its afresh went over the samples of a round five times, in batches of 2 at 3e-4, seven of ten replayed:
that is for `onpolicy` to say. Where another algorithm is better on your task, name it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from blackbox_kd.algorithms.base import AlgorithmConfig
from blackbox_kd.algorithms.preference import PreferenceConfig
from blackbox_kd.algorithms.relabel import RelabelConfig


class AutoConfig(AlgorithmConfig):
    """See the module; everything else is the chosen one's default."""

    name: Literal["auto"] = "auto"
    max_completion_length: int = Field(256, ge=1)
    """Tokens of a new answer."""

    @property
    def candidates(self) -> tuple[RelabelConfig, PreferenceConfig]:
        """What it chooses from."""
        afresh = RelabelConfig(mode="afresh", max_completion_length=self.max_completion_length)
        return afresh, PreferenceConfig(rejected="fresh")

    def resolve(
        self, rounds: int, prompts: int, unanswered: int, left: Callable[[], int | None]
    ) -> tuple[AlgorithmConfig, str]:
        """The first where the budget pays for it, or the other would take no less."""
        afresh, preference = self.candidates
        needed, calls = rounds * max(1, round(prompts * afresh.calls_per_rollout)), left()
        if calls is None or needed <= max(calls, unanswered):
            return afresh, "relabel afresh"
        unpaid = f"not relabel afresh (its {needed} calls are more than the {max(0, calls)} that the budget leaves)"
        return preference, f"preference over fresh samples; {unpaid}"
