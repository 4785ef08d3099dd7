"""The README is true: its tree, its commands, its reading path; and so is the schema that docs/ shows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from blackbox_kd.__main__ import COMMANDS
from blackbox_kd.corpus import Corpus, query
from tests.pages import PAGES, ROOT, lines, marked

README = PAGES["README.md"]


def test_a_first_visit_is_not_too_long() -> None:
    assert len(README.splitlines()) <= 250


def test_the_schema_block_is_the_schema(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "c.duckdb")
    _, columns = query(
        corpus.path,
        "SELECT table_name, string_agg(column_name, ', ' ORDER BY column_index) FROM duckdb_columns() "
        "JOIN duckdb_tables() USING (table_name) GROUP BY ALL",
    )
    shown = dict(re.findall(r"(\w+)\((.*?)\)", re.sub(r"\s+", " ", marked("schema"))))
    assert shown == dict(columns)


def test_every_view_is_named_beside_the_schema(tmp_path: Path) -> None:
    _, views = query(Corpus(tmp_path / "c.duckdb").path, "SELECT view_name FROM duckdb_views() WHERE NOT internal")
    for (view,) in views:
        assert f"`{view}`" in PAGES["docs/corpus.md"], view


def test_the_tree_names_every_file_once() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    shown = [line.split()[0] for line in marked("tree").splitlines() if line.strip()]
    folder, paths = "", []
    for line, name in zip(marked("tree").splitlines(), shown, strict=True):
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
    count = sum(len((ROOT / "blackbox_kd" / file).read_text().splitlines()) for file in files)
    assert count <= 1000
    assert abs(count - int(found.group(1))) <= 50


def test_every_command_is_in_the_table() -> None:
    for command in COMMANDS:
        assert re.search(rf"^\| `{command}[ `]", README, re.MULTILINE), command


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = [line.split()[1] for line in lines("bash", "make ")]
    for target in {*named, *re.findall(r"`make ([\w-]+)`", "".join(PAGES.values()))}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
