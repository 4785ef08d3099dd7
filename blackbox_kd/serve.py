"""`serve-teacher`: the embedded local teacher of a config as an OpenAI-compatible endpoint, until Ctrl-C.

    blackbox-kd serve-teacher --config quickstart --port 8080

Then, from anywhere: provider openai, base_url http://127.0.0.1:8080/v1, api_key_env null, the same `teacher.model`.
"""

from __future__ import annotations

import asyncio
import sys

from blackbox_kd.command import guarded, overrides, parser
from blackbox_kd.config import load_config
from blackbox_kd.errors import ConfigError
from blackbox_kd.settings import Config
from blackbox_kd.teachers.local import LocalTeacherConfig, serve


async def run(teacher: LocalTeacherConfig, port: int) -> None:
    """Serve until cancelled."""
    async with serve(teacher, port=port) as base_url:
        print(f"{teacher.model} at {base_url}  (Ctrl-C ends it)", flush=True)
        await asyncio.Event().wait()


def main(argv: list[str] | None = None) -> int:
    """The command."""
    made = parser("serve-teacher", __doc__)
    made.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    flags, rest = made.parse_known_args(argv)

    def body() -> int:
        config = load_config(Config, flags.config, overrides(rest))
        if not isinstance(config.teacher, LocalTeacherConfig):
            raise ConfigError("serve-teacher needs teacher.provider local")
        config.teacher.check()
        asyncio.run(run(config.teacher, flags.port))
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
