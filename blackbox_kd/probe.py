"""`probe`: what the teacher's endpoint can do, found out by about a dozen calls of a few tokens.

    blackbox-kd probe --config quickstart

Reads   nothing.    Writes   capabilities.
A rejected call only means that the endpoint cannot do it. `teacher.capabilities` wins over what is found.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from blackbox_kd.command import stage_main
from blackbox_kd.errors import TeacherRefused
from blackbox_kd.progress import say
from blackbox_kd.project import Project
from blackbox_kd.sql import show
from blackbox_kd.teachers.probe import probe


async def run(project: Project) -> dict[str, Any]:
    """The capabilities that later stages go by, and how each was found."""
    config = project.config.teacher
    say(f"probing {config.model}: about a dozen short calls")
    found = await probe(config, project.teacher.engine.call)
    project.teacher.set_capabilities(found)
    details = {name: detail for name, (_, detail) in found.items()}
    for name in config.capabilities:
        details[name] = f"set in teacher.capabilities; found {found[name][0]} ({details[name]})"
    return {
        "model": config.model,
        "base_url": config.address,
        "capabilities": msgspec.structs.asdict(project.teacher.capabilities),
        "details": details,
    }


async def ensure(project: Project) -> None:
    """Look at the endpoint where the on-policy algorithm depends on it and nobody has looked.

    Raises:
        TeacherRefused: the endpoint cannot do what the algorithm needs.
    """
    teacher = project.teacher
    if project.why:
        say(f"onpolicy.algorithm auto: {project.why}")
    algorithm = project.config.onpolicy.algorithm
    if algorithm.lacking(teacher.capabilities) and not teacher.probed():
        await run(project)
    if lacking := algorithm.lacking(teacher.capabilities):
        raise TeacherRefused(f"onpolicy.algorithm {algorithm.name}: {lacking}")


def show_found(_: Project, result: dict[str, Any]) -> None:
    """A row a capability."""
    rows = [(name, str(value), result["details"][name]) for name, value in result["capabilities"].items()]
    show(["capability", "value", "how it was found"], rows)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return stage_main("probe", __doc__, run, argv, show=show_found)


if __name__ == "__main__":
    sys.exit(main())
