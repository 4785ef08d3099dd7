"""Claims: what somebody asks is asked by nobody else, in this process or another one, until it lets go or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blackbox_kd.corpus.claims import FILES, Claims
from blackbox_kd.errors import CorpusError
from blackbox_kd.hashing import content_id

KEYS = {content_id([i]) for i in range(50)}
A, B, C = sorted(KEYS)[:3]

HOLD = """
import pathlib, sys
from blackbox_kd.corpus.claims import Claims
with Claims(pathlib.Path(sys.argv[1]), set()) as claims:
    print(len(claims.take(set(sys.argv[2:]))), flush=True)
    for line in sys.stdin:
        claims.free({line.strip()})
        print("freed", flush=True)
"""


@contextmanager
def elsewhere(corpus: Path, *keys: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds these claims; it frees each that it reads."""
    command, pipe = [sys.executable, "-c", HOLD, str(corpus), *keys], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as other:
        assert other.stdout
        assert other.stdin
        assert other.stdout.readline() == f"{len(keys)}\n"
        yield other
        other.stdin.close()


def test_what_another_process_asks_is_not_taken_until_it_lets_go(tmp_path: Path) -> None:
    with elsewhere(tmp_path / "c", A, B) as other, Claims(tmp_path / "c", set()) as claims:
        assert claims.take(KEYS) == KEYS - {A, B}
        assert other.stdin
        assert other.stdout
        other.stdin.write(f"{A}\n")
        other.stdout.readline()
        assert claims.take({A, B}) == {A}
        assert claims.mine == KEYS - {B}


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    with elsewhere(tmp_path / "c", A) as other, Claims(tmp_path / "c", set()) as claims:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert claims.take({A}) == {A}


def test_another_call_in_this_process_is_another_asker(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", set()) as one, Claims(tmp_path / "c", set()) as two:
        assert one.take({A, B}) == {A, B}
        assert two.take({A, C}) == {C}
        one.free({A, C})
        assert two.take({A, B, C}) == {A}


def test_one_call_that_ends_keeps_the_claims_of_another(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "c")  # the same corpus by another name
    with Claims(tmp_path / "c", set()) as one:
        one.take({A})
        with Claims(tmp_path / "link", set()) as two:
            two.take({B})
        command = [sys.executable, "-c", HOLD, str(tmp_path / "c"), A, B]
        assert subprocess.run(command, input="", capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_claim_lasts_until_its_question_is_neither_asked_nor_waiting_for_duckdb(tmp_path: Path) -> None:
    asking: set[str] = set()
    with Claims(tmp_path / "c", asking) as claims:
        claims.take({A, B, C})
        assert asking == {A, B, C}
        asking -= {A, B}
        claims.free_settled(lambda: {B})
        assert claims.mine == {B, C}
        claims.free_settled(lambda: set())
        assert claims.mine == {C}


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_the_files_stay_empty_and_no_descriptor_is_left(tmp_path: Path) -> None:
    before = descriptors()
    with Claims(tmp_path / "c", set()) as claims:
        claims.take(KEYS)
        assert descriptors() == before + FILES
    assert {file.stat().st_size for file in (tmp_path / "c.claims").iterdir()} == {0}
    assert descriptors() == before


def test_after_the_end_nothing_is_taken(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", set()) as one:
        one.take({A})
    assert one.take({B}) == set()
    assert one.mine == set()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"cannot make .*\.claims: No such file"):
        Claims(tmp_path / "none" / "c", set()).__enter__()
