"""`doctor`: check a corpus, and say for each finding what to do.

    blackbox-kd doctor --corpus runs/quickstart/corpus.duckdb

Changes nothing. Exit code 0: healthy (what is marked `note` is worth knowing); 2: something must be done (`fix`).
"""

from __future__ import annotations

import argparse
import json
import sys

from blackbox_kd.command import OneLineParser, guarded
from blackbox_kd.corpus.checks import Finding, findings
from blackbox_kd.progress import busy
from blackbox_kd.sql import add_corpus_flag, corpus_of

UNHEALTHY = 2


def line(finding: Finding) -> str:
    """A finding as a person reads it."""
    advice = f"\n        -> {finding.advice}" if finding.advice else ""
    return f"{finding.level:<5} {finding.check}: {finding.found}{advice}"


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(
        prog="blackbox-kd doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        path = corpus_of(flags.corpus)
        with busy(f"checking {path}"):
            found = findings(path)
        healthy = all(finding.level != "fix" for finding in found)
        if flags.json:
            shown = [finding._asdict() for finding in found]
            print(json.dumps({"corpus": str(path), "healthy": healthy, "findings": shown}, ensure_ascii=False))
        else:
            print("\n".join(line(finding) for finding in found))
        return 0 if healthy else UNHEALTHY

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
