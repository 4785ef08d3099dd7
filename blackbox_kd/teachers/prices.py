"""What a teacher's tokens cost: the config's own prices, else litellm's table where that package is installed.

https://github.com/BerriAI/litellm/blob/main/model_prices_and_context_window.json
"""

from __future__ import annotations

from importlib import util
from pathlib import Path

import msgspec

from blackbox_kd.errors import ConfigError
from blackbox_kd.teachers.base import PriceConfig, TeacherConfig

TABLE = "model_prices_and_context_window_backup.json"


class _Entry(msgspec.Struct):
    """US dollars for one token; None where the table does not say."""

    input_cost_per_token: float | None = None
    output_cost_per_token: float | None = None
    cache_read_input_token_cost: float | None = None


def price_of(config: TeacherConfig) -> PriceConfig | None:
    """Dollars for a million tokens; None where nobody says.

    Raises:
        ConfigError: litellm is installed, but its table cannot be read.
    """
    return config.price or _listed(config.listed_as())


def _listed(names: list[str]) -> PriceConfig | None:
    path = _table() if names else None
    if path is None:
        return None
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        entries = [msgspec.json.decode(rows[name], type=_Entry) for name in names if name in rows]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"cannot read the prices in {path} ({error}): set teacher.price") from error
    return next((price for price in map(_price, entries) if price), None)


def _table() -> Path | None:
    """The file in the installed package, which is not imported: that takes seconds."""
    spec = util.find_spec("litellm")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder) / TABLE).is_file()), None)


def _price(entry: _Entry) -> PriceConfig | None:
    if entry.input_cost_per_token is None or entry.output_cost_per_token is None:
        return None
    cached = entry.cache_read_input_token_cost
    return PriceConfig(
        input=1e6 * entry.input_cost_per_token,
        cached_input=None if cached is None else 1e6 * cached,
        output=1e6 * entry.output_cost_per_token,
    )
