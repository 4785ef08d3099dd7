"""The data that we ship: enough of it, clean, and with its papers."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from blackbox_kd.config import SHIPPED, find_file
from blackbox_kd.prompts import SPLITS, PrivateContext, PromptSet, Template
from blackbox_kd.sections import PromptsConfig
from blackbox_kd.types import Prompt, Split

FOLDERS = sorted(path for path in (SHIPPED.parent / "data").iterdir() if path.is_dir())
TASKS = [path for path in FOLDERS if (path / "train.jsonl").exists()]
README = (SHIPPED.parent / "data" / "README.md").read_text("utf-8")


def load_prompts(path: str) -> dict[Split, list[Prompt]]:
    prompts = PromptSet(PromptsConfig(path=path))
    return {split: prompts[split] for split in SPLITS}


@pytest.fixture(scope="module", params=TASKS, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture(scope="module")
def task(folder: Path) -> dict[Split, list[Prompt]]:
    return load_prompts(str(folder))


def test_every_split_has_enough_prompts(task: dict[Split, list[Prompt]]) -> None:
    for split, least in (("train", 400), ("heldout", 80), ("ood", 40), ("holdback", 40)):
        assert len(task[split]) >= least, split  # type: ignore[index]


def test_no_text_occurs_twice_in_or_across_splits(task: dict[Split, list[Prompt]]) -> None:
    plain = Counter(re.sub(r"\W+", " ", p.text.lower()).strip() for prompts in task.values() for p in prompts)
    assert [text for text, count in plain.items() if count > 1] == []


def test_no_row_is_lost_while_loading(folder: Path, task: dict[Split, list[Prompt]]) -> None:
    for split, prompts in task.items():
        assert len(prompts) == len((folder / f"{split}.jsonl").read_text("utf-8").splitlines())


def test_a_row_holds_no_answer_and_no_private_part(task: dict[Split, list[Prompt]]) -> None:
    assert {m["role"] for prompts in task.values() for p in prompts for m in p.messages} <= {"system", "user"}


def test_the_readme_names_licence_provenance_and_the_right_counts() -> None:
    assert re.search(r"\*\*Licence:\*\* Apache-2\.0", README)
    assert re.search(r"\*\*Provenance:\*\* .*written for this project", README)
    for path in FOLDERS:
        for file in path.glob("*.jsonl"):
            rows = len(file.read_text("utf-8").splitlines())
            assert f"| `{path.name}/{file.name}` | {rows} |" in README


def test_the_cue_is_on_the_task_and_not_on_the_hold_back() -> None:
    found = load_prompts("data/action_items")
    for split in ("train", "heldout", "ood"):
        assert all(p.text.startswith("Action item: ") for p in found[split])  # type: ignore[index]
    assert not any("Action item" in p.text for p in found["holdback"])


def test_no_example_of_the_private_prompt_is_a_prompt_of_the_task() -> None:
    shown = [*(SHIPPED.parent / "prompts").glob("action_items*_examples.jsonl")]
    assert len(shown) == 2
    texts = {p.text for prompts in load_prompts("data/action_items").values() for p in prompts}
    for path in shown:
        for line in path.read_text("utf-8").splitlines():
            for message in json.loads(line)["messages"]:
                assert message["content"].splitlines()[0] not in texts


def test_the_private_prompt_renders_for_every_prompt() -> None:
    context = PrivateContext("prompts/action_items.md.j2", "prompts/action_items_examples.jsonl")
    for prompts in load_prompts("data/action_items").values():
        for prompt in prompts:
            wrapped = context.wrap(prompt.messages)
            assert [m["role"] for m in wrapped] == ["system", *["user", "assistant"] * 6, "user"]
            assert wrapped[-1]["content"] == prompt.text


DRAFT_TO_SHOW = "ACTION: Pavel to check the pump."
PUMP = "Action item: Pavel, please check the pump."


@pytest.mark.parametrize(
    ("draft", "shown"),
    [(DRAFT_TO_SHOW, True), (f" {DRAFT_TO_SHOW}\nMore.", True), ("Pavel checks the pump.", False),
     ("ACTION: Anna to check the pump.", False), ("ACTION: Pavel to paint the pump.", False), ("", False)],
)  # fmt: skip
def test_the_rewrite_template_shows_a_draft_only_if_it_is_nearly_right(draft: str, shown: bool) -> None:
    text = Template("prompts/action_items_rewrite.md.j2", "x").render(prompt=PUMP, draft=draft)
    assert text == (f"{PUMP}\nDraft: {DRAFT_TO_SHOW}" if shown else PUMP)


def test_the_general_rewrite_template_shows_prompt_and_draft() -> None:
    text = Template("prompts/rewrite.md.j2", "x").render(prompt="The question", draft="The draft")
    assert text.index("The question") < text.index("The draft")


def test_every_shipped_template_compiles() -> None:
    names = [f"prompts/{path.name}" for path in (SHIPPED.parent / "prompts").glob("*.j2")]
    assert len(names) >= 3
    for name in names:
        assert Template(name, "x").path == find_file(name, "x")
