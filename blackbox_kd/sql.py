"""`sql "select ..."`: ask the corpus, read-only, also while a run goes on.

    blackbox-kd sql "from spend"
    blackbox-kd sql --json "select text from completions limit 3"

Tables and views: `sql "show tables"`. Without --corpus it is the corpus of the last run below ./runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from blackbox_kd.command import OneLineParser, guarded
from blackbox_kd.corpus import query
from blackbox_kd.errors import ConfigError
from blackbox_kd.progress import busy


def add_corpus_flag(parser: argparse.ArgumentParser) -> None:
    """--corpus, as every command that only reads has it."""
    parser.add_argument("--corpus", type=Path, help="corpus file; default: that of the last run below ./runs")


def corpus_of(flag: Path | None) -> Path:
    """The corpus that is meant.

    Raises:
        ConfigError: none is named, and there is no run below ./runs or none that has one.
    """
    if flag is not None:
        return flag
    run_dir = last_run("a corpus with --corpus FILE")
    config = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
    if isinstance(config, dict) and config.get("corpus"):
        return Path(config["corpus"])
    if (inside := run_dir / "corpus.duckdb").exists():  # a config that was put there by hand
        return inside
    raise ConfigError(f"{run_dir / 'config.yaml'} names no corpus: name one with --corpus FILE")


def last_run(otherwise: str) -> Path:
    """The directory of the run below ./runs that was started last.

    Raises:
        ConfigError: there is none; it says that one can name `otherwise`.
    """
    configs = sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise ConfigError(f"no run below {Path('runs').absolute()}: name {otherwise}")
    return configs[-1].parent


def show(columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """A table on a terminal, tab-separated lines elsewhere (for a pipe)."""
    console = Console()
    if not console.is_terminal:
        for row in [columns, *rows]:
            print("\t".join(_cell(value) for value in row))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table, markup=False)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("\t", " ").replace("\n", "\\n")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(
        prog="blackbox-kd sql", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("query", help="DuckDB SQL")
    add_corpus_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        with busy("asking the corpus"):
            columns, rows = query(corpus_of(flags.corpus), flags.query)
        if flags.json:
            for row in rows:
                print(json.dumps(dict(zip(columns, row, strict=True)), default=str, ensure_ascii=False))
        else:
            show(columns, rows)
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
