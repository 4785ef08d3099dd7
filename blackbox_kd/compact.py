"""`compact`: rewrite the corpus file without its dead space.

    blackbox-kd compact --corpus runs/quickstart/corpus.duckdb

Collecting in small batches leaves blocks that nobody uses; the copy holds the same rows in fewer bytes. What a killed
run left in the journal is ingested first. The old file is replaced only by a copy with the same rows, and not at all
while another program has it open.
"""

from __future__ import annotations

import argparse
import json
import sys

from blackbox_kd.command import OneLineParser, guarded
from blackbox_kd.corpus import Corpus, compact
from blackbox_kd.corpus.connection import READ_WAIT_S
from blackbox_kd.errors import ConfigError
from blackbox_kd.progress import busy
from blackbox_kd.sql import add_corpus_flag, corpus_of


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(
        prog="blackbox-kd compact", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        path = corpus_of(flags.corpus)
        if not path.exists():
            raise ConfigError(f"no corpus {str(path)!r}: name one with --corpus FILE")
        with busy(f"rewriting {path}"):
            Corpus(path, lock_wait_s=READ_WAIT_S)  # ingests what the journal holds
            before, after = compact(path)
        if flags.json:
            print(json.dumps({"corpus": str(path), "bytes_before": before, "bytes_after": after}))
        else:
            print(f"{path}: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
