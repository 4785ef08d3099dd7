"""Who teaches: providers by name. A new one is a file with a `TeacherConfig` and one line here.

From outside, name the class in the entry-point group `blackbox_kd.teachers`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.teachers.local import LocalTeacherConfig
from blackbox_kd.teachers.openai import OpenAITeacherConfig
from blackbox_kd.teachers.scripted import ScriptedTeacherConfig


def providers() -> list[type[TeacherConfig]]:
    """All provider configs, ours and those of installed packages."""
    ours: list[type[TeacherConfig]] = [OpenAITeacherConfig, LocalTeacherConfig, ScriptedTeacherConfig]
    return ours + [point.load() for point in entry_points(group="blackbox_kd.teachers")]
