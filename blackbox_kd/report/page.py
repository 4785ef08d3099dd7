"""Facts -> one HTML page: everything is escaped, the style sheet is inside, there is no script."""

from __future__ import annotations

from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup

from blackbox_kd.report import charts, spend, words
from blackbox_kd.report.facts import Facts
from blackbox_kd.report.tokens import BOUNDS


def render(facts: Facts) -> str:
    """The page."""
    return _environment().get_template("page.html.j2").render(facts=facts)


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("blackbox_kd.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": words.number, "dollars": words.dollars, "interval": words.interval}
    style = resources.files("blackbox_kd.report").joinpath("style.css").read_text("utf-8")
    made.globals |= {"style": Markup(style), "charts": charts, "bounds": BOUNDS, "glossary": words.GLOSSARY,
                     "gate_words": words.gate_words, "rows_are": spend.ROWS_ARE}  # fmt: skip
    return made
