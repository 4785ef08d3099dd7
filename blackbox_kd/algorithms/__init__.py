"""On-policy algorithms by name. A new one is a file with an `AlgorithmConfig` and one line here.

From outside, name the class in the entry-point group `blackbox_kd.algorithms`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from blackbox_kd.algorithms.auto import AutoConfig
from blackbox_kd.algorithms.base import AlgorithmConfig
from blackbox_kd.algorithms.forks import ForksConfig
from blackbox_kd.algorithms.gad import GadConfig
from blackbox_kd.algorithms.preference import PreferenceConfig
from blackbox_kd.algorithms.prefix import PrefixConfig
from blackbox_kd.algorithms.relabel import RelabelConfig
from blackbox_kd.algorithms.reward import RewardConfig
from blackbox_kd.algorithms.score import ScoreConfig


def algorithms() -> list[type[AlgorithmConfig]]:
    """All algorithm configs, ours and those of installed packages."""
    ours: list[type[AlgorithmConfig]] = [
        AutoConfig, RelabelConfig, PrefixConfig, ForksConfig, PreferenceConfig, RewardConfig, ScoreConfig, GadConfig,
    ]  # fmt: skip
    return ours + [point.load() for point in entry_points(group="blackbox_kd.algorithms")]
