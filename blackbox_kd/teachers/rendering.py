"""Conversations as the raw text that the teacher sees, by its own chat template."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from blackbox_kd.errors import ConfigError, RequestRejected, TeacherError
from blackbox_kd.teachers import scores
from blackbox_kd.teachers.base import TeacherConfig
from blackbox_kd.types import Message

_ANSWER, _NEXT = "Sentinel answer 42", "Sentinel question 43"


class Rendering:
    """By the tokenizer that `teacher.tokenizer` names, else by the server (llama.cpp's `/apply-template`)."""

    def __init__(self, config: TeacherConfig, look: Callable[[dict[str, Any], str], Awaitable[Any]]) -> None:
        self._config, self._look = config, look
        self._tokenizer: Any = None
        self._behind = ""

    async def prompt(self, messages: list[Message]) -> str:
        """Up to where the answer starts.

        Raises:
            ConfigError: there is no template.
            RequestRejected: the template refuses these messages.
        """
        if self._config.tokenizer is not None:
            return self._by_tokenizer(messages)
        try:
            reply = await self._look({"messages": messages}, "/apply-template")
        except TeacherError as error:
            if error.status not in (404, 405, 501):
                raise
            raise ConfigError(
                f"teacher.tokenizer: {self._config.model} scores raw text, and its server renders none ({error}); "
                "name the folder or hub id of its tokenizer"
            ) from error
        return str(scores.get(reply, "prompt"))

    def _by_tokenizer(self, messages: list[Message]) -> str:
        import jinja2
        import transformers  # seconds, and only needed here

        if self._tokenizer is None:
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._config.tokenizer)
            except (OSError, ValueError) as error:
                said = str(error).splitlines()[0]
                raise ConfigError(f"teacher.tokenizer: cannot load {self._config.tokenizer!r}: {said}") from error
        if not self._tokenizer.chat_template:
            raise ConfigError(f"teacher.tokenizer: {self._config.tokenizer!r} has no chat template")
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise RequestRejected(f"the teacher's chat template refuses the conversation: {error}") from error

    async def behind(self) -> str:
        """What follows an answer, the end token first.

        Raises:
            ConfigError: the template changes answers.
        """
        if not self._behind:
            said = [("user", "Hello"), ("assistant", _ANSWER), ("user", _NEXT)]
            whole = await self.prompt([{"role": role, "content": content} for role, content in said])
            self._behind = whole.partition(_ANSWER)[2].partition(_NEXT)[0]
        if not self._behind:
            raise ConfigError(f"teacher: the chat template of {self._config.model} puts nothing behind an answer")
        return self._behind
