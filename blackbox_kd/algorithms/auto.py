"""`auto`: the strongest algorithm that the endpoint can serve and the budget can pay for.

What it is: a choice, made once before the first round. Needs: what `probe` found; `onpolicy` and `run` probe where
nobody has. A budget in tokens or dollars counts as so many calls at their worst case. The order is that of how much the
teacher says about each token of the student's own sample: its log-probability (`score`), its next tokens where the
student is least sure (`forks`), its continuation of the student's text (`prefix`), its correction of the whole
(`relabel`); `preference` asks nothing where `sample` has asked already.
What it does not do: it does not know what is best for a task, since it measures nothing. `reward` and `gad` are never
chosen: the one needs a judge that is worth believing, the other many rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from blackbox_kd.algorithms.base import AlgorithmConfig
from blackbox_kd.algorithms.forks import ForksConfig
from blackbox_kd.algorithms.preference import PreferenceConfig
from blackbox_kd.algorithms.prefix import PrefixConfig
from blackbox_kd.algorithms.relabel import RelabelConfig
from blackbox_kd.algorithms.score import ScoreConfig
from blackbox_kd.teachers.base import Capabilities

MOST_CALLS = 8
"""For one rollout; forced decoding takes one for each of its tokens, and each is billed with the whole prompt."""


class AutoConfig(AlgorithmConfig):
    """See the module; everything else is the chosen one's default."""

    name: Literal["auto"] = "auto"
    max_completion_length: int = Field(256, ge=1)
    """Tokens of a reply, where the chosen one asks for text."""

    @property
    def strongest_first(self) -> list[AlgorithmConfig]:
        """What it chooses from."""
        length = self.max_completion_length
        return [
            ScoreConfig(),
            ForksConfig(),
            PrefixConfig(max_completion_length=length),
            RelabelConfig(max_completion_length=length),
            PreferenceConfig(),
        ]

    def lacking(self, can: Capabilities) -> str | None:
        """Somebody to look."""
        return "nobody has probed the endpoint" if can == Capabilities() else None

    def resolve(
        self, can: Capabilities, prompts: int, length: int, left: Callable[[], int | None]
    ) -> tuple[AlgorithmConfig, str]:
        """The first that serves; the last one where none does."""
        calls = left()
        reasons = {
            each.name: each.lacking(can) or too_many(each, each.calls_for(can, length), prompts, calls)
            for each in self.strongest_first
        }
        able = [each for each in self.strongest_first if reasons[each.name] is None] or self.strongest_first[-1:]
        chosen, *others = able
        told = [chosen.name] + ([f"runner-up {others[0].name}"] if others else [])
        told += [f"not {name} ({reason})" for name, reason in reasons.items() if reason and name != chosen.name]
        return chosen, "; ".join(told)


def too_many(algorithm: AlgorithmConfig, calls_per_rollout: float, prompts: int, calls: int | None) -> str | None:
    """Why it takes more calls than it should, or than the budget has; None where it does not."""
    if calls_per_rollout > MOST_CALLS:
        return f"it would take {calls_per_rollout:g} calls for each rollout"
    needed = round(prompts * algorithm.rollouts_per_prompt * calls_per_rollout)
    if calls is None or needed <= calls or algorithm.reply_tokens is None:
        return None
    return f"its {needed} calls are more than the {max(0, calls)} that the budget leaves for it"
