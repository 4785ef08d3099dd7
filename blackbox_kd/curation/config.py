"""The section `curate`: what becomes of an answer that a rule finds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from blackbox_kd.sections import Section

Action = Annotated[Literal["drop", "flag", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
"""drop: it is not learnt. flag: it is, and noted. off: the rule is not asked. YAML reads a bare `off` as false."""


class CurateConfig(Section):
    """What `sft` learns of the teacher's answers: each rule is drop, flag or off. Nothing is deleted."""

    refusal: Action = "drop"
    """An answer that begins like a refusal."""
    refusal_phrases: list[str] = []
    """More of such beginnings, as of another language; case and blanks do not matter."""
    degenerate: Action = "drop"
    """An answer that is mostly one n-gram again and again."""
    pii: Action = "flag"
    """A mail address, a telephone number or an API key in an answer."""
    eval_overlap: Action = "flag"
    """An n-gram of an evaluation prompt in prompt or answer."""
    overlap_ngram: int = Field(13, ge=3)
    """Words of such an n-gram; an evaluation prompt of fewer, but at least 8, is looked for as a whole."""
    length_outlier: Action = "flag"
    """An answer whose length is far from that of the others."""
    length_z: float = Field(5.0, gt=0)
    """How far: robust deviations (median and MAD) of the log of its tokens."""
    near_duplicate: Action = "drop"
    """Another prompt's answer again, under nearly the same prompt; the first stays."""
    jaccard: float = Field(0.9, gt=0, le=1)
    """Of the word pairs of prompt and of answer, from where they are nearly the same; 1: only equal ones."""
    best_of_n: Action = "off"
    """All answers to a prompt but the one that `judge` grades best; one call a prompt with different answers."""
    grades_template: str = "prompts/grades.md.j2"
    """Jinja file of the question to the judge; it may use {{ prompt }}, {{ answers }} and {{ references }} (none)."""
