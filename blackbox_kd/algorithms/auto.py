"""`auto`: the strongest algorithm that the endpoint can serve and the budget can pay for.

What it is: a choice, made once before the first round and kept for the run. Needs: what `probe` found.
The order is that of how much the teacher says about each token of the student's own sample: its log-probability
(`score`), its next tokens at the student's forks (`forks`), its continuation of the student's text (`prefix`), its
correction of the whole (`relabel`); `preference` asks nothing where `sample` has asked already.
What it does not do: it measures nothing, so it does not know which one is best for a task. `reward` and `gad` are never
chosen: one needs a judge that is worth believing, the other many rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from blackbox_kd.algorithms.base import AlgorithmConfig
from blackbox_kd.progress import say
from blackbox_kd.teachers.base import Capabilities


class AutoConfig(AlgorithmConfig):
    """See the module; the others' defaults are used."""

    name: Literal["auto"] = "auto"

    def lacking(self, can: Capabilities) -> str | None:
        """Nobody has looked."""
        return "nothing is known of the endpoint" if can == Capabilities() else None

    def resolve(
        self, candidates: Sequence[AlgorithmConfig], can: Capabilities, prompts: int, calls_left: int | None
    ) -> AlgorithmConfig:
        """The first of the candidates that serves; says which, why, what came second and why not the ones before.

        `prompts`: of all rounds together. `calls_left`: None where they are not capped.
        """
        reasons = {each.name: each.lacking(can) or too_many(each, prompts, calls_left) for each in candidates}
        able = [each for each in candidates if reasons[each.name] is None]
        chosen = able[0] if able else candidates[-1]
        passed = [f"not {name} ({reason})" for name, reason in reasons.items() if reason and name != chosen.name]
        second = [f"runner-up {able[1].name}"] if len(able) > 1 else []
        say(f"onpolicy.algorithm auto: {'; '.join([chosen.name, *second, *passed])}")
        return chosen


def too_many(algorithm: AlgorithmConfig, prompts: int, calls_left: int | None) -> str | None:
    """Why the budget is too small for it; None where it is not."""
    calls = round(prompts * algorithm.rollouts_per_prompt * algorithm.calls_per_rollout)
    if calls_left is None or calls <= calls_left:
        return None
    return f"its {calls} calls are more than the {calls_left} that budget.max_requests leaves"
