"""Texts side by side: held-out answers of teacher and student, and drafts with what the teacher made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from blackbox_kd.corpus.run_rows import Ask, Row
from blackbox_kd.evaluate import chrf
from blackbox_kd.report.tokens import Piece, pieces
from blackbox_kd.report.words import signed

EACH = 4
"""Prompts that gained most, that are in the middle, and that gained least."""


ENDED = {"stop": "", "length": "cut off"}
"""finish_reason in words; others speak for themselves."""


class Text(NamedTuple):
    """Somebody's text, in pieces."""

    name: str
    note: str
    pieces: list[Piece]
    left_out: int = 0
    """Characters that are not shown."""


class Example(NamedTuple):
    """A prompt with what was made of it."""

    messages: list[dict[str, str]]
    note: str
    texts: list[Text]


class Answers(NamedTuple):
    """All held-out answers of a run."""

    prompts: dict[str, list[dict[str, str]]]
    """prompt_id -> messages."""
    rows: dict[str, dict[str, Row]]
    """prompt_id -> writer -> its answer; writers are `teacher`, `teacher at temperature 1` and checkpoints."""


TEACHER, DRAWN = "teacher", "teacher, at temperature 1"


def by_prompt(rows: Sequence[Row], policies: Mapping[str, str]) -> Answers:
    """`policies`: policy -> checkpoint. Of several answers of one writer the last counts."""
    prompts: dict[str, list[dict[str, str]]] = {}
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        writer = policies[row["policy"]] if row["author"] == "student" else TEACHER if row["greedy"] else DRAWN
        prompts[row["prompt_id"]] = messages(row["messages"])
        found.setdefault(row["prompt_id"], {})[writer] = row
    return Answers(prompts, found)


def messages(stored: str) -> list[dict[str, str]]:
    """Role and text of each; parts that are no text (images, tool calls) as JSON."""
    return [
        {"role": str(m["role"]), "content": c if isinstance(c := m.get("content"), str) else json.dumps(c or m)}
        for m in json.loads(stored)
    ]


def chosen(found: Answers, before: str, last: str) -> list[tuple[str, str]]:
    """(prompt_id, why): prompts whose answer came nearer to the teacher's from `before` to `last`, and others.

    By chrF of the greedy answers; equal ones by prompt_id. The first EACH, the middle and the last, without repeats.
    """
    gains = sorted(
        (-_likeness(row, last) + _likeness(row, before), prompt_id)
        for prompt_id, row in found.rows.items()
        if {TEACHER, before, last} <= row.keys()
    )
    middle = max(EACH, len(gains) // 2 - EACH // 2)
    parts = {
        "gained most": gains[:EACH],
        "in the middle": gains[middle : middle + EACH],
        "gained least": gains[max(middle + EACH, len(gains) - EACH) :],
    }
    return [(prompt_id, f"{why}: {signed(-loss)} chrf") for why, part in parts.items() for loss, prompt_id in part]


def _likeness(row: Mapping[str, Row], writer: str) -> float:
    return chrf(row[writer]["text"].strip(), row[TEACHER]["text"].strip())


def side_by_side(ask: Ask, found: Answers, writers: Sequence[str], limit: int) -> list[Example]:
    """The chosen prompts; texts of more than `limit` characters are cut."""
    if not writers:
        return []
    before, last = "sft" if "sft" in writers[:-1] else writers[0], writers[-1]
    picked = chosen(found, before, last)
    shown = [TEACHER, *writers, DRAWN]
    texts = [found.rows[p][w] for p, _ in picked for w in shown if w in found.rows[p]]
    tokens = spelt(ask, [each["completion_id"] for each in texts], limit)
    return [
        Example(
            [m | {"content": m["content"][:limit]} for m in found.prompts[prompt_id]],
            why.replace("chrf", f"chrf from {before} to {last}"),
            [_answer(w, found.rows[prompt_id], tokens, limit) for w in shown if w in found.rows[prompt_id]],
        )
        for prompt_id, why in picked
    ]


def _answer(writer: str, row: Mapping[str, Row], tokens: Mapping[str, Tokens], limit: int) -> Text:
    answer = row[writer]
    likeness = "" if writer in (TEACHER, DRAWN) else f"chrf {_likeness(row, writer):.0f}"
    ended = ENDED.get(answer["finish_reason"], answer["finish_reason"])
    note = ", ".join(part for part in (likeness, ended) if part)
    return text(writer, note, answer["text"], tokens.get(answer["completion_id"], []), limit)


Tokens = list[tuple[str, float | None]]


def spelt(ask: Ask, ids: Sequence[str], limit: int) -> dict[str, Tokens]:
    """completion_id -> its tokens with their logprobs by the one who wrote it, where the corpus has them.

    As many as spell `limit` characters, which are of up to four bytes.
    """
    found: dict[str, Tokens] = {}
    for row in ask("tokens", ids=list(ids), most=4 * limit):
        found.setdefault(row["completion_id"], []).append((row["token"], row["logprob"]))
    return found


def text(name: str, note: str, whole: str, tokens: Tokens, limit: int) -> Text:
    """Cut after `limit` characters."""
    shown, left = list[Piece](), limit
    for piece in pieces(whole, tokens):
        if left <= 0:
            break
        shown.append(piece._replace(text=piece.text[:left]))
        left -= len(piece.text)
    return Text(name, note, shown, max(0, len(whole) - limit))


def corrected(ask: Ask, limit: int) -> list[Example]:
    """The least sure drafts of the last round that had feedback."""
    rows = ask("drafts")
    tokens = spelt(ask, [row["completion_id"] for row in rows], limit)
    found = []
    for row in rows:
        said = "" if row["value"] is None else f", mean value {row['value']:.3g}"
        texts = [text("student's draft", "", row["text"], tokens.get(row["completion_id"], []), limit)]
        if row["better"] is not None:
            same = "unchanged" if row["better"].strip() == row["text"].strip() else ""
            texts.append(text("teacher's answer to it", same, row["better"], [], limit))
        cut = [m | {"content": m["content"][:limit]} for m in messages(row["messages"])]
        found.append(Example(cut, f"round {row['round']}, {row['kinds']}{said}", texts))
    return found
