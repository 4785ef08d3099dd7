"""The card of an adapter: the Hub can read it, its numbers are the corpus's, and its program loads the adapter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from blackbox_kd.corpus import query
from blackbox_kd.hashing import content_id, file_hash
from blackbox_kd.model_card import is_hub_id, refresh_cards
from blackbox_kd.run_dir import RunDir


@pytest.fixture(scope="module")
def run(finished_runs: Path) -> Path:
    return finished_runs / "runs" / "quickstart"


def text_of(run: Path, name: str) -> str:
    return (run / "checkpoints" / name / "README.md").read_text("utf-8")


def fenced(text: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return str(found)


@pytest.mark.parametrize("name", ["sft", "round-1", "round-2"])
def test_the_hub_reads_its_front_matter(run: Path, name: str) -> None:
    front = ModelCard(text_of(run, name)).data.to_dict()
    assert {key: front[key] for key in ("library_name", "pipeline_tag", "tags")} == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "distillation", "blackbox_kd"],
    }  # fmt: skip
    assert "base_model" not in front  # a folder here is nothing that the Hub knows
    assert front["blackbox_kd"]["teacher"] == "scripted"


@pytest.mark.parametrize(
    ("base", "known"),
    [("Qwen/Qwen3-0.6B", True), ("gpt2", False), ("./models/mine", False), ("/models/mine", False), ("a/b/c", False),
     ("package:file.gguf", False)],
)  # fmt: skip
def test_only_what_may_be_on_the_hub_is_named_as_base_model(base: str, known: bool) -> None:
    assert is_hub_id(base) == known


def test_what_it_learnt_is_counted_and_hashed(run: Path) -> None:
    facts = ModelCard(text_of(run, "sft")).data.to_dict()["blackbox_kd"]
    assert facts["data"] == {"teacher answers learnt": 4, "kept aside for the dev loss": 2}
    answers = query(run / "corpus.duckdb", "select completion_id::varchar from teacher_rows order by all")[1]
    subsets = {content_id(sorted({i for (i,) in answers} - {a, b})) for (a,) in answers for (b,) in answers if a != b}
    assert facts["data_hash"] in subsets
    facts = ModelCard(text_of(run, "round-2")).data.to_dict()["blackbox_kd"]
    assert facts["data"] == {"rollouts": 3, "samples made of feedback": 3, "teacher answers replayed": 1}


@pytest.mark.parametrize("name", ["sft", "round-1", "round-2"])
def test_its_metrics_are_those_of_the_evaluation(run: Path, name: str) -> None:
    card = text_of(run, name)
    where = f"checkpoint = '{name}' and run_id = '{json.loads((run / 'run.json').read_text())['run_id']}'"
    shown = set(re.findall(r"^\| (\w+) \| `(\w+)` \| (\S+) \| \[(\S+), (\S+)\] \|$", card, re.MULTILINE))
    rows = query(run / "corpus.duckdb", f"select split, name, value, lo, hi from leaderboard where {where}")[1]
    assert shown == {(s, n, *(f"{x:.4g}" for x in v)) for s, n, *v in rows if "decile" not in n}
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['spend']['calls']} calls to the teacher" in card
    assert summary["set_id"] in card


def test_an_evaluation_changes_nothing_of_a_checkpoint_but_its_card(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "quickstart")
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    before = {path: file_hash(path) for path in copy.rglob("*") if path.is_file()}
    cards = {path for path in before if path.name == "README.md"}
    with RunDir(copy) as run_dir:
        refresh_cards(run_dir, summary)
        assert {path: file_hash(path) for path in before} == before  # the same once more
        summary["checkpoints"][0] = {**summary["checkpoints"][0], "name": "round-1"}
        refresh_cards(run_dir, {**summary, "set_id": "another"})
    assert {path for path, was in before.items() if file_hash(path) != was} == cards


def test_before_an_evaluation_it_says_so(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "quickstart")
    summary = {**json.loads((run / "summary.json").read_text()), "checkpoints": []}
    with RunDir(copy) as run_dir:
        refresh_cards(run_dir, summary)
    assert "Not evaluated yet" in text_of(copy, "sft")


def test_what_a_person_adds_to_a_card_stays(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "quickstart")
    card = copy / "checkpoints" / "sft" / "README.md"
    before, after = card.read_text().split("<!-- measured -->\n")
    mine = (
        before.replace("library_name", "license: mit\nlibrary_name") + "<!-- measured -->\n" + after + "\nMy notes.\n"
    )
    card.write_text(mine)
    summary = {**json.loads((run / "summary.json").read_text()), "set_id": "another"}
    with RunDir(copy) as run_dir:
        refresh_cards(run_dir, summary)
    found = card.read_text()
    assert found != mine
    assert found.split("<!-- measured -->")[0] == mine.split("<!-- measured -->")[0]
    assert found.split("<!-- /measured -->")[1] == mine.split("<!-- /measured -->")[1]
    assert "fixed set another" in found


@pytest.mark.parametrize("own", [None, "My notes.", "---\nlicense: [\n---\nMy notes."])
def test_a_card_that_somebody_else_wrote_stays(run: Path, tmp_path: Path, own: str | None) -> None:
    copy = shutil.copytree(run, tmp_path / "quickstart")
    card = copy / "checkpoints" / "sft" / "README.md"
    card.unlink() if own is None else card.write_text(own)
    with RunDir(copy) as run_dir:
        refresh_cards(run_dir, json.loads((run / "summary.json").read_text()))
    assert (card.read_text() if card.exists() else None) == own


def test_its_program_loads_the_adapter(run: Path) -> None:
    state: dict[str, Any] = {}
    with chdir(run / "checkpoints" / "round-2"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft's own
        exec(fenced(text_of(run, "round-2"), "python"), state)
    ids = state["tokenizer"]("Say 1", return_tensors="pt").input_ids
    written = state["model"](ids).logits
    with state["model"].disable_adapter():
        assert not written.equal(state["model"](ids).logits)


def test_its_server_is_given_the_base_and_the_adapter(run: Path, tiny_model: Path) -> None:
    words = shlex.split(fenced(text_of(run, "sft"), "bash"))
    assert words == ["vllm", "serve", str(tiny_model), "--enable-lora", "--max-lora-rank", "8",
                     "--lora-modules", "student=."]  # fmt: skip
