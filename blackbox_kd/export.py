"""`export-corpus`: the corpus as files that others read.

    blackbox-kd export-corpus --out export

It writes
    sft.parquet, .jsonl          {"messages": [...]}: the view `sft` with the answer as the last turn
    preference.parquet, .jsonl   {"prompt", "chosen", "rejected"}: the student's text beside the teacher's
    tables/*.parquet             every table of the corpus, as it is
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blackbox_kd.command import OneLineParser, guarded
from blackbox_kd.corpus import export, query
from blackbox_kd.errors import ConfigError
from blackbox_kd.progress import busy
from blackbox_kd.sql import add_corpus_flag, corpus_of

_MESSAGES = """from_json(messages, '[{"role": "VARCHAR", "content": "VARCHAR"}]')"""
_TURN = "[{{'role': 'assistant', 'content': {}}}]"

DATASETS = {
    "sft": f"SELECT {_MESSAGES} || {_TURN.format('text')} AS messages FROM sft ORDER BY completion_id",
    "preference": f"SELECT {_MESSAGES} AS prompt, {_TURN.format('chosen')} AS chosen, "
    f"{_TURN.format('rejected')} AS rejected FROM pairs ORDER BY completion_id, round",
}


def run(corpus: Path, out: Path) -> dict[str, int]:
    """Write the files; rows by file name. A data set without rows is not written.

    Raises:
        ConfigError: the folder cannot be made.
        CorpusError: the corpus cannot be read, or a file not be written.
    """
    _, tables = query(corpus, "SELECT table_name FROM duckdb_tables() ORDER BY ALL")
    try:
        (out / "tables").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error
    written = {}
    for name, select in DATASETS.items():
        for target in (out / f"{name}.parquet", out / f"{name}.jsonl"):
            rows = export(corpus, select, target)
            if rows == 0:
                target.unlink()
            else:
                written[target.name] = rows
    for (table,) in tables:
        written[f"tables/{table}.parquet"] = export(
            corpus, f"SELECT * FROM {table}", out / "tables" / f"{table}.parquet"
        )
    return written


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(
        prog="blackbox-kd export-corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    add_corpus_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        if flags.out.exists() and not flags.out.is_dir():
            raise ConfigError(f"--out {flags.out} is a file; name a folder")
        with busy(f"writing {flags.out}"):
            written = run(corpus_of(flags.corpus), flags.out)
        for name, rows in written.items():
            print(f"{rows:>8}  {flags.out / name}")
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
