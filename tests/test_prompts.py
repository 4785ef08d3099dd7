"""Prompts in, templates out, and a line number for whoever wrote a bad row."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.errors import ConfigError
from blackbox_kd.prompts import SPLITS, PrivateContext, PromptSet, Template, read_jsonl
from blackbox_kd.sections import PromptsConfig
from blackbox_kd.types import Prompt, Split

Write = Callable[[str, list[dict[str, Any]]], Path]

USER = {"role": "user", "content": "Hi"}
GOOD = '{"prompt": "Hi"}'


def row(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def load_prompts(config: PromptsConfig) -> dict[Split, list[Prompt]]:
    prompts = PromptSet(config)
    return {split: prompts[split] for split in SPLITS}


def refused(path: Path, **config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_prompts(PromptsConfig(path=str(path), **config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_read_split_by_split_in_file_order(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl("p/train.jsonl", [row("b"), row("a", meta={"n": 1}, source="book")])
    write_jsonl("p/ood.jsonl", [row("c")])
    found = load_prompts(PromptsConfig(path=str(tmp_path / "p")))
    assert {split: [p.text for p in prompts] for split, prompts in found.items()} == {
        "train": ["b", "a"], "heldout": [], "ood": ["c"], "holdback": [],
    }  # fmt: skip
    assert [(p.source, p.meta, p.split) for p in found["train"]] == [
        ("train.jsonl", {}, "train"), ("book", {"n": 1}, "train"),
    ]  # fmt: skip


def test_one_file_names_the_split_of_each_row(write_jsonl: Write) -> None:
    path = write_jsonl("all.jsonl", [row("a"), row("b", split="heldout"), row("c", split="train")])
    found = load_prompts(PromptsConfig(path=str(path)))
    assert [p.text for p in found["train"]] == ["a", "c"]
    assert [p.text for p in found["heldout"]] == ["b"]


def test_trl_prompts_are_taken_as_text_or_messages(write_jsonl: Write) -> None:
    path = write_jsonl(
        "t.jsonl", [{"prompt": "Hi"}, {"prompt": [USER]}, {"prompt": [USER], "completion": "x"}, row("Hi")]
    )
    found = load_prompts(PromptsConfig(path=str(path)))
    assert [p.messages for p in found["train"]] == [[USER]]  # four spellings of one prompt


def test_a_conversation_with_system_and_turns_is_kept_whole(write_jsonl: Write) -> None:
    turns = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER]
    path = write_jsonl("t.jsonl", [{"messages": turns}])
    assert load_prompts(PromptsConfig(path=str(path)))["train"][0].messages == turns


def test_limits_take_the_first_prompts_of_a_split_after_duplicates_are_dropped(write_jsonl: Write) -> None:
    texts = {split: [f"{split}0", f"{split}0", f"{split}1", f"{split}2"] for split in ("train", "ood")}
    rows = [row(text, split=split) for split in texts for text in texts[split]]
    path = write_jsonl("all.jsonl", rows)
    found = load_prompts(PromptsConfig(path=str(path), limits={"train": 2, "heldout": 5}))
    assert [p.text for p in found["train"]] == ["train0", "train1"]
    assert [p.text for p in found["ood"]] == ["ood0", "ood1", "ood2"]


def test_a_limit_of_zero_leaves_a_split_out(write_jsonl: Write) -> None:
    path = write_jsonl("all.jsonl", [row("a"), row("b", split="ood")])
    assert load_prompts(PromptsConfig(path=str(path), limits={"ood": 0}))["ood"] == []


def test_a_prompt_in_two_splits_is_an_error_with_its_line(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl("p/train.jsonl", [row("a"), row("b")])
    write_jsonl("p/heldout.jsonl", [row("c"), row("a")])
    assert refused(tmp_path / "p") == (
        f"{tmp_path / 'p' / 'train.jsonl'}:1: this prompt is in split 'heldout' as well as in 'train'"
    )


def test_a_prompt_in_two_splits_is_found_wherever_its_rows_stand(write_jsonl: Write) -> None:
    turned = {"messages": [{"content": "a", "role": "user"}]}  # the same prompt in another order
    path = write_jsonl("all.jsonl", [row("b"), turned, row("c", split="ood"), row("a", split="ood"), row("d")])
    assert refused(path) == f"{path}:2: this prompt is in split 'ood' as well as in 'train'"
    path = write_jsonl("all.jsonl", [row("b"), row("c", split="ood"), row("c", split="heldout")])
    assert refused(path) == f"{path}:3: this prompt is in split 'ood' as well as in 'heldout'"


def test_train_prompts_that_stand_twice_are_counted_and_streamed_once(write_jsonl: Write) -> None:
    texts = ["a", "b", "a", "c", "b", "a", "d"]
    path = write_jsonl("t.jsonl", [row(text) for text in texts] + [row("e", split="ood")] * 2)
    prompts = PromptSet(PromptsConfig(path=str(path)))
    assert [p.text for p in prompts.stream("train")] == [p.text for p in prompts["train"]] == ["a", "b", "c", "d"]
    assert [p.text for p in prompts.stream("train", 3)] == ["a", "b", "c"]
    assert [prompts.count("train", limit) for limit in (None, 3, 9)] == [4, 3, 4]
    assert (prompts.count("ood"), prompts.count("heldout")) == (1, 0)
    few = PromptSet(PromptsConfig(path=str(path), limits={"train": 2}))
    assert (few.count("train"), few.count("train", 1)) == (2, 1)


def test_many_rows_are_checked_in_one_pass_and_in_little_memory(tmp_path: Path) -> None:
    path, rows = tmp_path / "t.jsonl", 20_000
    with path.open("w") as file:
        file.writelines(json.dumps(row(f"{i} " + "x" * 500)) + "\n" for i in range(rows))
    tracemalloc.start()
    prompts = PromptSet(PromptsConfig(path=str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert prompts.count("train") == rows
    assert peak < 60 * rows  # of 540 bytes each


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "not valid JSON"),
        ('{"prompt": "\\ud800"}', "not valid JSON"),
        ('{"prompt": "a", "meta": {"x": NaN}}', "not valid JSON"),
        ('["a"]', "a row must be a JSON object, this is a list"),
        ('"a"', "a row must be a JSON object, this is a str"),
        ("{}", "needs `messages` (a list of role and content) or `prompt`"),
        ('{"messages": []}', "needs `messages`"),
        ('{"messages": null}', "needs `messages`"),
        ('{"prompt": 5}', "needs `messages`"),
        ('{"prompt": " "}', "a message needs a `content` with text"),
        ('{"messages": ["a"]}', "a message needs a `role` out of system, user, assistant, tool: 'a'"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "a message needs a `role`"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "a message needs a `role`"),
        ('{"messages": [{"role": "user", "content": null}]}', "a message needs a `content` with text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "a message needs a `content` with text"),
        ('{"messages": [{"role": "user"}]}', "a message needs a `content` with text"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "the last message must be the user's, it is the assis",
        ),
        ('{"prompt": "a", "split": "test"}', "split 'test' is none of train, heldout, ood, holdback"),
        ('{"prompt": "a", "split": null}', "split None is none of"),
        ('{"prompt": "a", "meta": 3}', "`meta` must be an object"),
    ],
)
def test_a_bad_row_is_reported_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert refused(path).startswith(f"{path}:3: {said}")


def test_bytes_that_are_not_utf8_are_reported_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe4"}\n')
    assert refused(tmp_path / "t.jsonl").startswith(f"{tmp_path / 't.jsonl'}:2: not valid JSON")


def test_blank_lines_line_ends_of_windows_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c"}')
    assert [r["prompt"] for _, r in read_jsonl(path)] == ["a", "b\u2028c"]  # U+2028 is no line end in JSON
    assert [where for where, _ in read_jsonl(path)] == [f"{path}:1", f"{path}:4"]


def test_no_train_prompts_is_an_error(write_jsonl: Write) -> None:
    path = write_jsonl("t.jsonl", [row("a", split="ood")])
    assert refused(path) == f"prompts.path {str(path)!r}: no train prompts in it"


def test_a_folder_needs_train_and_nothing_else(tmp_path: Path, write_jsonl: Write) -> None:
    write_jsonl("p/heldout.jsonl", [row("a")])
    assert refused(tmp_path / "p") == f"cannot read {tmp_path / 'p' / 'train.jsonl'}: No such file or directory"


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").startswith(f"prompts.path: no such file or folder '{tmp_path / 'none'}'")


def template(tmp_path: Path, text: str, name: str = "t.md.j2") -> str:
    (tmp_path / name).write_text(text, "utf-8")
    return str(tmp_path / name)


def test_a_template_is_filled_in_without_escaping_and_without_its_outer_blanks(tmp_path: Path) -> None:
    made = Template(template(tmp_path, "\n{{ a }} & <{{ b }}>\n\n"), "teacher.prompt.template")
    assert made.render(a='"x"', b="ö") == '"x" & <ö>'


def test_a_variable_that_is_not_given_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    made = Template(template(tmp_path, "{{ prompt }} {{ darft }}"), "x")
    with pytest.raises(ConfigError, match=r"'darft' is undefined; it may use prompt, draft$"):
        made.render(prompt="p", draft="d")


def test_a_template_that_fails_while_it_is_filled_in_is_one_line(tmp_path: Path) -> None:
    made = Template(template(tmp_path, "{{ 1 + prompt }}"), "x")
    with pytest.raises(ConfigError, match=r"template .*t\.md\.j2: unsupported operand"):
        made.render(prompt="p")


def test_a_syntax_error_in_a_template_has_a_line(tmp_path: Path) -> None:
    path = template(tmp_path, "first\n{% if %}\n")
    with pytest.raises(ConfigError) as caught:
        Template(path, "teacher.prompt.template")
    assert str(caught.value).startswith(f"teacher.prompt.template {path}:2: ")


def test_a_template_that_is_missing_or_a_folder_is_one_line(tmp_path: Path) -> None:
    for name, said in (("none.j2", "no such file"), ("", "cannot read")):
        with pytest.raises(ConfigError, match=f"teacher.prompt.template: {said}"):
            Template(str(tmp_path / name), "teacher.prompt.template")


def test_a_bare_teacher_sees_what_the_student_sees() -> None:
    messages = [{"role": "system", "content": "s"}, USER]
    assert PrivateContext(None, None).wrap(messages) == messages


def test_the_private_prompt_stands_before_the_conversation_and_takes_up_its_system_message(
    tmp_path: Path, write_jsonl: Write
) -> None:
    shown = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    examples = write_jsonl("e.jsonl", [{"messages": shown}])
    path = template(tmp_path, "Be brief.{% if system %} {{ system }}{% endif %}")
    context = PrivateContext(path, str(examples))
    turns = [USER, {"role": "assistant", "content": "a"}, USER]
    assert context.wrap([{"role": "system", "content": "In French."}, *turns]) == [
        {"role": "system", "content": "Be brief. In French."}, *shown, *turns,
    ]  # fmt: skip
    assert context.wrap(turns) == [{"role": "system", "content": "Be brief."}, *shown, *turns]
    assert PrivateContext(None, str(examples)).wrap([{"role": "system", "content": "s"}, USER]) == [
        {"role": "system", "content": "s"}, *shown, USER,
    ]  # fmt: skip


def test_wrapping_leaves_the_prompt_as_it_was(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, dict(USER)]
    PrivateContext(template(tmp_path, "t {{ system }}"), None).wrap(messages)
    assert messages == [{"role": "system", "content": "s"}, USER]


def test_the_context_hash_follows_the_content_and_not_the_file_names(tmp_path: Path, write_jsonl: Write) -> None:
    examples = [{"messages": [USER, {"role": "assistant", "content": "A"}]}]
    first = PrivateContext(template(tmp_path, "Rules."), str(write_jsonl("e.jsonl", examples)))
    renamed = PrivateContext(template(tmp_path, "Rules.\n", "other.j2"), str(write_jsonl("f.jsonl", examples)))
    assert first.context_hash == renamed.context_hash
    other = json.loads(json.dumps(examples).replace('"A"', '"B"'))
    changed = [
        PrivateContext(template(tmp_path, "Rules!", "r.j2"), str(tmp_path / "e.jsonl")),
        PrivateContext(str(tmp_path / "t.md.j2"), str(write_jsonl("g.jsonl", other))),
        PrivateContext(str(tmp_path / "t.md.j2"), None),
        PrivateContext(None, str(tmp_path / "e.jsonl")),
        PrivateContext(None, None),
    ]
    assert len({context.context_hash for context in [first, *changed]}) == 6


def test_a_bad_example_is_reported_with_file_and_line(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"messages": [USER]}, {"messages": [{"role": "user"}]}])
    with pytest.raises(ConfigError) as caught:
        PrivateContext(None, str(path))
    assert str(caught.value).startswith(f"{path}:2: a message needs a `content`")


def test_a_system_message_that_the_template_does_not_mention_still_holds(tmp_path: Path) -> None:
    (tmp_path / "rules.j2").write_text("Be short.")
    (tmp_path / "with.j2").write_text("{{ system }} Be short.")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (system, _) = PrivateContext(str(tmp_path / "rules.j2"), None).wrap(messages)
    assert system["content"] == "Be short.\n\nBe kind."
    (system, _) = PrivateContext(str(tmp_path / "with.j2"), None).wrap(messages)
    assert system["content"] == "Be kind. Be short."
