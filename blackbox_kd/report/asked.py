"""How a run asks, by its config: the corpus finds the answers that are the run's by it."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from blackbox_kd.config import validate
from blackbox_kd.corpus.run_rows import Asked
from blackbox_kd.hashing import canonical_json
from blackbox_kd.sections import SampleConfig, Section
from blackbox_kd.settings import JudgedConfig, TeacherChoice
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.teachers.wire import chat_body
from blackbox_kd.types import SamplingParams
from blackbox_kd.yardstick import fixed_sampling


class Asking(Section):
    """What of a config decides how the teacher is asked; the rest may be of another version."""

    model_config = ConfigDict(extra="ignore")

    teacher: TeacherChoice
    sample: SampleConfig
    evaluate: JudgedConfig


def asked(resolved: dict[str, Any]) -> Asked:
    """Of a resolved config; no file that it names is read.

    Raises:
        ConfigError: this version does not know such a section.
    """
    config = validate(Asking, resolved, "the config of the run")
    greedy, drawn = fixed_sampling(config.evaluate)
    return Asked(
        sample=_body(config.teacher, config.sample.sampling),
        draws=config.sample.draws,
        greedy=_body(config.teacher, greedy),
        drawn=_body(config.teacher, drawn),
        length=config.evaluate.max_completion_length,
    )


def _body(teacher: TeacherConfig, sampling: SamplingParams) -> str:
    return canonical_json(chat_body(teacher, [], sampling, 0))
