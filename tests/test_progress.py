"""Progress: a bar on a terminal, now and then a plain line elsewhere, and never anything on stdout."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from blackbox_kd import progress
from tests.pages import ROOT


def command(project_file: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "blackbox_kd", *words, "--config", str(project_file), "--json"]


def on_terminal(words: list[str]) -> tuple[str, str]:
    """stdout of a command, and what its stderr shows on a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
        os.close(ours)
        assert process.stdout
        return process.stdout.read(), shown.decode()


def test_on_a_terminal_a_stage_shows_bars_and_stdout_is_one_object(project_file: Path) -> None:
    out, shown = on_terminal(command(project_file, "sample"))
    assert json.loads(out)
    assert "\x1b[" in shown
    assert "sample" in shown
    assert "━" in shown
    out, shown = on_terminal(command(project_file, "sft"))
    assert json.loads(out)["steps"] == 4
    for bar in ("loading", "aligning", "sft"):
        assert bar in shown


def test_in_a_pipe_there_are_lines_without_control_characters(project_file: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(project_file, "sample"), env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    assert len(done.stderr.splitlines()) < 5


def test_without_a_terminal_a_long_job_says_how_far_it_is_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.counting("reading", 100) as counter:
        for _ in range(100):
            now[0] += 1.0
            counter.advance(note="fast")
    shown = capsys.readouterr()
    assert [line.strip() for line in shown.err.splitlines()] == [f"reading: {n} of 100 fast" for n in range(16, 97, 16)]
    assert shown.out == ""
