"""What the teacher is asked about a student's text, and which replies can be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.errors import ConfigError
from blackbox_kd.judging import RewritePrompt, usable_text
from blackbox_kd.types import Completion, Message, Prompt, Rollout

WriteJsonl = Callable[[str, list[dict[str, Any]]], Path]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def rollout(draft: str, *earlier: Message, asks: str = "Say 1") -> Rollout:
    prompt = Prompt(messages=[*earlier, user(asks)], split="train", source="test")
    completion = Completion(
        request_key="k", prompt_id=prompt.prompt_id, author="student", model="s", text=draft, finish_reason="stop"
    )
    return Rollout(prompt=prompt, completion=completion, prompt_ids=[1], completion_ids=[2], logprobs=[-1.0])


def written(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


@pytest.fixture
def template(tmp_path: Path) -> str:
    return written(tmp_path / "rewrite.md.j2", "Asked: {{ prompt }}\nDraft: {{ draft }}\nCorrect it.\n")


def test_the_last_question_is_replaced_by_question_and_draft(template: str) -> None:
    made = RewritePrompt(None, template, None, "x").messages(rollout("Won <1> & {{ two }}"))
    assert made == [user("Asked: Say 1\nDraft: Won <1> & {{ two }}\nCorrect it.")]


def test_earlier_turns_stay_as_they_are(template: str) -> None:
    earlier = [{"role": "system", "content": "Be kind"}, user("Hi"), {"role": "assistant", "content": "Hello"}]
    made = RewritePrompt(None, template, None, "x").messages(rollout("one", *earlier))
    assert made[:-1] == earlier
    assert made[-1]["content"].startswith("Asked: Say 1\n")


def test_an_empty_draft_can_be_asked_about(template: str) -> None:
    assert RewritePrompt(None, template, None, "x").messages(rollout("")) == [
        user("Asked: Say 1\nDraft: \nCorrect it.")
    ]


def test_the_private_context_stands_before_the_rewrite(template: str, tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    system = written(tmp_path / "system.md.j2", "Secret rules. {{ system }}")
    shown = [user("Asked: a\nDraft: b"), {"role": "assistant", "content": "c"}]
    examples = write_jsonl("examples.jsonl", [{"messages": shown}])
    rewrite = RewritePrompt(system, template, str(examples), "x")
    asked = rewrite.context.wrap(rewrite.messages(rollout("one", {"role": "system", "content": "Be kind"})))
    assert asked[0] == {"role": "system", "content": "Secret rules. Be kind"}
    assert asked[1:3] == shown
    assert asked[3]["content"].startswith("Asked: Say 1\nDraft: one")
    assert len(asked) == 4


def test_other_examples_are_another_context(template: str, write_jsonl: WriteJsonl) -> None:
    def context_hash(text: str) -> str:
        examples = write_jsonl("examples.jsonl", [{"messages": [user(text), {"role": "assistant", "content": "c"}]}])
        return RewritePrompt(None, template, str(examples), "x").context.context_hash

    assert context_hash("a") == context_hash("a")
    assert context_hash("a") != context_hash("b")


def test_a_template_that_wants_something_else_says_what_there_is(tmp_path: Path) -> None:
    path = written(tmp_path / "wrong.j2", "{{ question }}")
    with pytest.raises(ConfigError, match=r"question.*prompt, draft"):
        RewritePrompt(None, path, None, "x").messages(rollout("one"))


@pytest.mark.parametrize("missing", ["template", "examples", "system"])
def test_a_missing_file_is_named_with_its_key(template: str, missing: str) -> None:
    files: dict[str, Any] = {"system": None, "template": template, "examples": None} | {missing: "nowhere/x.j2"}
    with pytest.raises(ConfigError, match=r"onpolicy\.algorithm.*nowhere/x\.j2"):
        RewritePrompt(**files, where="onpolicy.algorithm")


def reply(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(
        request_key="k", prompt_id="p", author="teacher", model="m", text=text, finish_reason=finish_reason
    )


def test_a_whole_answer_is_usable_without_the_blanks_around_it() -> None:
    assert usable_text(reply("  Servus,\n Welt \n")) == "Servus,\n Welt"


@pytest.mark.parametrize("finish_reason", ["length", "content_filter", "tool_calls", "unknown", ""])
def test_an_answer_that_did_not_stop_by_itself_is_not_usable(finish_reason: str) -> None:
    assert usable_text(reply("Servus", finish_reason)) is None


@pytest.mark.parametrize("completion", [None, reply(""), reply(" \n\t ")])
def test_a_missing_or_empty_answer_is_not_usable(completion: Completion | None) -> None:
    assert usable_text(completion) is None
