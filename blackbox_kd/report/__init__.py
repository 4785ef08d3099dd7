"""`report`: a run as one HTML page that needs nothing beside it: no network, no script, no other file.

    blackbox-kd report --run_dir runs/quickstart
    blackbox-kd report                              # the last run below ./runs

Reads   the run's corpus, config, summary.json and checkpoints; asks nobody, and needs neither key nor torch.
Writes  <run_dir>/report.html.
The same corpus gives the same page. A run that goes on, or was killed, gets a page of what there is so far.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import yaml

from blackbox_kd.command import OneLineParser, guarded
from blackbox_kd.errors import ConfigError
from blackbox_kd.report.facts import gather
from blackbox_kd.report.page import render
from blackbox_kd.run_dir import write_atomically
from blackbox_kd.sql import last_run

PAGE = "report.html"
MOST_BYTES = 2_000_000
"""Of a page."""
TEXT_LIMITS = (2000, 800, 300, 100)
"""Characters of a text that are shown; the first of these that makes a page small enough counts."""


def write(run_dir: Path, corpus: Path | None = None) -> Path:
    """Make the page of a run; returns its path. `corpus`: where it is not the one that the run's config names.

    Raises:
        ConfigError: there is no such run, there or in its corpus.
        CorpusError: the corpus cannot be opened.
    """
    try:
        run_id = str(json.loads((run_dir / "run.json").read_text("utf-8"))["run_id"])
        named = Path(yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))["corpus"])
    except FileNotFoundError as error:
        lacks = Path(error.filename).name
        raise ConfigError(f"no run in {run_dir}: it has no {lacks}; name one with --run_dir") from error
    page = fitted(lambda limit: render(gather(run_dir, run_id, corpus or named, limit)))
    write_atomically(run_dir / PAGE, page)
    return run_dir / PAGE


def fitted(cut: Callable[[int], str], most: int = MOST_BYTES) -> str:
    """The page with the longest texts that is small enough; with the shortest ones where none is."""
    for limit in TEXT_LIMITS:
        page = cut(limit)
        if len(page.encode()) < most:
            break
    return page


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(
        prog="blackbox-kd report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="the run; default: the last one below ./runs")
    parser.add_argument("--corpus", type=Path, help="its corpus; default: the one that its config names")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        print(write(flags.run_dir or last_run("one with --run_dir"), flags.corpus))
        return 0

    return guarded(body, debug=flags.debug)
