"""What every teacher has: its section of the YAML, its transport, its prices."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec
from pydantic import Field, field_validator

from blackbox_kd.errors import ConfigError
from blackbox_kd.hashing import content_id
from blackbox_kd.sections import Section
from blackbox_kd.types import Completion, Endpoint, Request, Scores, Usage

if TYPE_CHECKING:  # importing the SDK takes half a second
    from blackbox_kd.teachers.sdk import SdkTransport

Scoring = Literal["prompt_logprobs", "echo", "generate", "forced", "none"]
"""How given tokens are scored: in one call of any of three kinds, or one call a token (`logit_bias`): see `ways`."""

Prefill = Literal["assistant_last", "continue_final_message", "prefix", "none"]
"""What makes an endpoint continue an assistant's text: see `prefill.PREFILLS`."""

PrefillReply = Literal["whole", "new", "stripped"]
"""The given text and what is new; what is new; the same without the whitespace that it begins with."""


VARIABLE_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Of the environment, as people name them; most keys look otherwise."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an endpoint can do for a model. The defaults are what every chat API can."""

    chat: bool = True
    top_logprobs_max: int = 0
    """Alternatives that it was seen to give for a token; 0 for no logprobs."""
    has_bytes: bool = False
    """Tokens come with their UTF-8 bytes."""
    token_ids: bool = False
    """Tokens come with the endpoint's own ids."""
    scoring: Scoring = "none"
    prefill: Prefill = "none"
    prefill_reply: PrefillReply = "new"
    """What the text of a reply holds where an assistant's text was continued."""
    n_max: int = 1
    """Different answers that it was seen to give in one reply."""
    seed_honoured: bool = False
    """The same seed draws the same text, another seed another."""
    temperature_honoured: bool = False
    """0 is greedy, and 1 is not."""
    determinism_nats: float | None = None
    """Largest difference between a token's logprobs in two greedy answers; None where there are none to compare."""
    reasoning_hidden: bool = False
    """It bills for reasoning that it does not show."""
    rate_headers: bool = False
    """Replies say how much of a rate limit is left."""


class Reply(NamedTuple):
    """A 200."""

    data: bytes
    """Its body."""
    server_request_id: str | None = None
    """Its `x-request-id`."""
    headers: Mapping[str, str] = {}
    """All of them, names in lower case."""


class Call(NamedTuple):
    """One POST."""

    body: dict[str, Any]
    endpoint: Endpoint = "chat"


class Taken(NamedTuple):
    """What a 200 says."""

    completions: list[Completion] = []
    usage: Usage = Usage()
    scores: Scores | None = None


class Way(Protocol):
    """How a question becomes calls, one after the other, and their replies its answer."""

    async def calls(self, request: Request) -> list[Call]:
        """Raises:
        RequestRejected: this cannot be asked.
        """
        ...

    def read(self, request: Request, replies: list[Reply]) -> Taken:
        """The answer in the replies to all calls; the usage is that of the last.

        Raises:
            TeacherError: there is none in them.
        """
        ...


class Transport(Protocol):
    """Sends one body, once. Retrying, pacing and storing are the engine's."""

    async def send(self, body: dict[str, Any], path: str = "chat/completions") -> Reply:
        """The reply, where it is a 200; `path` is below the base URL, or with a slash in front below its host.

        Raises:
            TeacherError: by status, see `teachers.failures.error_of`.
        """
        ...


class TeacherPromptConfig(Section):
    """The teacher's private part; the student never sees it."""

    template: str | None = None
    """Jinja file of the system message; it may use {{ system }}, the prompt's own."""
    examples: str | None = None
    """JSONL of example conversations ({"messages": [...]}) that stand before the prompt."""


