"""The README is true: its tree, its schema, its commands and its SQL."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from blackbox_kd.__main__ import COMMANDS, main
from blackbox_kd.config import validate
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.teachers.openai import OpenAITeacherConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)
    assert found, f"no block {name}"
    return found.group(1)


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_schema_block_is_the_schema(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "c.duckdb")
    _, columns = query(
        corpus.path,
        "SELECT table_name, string_agg(column_name, ', ' ORDER BY column_index) FROM duckdb_columns() "
        "JOIN duckdb_tables() USING (table_name) GROUP BY ALL",
    )
    shown = dict(re.findall(r"(\w+)\((.*?)\)", re.sub(r"\s+", " ", block("schema"))))
    assert shown == dict(columns)


def test_the_tree_names_every_file_once() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    shown = [line.split()[0] for line in block("tree").splitlines() if line.strip()]
    folder, paths = "", []
    for line, name in zip(block("tree").splitlines(), shown, strict=True):
        if not line.startswith(" "):
            folder = ""
        paths.append(folder + name)
        if name.endswith("/") and not line.startswith(" "):
            folder = name
    for path in paths:
        assert (ROOT / path).exists(), path
    for file in tracked:
        if file.startswith("blackbox_kd/") and file.endswith(".py") and "/__init__" not in file:
            parts = file.split("/")
            assert file in paths or f"{parts[0]}/{parts[1]}/" in paths, f"{file} is not in the tree"


def test_the_reading_path_is_at_most_1000_lines_and_exact() -> None:
    found = re.search(r"about (\d+) lines: (.*?)\.\n", README, re.DOTALL)
    assert found
    files = re.findall(r"`([\w/]+\.py)`", found.group(2))
    lines = sum(len((ROOT / "blackbox_kd" / file).read_text().splitlines()) for file in files)
    assert lines <= 1000
    assert abs(lines - int(found.group(1))) <= 50


def test_every_command_is_in_the_table() -> None:
    for command in COMMANDS:
        assert re.search(rf"^\| `{command}[ `]", README, re.MULTILINE), command


@pytest.mark.parametrize("line", [li for f in fences("bash") for li in f.splitlines() if li.startswith("blackbox-kd ")])
def test_every_stage_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blackbox_kd.command import overrides, parser
    from blackbox_kd.config import config_path, load_config
    from blackbox_kd.settings import Config

    command, *arguments = shlex.split(line, comments=True)[1:]
    if command in ("sql", "status", "export-corpus"):
        corpus = Corpus(tmp_path / "runs" / "quickstart" / "corpus.duckdb")
        (tmp_path / "runs" / "quickstart" / "config.yaml").write_text(f"corpus: {corpus.path}\n")
        monkeypatch.chdir(tmp_path)
        assert main([command, *arguments]) == 0
        return
    flags, rest = parser(command, "").parse_known_args(arguments)
    if (of_a_run := Path(flags.config)).match("runs/*/config.yaml"):  # as an earlier line of the README leaves it
        of_a_run = tmp_path / of_a_run
        of_a_run.parent.mkdir(parents=True)
        of_a_run.write_text(config_path("quickstart").read_text())
        flags.config = str(of_a_run)
    load_config(Config, flags.config, overrides(rest))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in [li for f in fences("bash") for li in f.splitlines() if li.startswith("make ")]:
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("statement", [s for f in fences("sql") for s in f.split(";") if s.strip()])
def test_every_query_runs(statement: str, tmp_path: Path) -> None:
    columns, _ = query(Corpus(tmp_path / "c.duckdb").path, statement)
    assert columns


def test_the_hosted_teacher_is_a_valid_section(tmp_path: Path) -> None:
    import yaml

    (section,) = fences("yaml")
    teacher = validate(OpenAITeacherConfig, yaml.safe_load(section)["teacher"], "README.md")
    assert teacher.price is not None
    assert teacher.price.input > 0
