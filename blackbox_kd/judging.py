"""What a teacher or judge is asked about a student's text, and how its reply is read."""

from __future__ import annotations

from blackbox_kd.hashing import content_id
from blackbox_kd.prompts import PrivateContext, Template
from blackbox_kd.types import Completion, Message, Rollout


class RewritePrompt:
    """Shows the draft and asks for a corrected version, under the teacher's own private rules."""

    def __init__(self, system: str | None, template: str, examples: str | None, where: str) -> None:
        """`system` is the teacher's own template; `examples` show rewrites, already rendered."""
        self._template = Template(template, f"{where}.template")
        self.context = PrivateContext(system, examples, where)
        self.content_hash = content_id([self._template.source, self.context.context_hash])
        """Of the files, not of their names."""

    def messages(self, rollout: Rollout) -> list[Message]:
        """The conversation with its last question replaced by question and draft."""
        *earlier, _ = rollout.prompt.messages
        text = self._template.render(prompt=rollout.prompt.text, draft=rollout.completion.text)
        return [*earlier, {"role": "user", "content": text}]


def usable_text(completion: Completion | None) -> str | None:
    """The text of a whole, non-empty answer; None for one that is missing, empty, cut off or filtered."""
    if completion is None or completion.finish_reason != "stop":
        return None
    return completion.text.strip() or None