class PriceConfig(Section):
    """US dollars for a million tokens."""

    input: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0)
    """None: as `input`."""
    output: float = Field(ge=0)
    batch_factor: float = Field(0.5, ge=0)
    """What the Batch API asks, as a share of these."""

    def cost(self, usage: Usage) -> float:
        """Dollars for one answer."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
        return (fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output) / 1e6

    def in_batches(self) -> PriceConfig:
        """What the Batch API asks."""
        cached = None if self.cached_input is None else self.cached_input * self.batch_factor
        prices = {"input": self.input * self.batch_factor, "output": self.output * self.batch_factor}
        return self.model_copy(update={**prices, "cached_input": cached})


class TeacherConfig(Section):
    """Common to all providers; each adds how it is reached."""

    model: str
    """Name that the endpoint knows the model by."""
    prompt: TeacherPromptConfig = TeacherPromptConfig()
    seed: int | None = 0
    """Each draw of each question is sent a seed of its own that is hashed from this; null sends none."""
    concurrency: int = Field(8, ge=1)
    """Most requests in flight at once; the limiter starts with a few and finds out how many are worth it."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds for one answer."""
    give_up_s: float = Field(300.0, gt=0)
    """Seconds of nothing but failures after which a run stops; also the longest pause that a 429 may ask for, and how
    long one question is asked again that gets nothing but 429s while others are answered."""
    max_retries: int = Field(5, ge=0)
    """Times that a request is asked again after a transient failure; a 429 does not count."""
    require_logprobs: bool = False
    """Stop where logprobs are asked for and do not come."""
    retry_dead_letters: bool = False
    """Ask again what the endpoint rejected in an earlier run."""
    token_limit_param: str = "max_tokens"
    """`max_completion_tokens` for OpenAI's newer models."""
    reasoning_effort: str | None = None
    """Sent as it is; null sends none."""
    tokenizer: str | None = None
    """Folder or hub id of the teacher's tokenizer with its chat template, for `scoring` by raw text (echo, generate);
    null: the server is asked to render, as llama.cpp's can."""
    extra_body: dict[str, Any] = {}
    """Added to every body (and so to its key)."""
    omit_params: list[str] = []
    """Parameters that the endpoint does not accept, e.g. [seed, top_p]."""
    price: PriceConfig | None = None
    """Null: as in litellm's table where that package is installed; else costs are not known, and shown as such."""

    def listed_as(self) -> list[str]:
        """Names that a table of prices may know the model by, the closest first; none where nobody sends a bill."""
        return []

    capabilities: dict[str, Any] = {}
    """What you know better than `probe` about the endpoint, e.g. {prefill: prefix, n_max: 1}."""

    @field_validator("extra_body")
    @classmethod
    def _is_json(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            content_id(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON: {error}") from error
        return given

    @field_validator("capabilities")
    @classmethod
    def _known_capabilities(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            msgspec.convert(given, Capabilities)
        except msgspec.ValidationError as error:
            known = ", ".join(Capabilities.__struct_fields__)
            raise ValueError(f"{error} (known are {known})") from error
        return given

    def is_the_same_as(self, other: TeacherConfig) -> bool:
        """Whether both ask one model at one address."""
        return (self.model, self.address) == (other.model, other.address)

    @property
    def address(self) -> str:
        """Where the model is asked, without credentials: `capabilities` are kept for a model at an address."""
        return ""

    def connect(self) -> AbstractAsyncContextManager[Transport]:
        """A transport that works, closed at the end of the block."""
        raise NotImplementedError

    def open_sdk(self) -> AbstractAsyncContextManager[SdkTransport]:
        """The OpenAI SDK, for files and batches.

        Raises:
            ConfigError: the provider has no Batch API.
        """
        raise ConfigError(f"sample.batch: the provider of {self.model!r} has no Batch API; set sample.batch to false")

    def check(self) -> None:
        """Raise ConfigError for what can be known to be wrong without asking anybody."""


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None where no variable is named.

    Raises:
        ConfigError: the variable is not set, or holds what is no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key and not VARIABLE_NAME.fullmatch(variable):  # it may be the key itself, which is not to be shown
        raise ConfigError(
            "teacher.api_key_env is the name of an environment variable, not the key itself, and no variable of the "
            "name that it holds is set; export OPENAI_API_KEY=... and set it to OPENAI_API_KEY"
        )
    if not key:
        raise ConfigError(f"teacher.api_key_env: environment variable {variable} is not set; export {variable}=...")
    if not can_be_sent(key):
        raise ConfigError(
            "teacher.api_key_env: the key in that variable holds a character that is not printable ASCII; copy it again"
        )
    return key


def can_be_sent(value: str) -> bool:
    """Whether a header can hold it."""
    return value.isascii() and value.isprintable()
