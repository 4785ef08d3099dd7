"""Every block of README.md and docs/ does what the page says: commands, configurations, queries, programs, links."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from blackbox_kd.__main__ import main
from blackbox_kd.command import overrides, parser
from blackbox_kd.config import config_path, load_config, validate
from blackbox_kd.corpus import Corpus, curation, query
from blackbox_kd.settings import Config
from tests.pages import PAGES, ROOT, Block, anchors, blocks, lines

COMMANDS = lines("bash", "blackbox-kd ")
QUERIES = [(block, each) for block in blocks("sql") for each in block.text.split(";") if each.strip()]
WHOLE = [block for block in blocks("yaml") if "run_dir" in yaml.safe_load(block.text)]
"""A config of its own; the others are parts of one."""
PROGRAMS = sorted({block.page for block in blocks("python")})


@pytest.fixture
def folder(finished_runs: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's programs run: beside finished runs, with which they may do what they like, and a small model."""
    shutil.copytree(finished_runs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tiny-student").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text("utf-8")), target


def test_every_page_is_in_both_tables_of_contents() -> None:
    for page in sorted(PAGES.keys() - {"README.md", "docs/README.md"}):
        assert f"]({page})" in PAGES["README.md"], page
        assert f"]({page.removeprefix('docs/')})" in PAGES["docs/README.md"], page


def test_scripts_and_results_that_are_named_are_there() -> None:
    pattern = re.compile(r"benchmarks/(?:results/)?\w+\.(?:py|jsonl|json)\b")
    named = {path for text in PAGES.values() for path in pattern.findall(text)}
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path


# Commands


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--config" in line])
def test_every_command_of_a_project_is_understood(line: str, tmp_path: Path) -> None:
    command, *arguments = shlex.split(line, comments=True)[1:]
    flags, rest = parser(command, "").parse_known_args(arguments)
    if (of_a_run := Path(flags.config)).match("runs/*/config.yaml"):  # as an earlier line of the page leaves it
        of_a_run = tmp_path / of_a_run
        of_a_run.parent.mkdir(parents=True)
        of_a_run.write_text(config_path("quickstart").read_text())
        flags.config = str(of_a_run)
    if flags.config == "my.yaml":
        (own,) = WHOLE
        flags.config = str(tmp_path / "my.yaml")
        Path(flags.config).write_text(own.text)
    load_config(Config, flags.config, overrides(rest))


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--config" not in line])
def test_every_command_on_a_corpus_runs(line: str, folder: Path) -> None:
    assert main(shlex.split(line, comments=True)[1:]) == 0


@pytest.mark.parametrize("block", [block for block in blocks("bash") if block.result], ids=str)
def test_a_command_prints_what_stands_below_it(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(block.text)[1:]) == 0
    assert capsys.readouterr().out == block.result


# Configurations


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_configuration_is_valid_alone_or_in_the_place_of_the_quickstarts(block: Block) -> None:
    config = {} if block in WHOLE else yaml.safe_load(config_path("quickstart").read_text())
    for name, section in yaml.safe_load(block.text).items():
        whole = not isinstance(section, dict) or "provider" in section
        config[name] = section if whole else config.get(name, {}) | section
    validate(Config, config, block.page)


# Queries


@pytest.mark.parametrize(("block", "statement"), QUERIES, ids=[str(block) for block, _ in QUERIES])
def test_every_query_runs(block: Block, statement: str, finished_runs: Path) -> None:
    columns, _ = query(finished_runs / "runs" / "quickstart" / "corpus.duckdb", statement)
    if block.result:
        assert block.text.count(";") == 1
        assert re.split(r"\s*\| ", block.result.splitlines()[0].strip()) == columns


@pytest.mark.parametrize("block", [block for block in blocks("sql") if block.result], ids=str)
def test_a_query_with_a_result_has_one_on_a_small_run(block: Block, finished_runs: Path) -> None:
    _, rows = query(finished_runs / "runs" / "quickstart" / "corpus.duckdb", block.text)
    assert rows


# Programs


@pytest.fixture
def components() -> Iterator[None]:
    """A page may register a loss; it goes with the test."""
    from blackbox_kd.student.components import COMPONENTS

    before = dict(COMPONENTS)
    yield
    COMPONENTS.clear()
    COMPONENTS.update(before)


@pytest.mark.parametrize("page", PROGRAMS)
def test_every_program_runs_and_prints_what_stands_below_it(page: str, folder: Path, components: None) -> None:
    state: dict[str, object] = {"__name__": "page"}
    for block in blocks("python", page):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.text, str(block), "exec"), state)
        assert printed.getvalue() == block.result, str(block)


def test_what_the_page_on_limits_deletes_is_gone(folder: Path) -> None:
    (block,) = blocks("python", "docs/limits.md")
    corpus = folder / "runs" / "quickstart" / "corpus.duckdb"
    text = "SELECT count(*) FROM {} t WHERE t::VARCHAR LIKE '%Zoe%'"
    before = {table: query(corpus, text.format(table))[1][0][0] for table in ("prompts", "requests")}
    assert all(before.values())
    ((asked, mine, run_id, other),) = query(
        corpus,
        """SELECT prompt_id, min(completion_id), any_value(run_id),
                  (SELECT min(completion_id) FROM completions c WHERE c.prompt_id <> p.prompt_id)
           FROM prompts p JOIN completions USING (prompt_id)
           WHERE messages::VARCHAR LIKE '%Zoe%' GROUP BY prompt_id""",
    )[1]
    said = {"action": "flag", "reason": "eval_overlap"}
    about = [
        {**said, "completion_id": str(mine), "detail": "heldout prompt of another"},
        {**said, "completion_id": str(other), "detail": f"heldout prompt {asked}: 'call'"},
        {**said, "completion_id": str(other), "reason": "pii", "detail": "mail"},
    ]
    curation.replace(Corpus(corpus), str(run_id), about)
    exec(compile(block.text, str(block), "exec"), {})
    for (table,) in query(corpus, "SELECT table_name FROM duckdb_tables()")[1]:
        assert query(corpus, text.format(table))[1] == [(0,)], table
    assert query(corpus, "SELECT detail FROM curation WHERE reason IN ('eval_overlap', 'pii')")[1] == [("mail",)]


# Costs


def test_the_table_of_costs_is_that_of_the_benchmark() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "algorithms.json").read_text())["rows"]
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d, ]+) \|$", PAGES["docs/costs.md"], re.MULTILINE))
    assert table == {row["variant"].partition(":")[0]: f"{row['calls']}, {row['tokens']:,}" for row in rows}
