"""Prices: the config's own, else those of a table that somebody else keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.errors import ConfigError
from blackbox_kd.teachers.base import PriceConfig
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.prices import TABLE, price_of
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig

Install = Callable[[str], int]

ROWS: dict[str, Any] = {
    "sample_spec": {"input_cost_per_token": "a text", "mode": "one of chat, ..."},
    "gpt-x": {"input_cost_per_token": 2e-06, "output_cost_per_token": 8e-06, "cache_read_input_token_cost": 5e-07},
    "deepseek/chat": {"input_cost_per_token": 2.8e-07, "output_cost_per_token": 4.2e-07, "max_tokens": "8192"},
    "chat": {"input_cost_per_token": 1, "output_cost_per_token": 1},
    "together_ai/llama": {"input_cost_per_token": 1e-06, "output_cost_per_token": 1e-06},
    "picture": {"input_cost_per_image": 0.1},
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A package litellm that cannot be imported, with this text as its table."""
    package = tmp_path / "site" / "litellm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    return (package / TABLE).write_text


def teacher(model: str, **changes: Any) -> OpenAITeacherConfig:
    return OpenAITeacherConfig(model=model, **{"base_url": "https://api.openai.com/v1", **changes})


def test_the_configs_price_counts(install: Install) -> None:
    install(json.dumps(ROWS))
    own = PriceConfig(input=1.0, output=2.0)
    assert price_of(teacher("gpt-x", price=own)) == own


def test_litellms_table_is_read_without_importing_it(install: Install) -> None:
    install(json.dumps(ROWS))
    price = price_of(teacher("gpt-x"))
    assert price is not None
    assert (price.input, price.cached_input, price.output) == pytest.approx((2.0, 0.5, 8.0))
    assert "litellm" not in sys.modules


@pytest.mark.parametrize(
    ("url", "model", "dollars"),
    [
        ("https://api.deepseek.com/v1", "chat", 0.28),
        ("https://api.together.xyz/v1", "llama", 1.0),
        ("http://127.0.0.1:8000/v1", "gpt-x", 2.0),
    ],
)
def test_the_hosts_own_price_comes_before_another_ones(install: Install, url: str, model: str, dollars: float) -> None:
    install(json.dumps(ROWS))
    price = price_of(teacher(model, base_url=url))
    assert price is not None
    assert price.input == pytest.approx(dollars)


def test_a_table_without_a_price_for_cached_tokens_leaves_it_open(install: Install) -> None:
    install(json.dumps(ROWS))
    price = price_of(teacher("chat", base_url="https://api.deepseek.com/v1"))
    assert price is not None
    assert price.cached_input is None


@pytest.mark.parametrize("model", ["unheard-of", "picture"])
def test_a_model_without_a_price_has_none(install: Install, model: str) -> None:
    install(json.dumps(ROWS))
    assert price_of(teacher(model)) is None


def test_a_teacher_whom_nobody_pays_is_not_looked_up(install: Install) -> None:
    install(json.dumps(ROWS))
    assert price_of(ScriptedTeacherConfig(model="gpt-x")) is None


def test_without_a_table_there_is_no_price(install: Install) -> None:
    assert price_of(teacher("gpt-x")) is None


@pytest.mark.parametrize("text", ["{", '{"gpt-x": {"input_cost_per_token": "much"}}'])
def test_a_table_that_cannot_be_read_is_said(install: Install, text: str) -> None:
    install(text)
    with pytest.raises(ConfigError, match=r"set teacher\.price"):
        price_of(teacher("gpt-x"))
