"""What flows between the rooms of the house. All frozen; ids are content hashes (`hashing.content_id`).

prompt -> request -> (attempts) -> completion -> [rollout -> feedback ->] train sample -> checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from blackbox_kd.hashing import content_id

if TYPE_CHECKING:
    import numpy as np

Message: TypeAlias = dict[str, Any]
"""`{"role": ..., "content": ...}`, as in the chat-completions API."""

Byte: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=255)]

Split = Literal["train", "heldout", "ood", "holdback"]
Author = Literal["teacher", "student", "judge"]
Purpose = Literal[
    "sample", "best_of_n", "relabel", "prefix", "rubric", "judge", "score", "fork", "rollout", "evaluate", "win_rate",
    "probe",
]  # fmt: skip
Endpoint = Literal["chat", "completions", "native", "generate"]
"""`chat`: POST /chat/completions. `completions`: POST /completions. `native`: SGLang's POST /generate, beside the /v1
of the others. `generate`: the student's own decoding."""

WIRE_VERSION = 1
"""Part of every `request_key`; raised when the meaning of a stored body changes."""


def scorer(model: str, context: str | None) -> str:
    """Who scored: a model under a private prompt (`context` = its hash), or a student under an adapter (its policy)."""
    return f"{model}@{context or 'bare'}"


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation to answer, as the student sees it."""

    messages: list[Message]
    split: Split
    source: str
    meta: dict[str, Any] = {}
    prompt_id: str = ""
    """Hash of the messages."""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "prompt_id", content_id(self.messages))

    @property
    def text(self) -> str:
        """The last user message."""
        return str(next(m["content"] for m in reversed(self.messages) if m["role"] == "user"))


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is drawn; the names are TRL's."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int = 256
    """Tokens."""
    top_logprobs: int | None = None
    """Alternatives asked for at each token; None asks for no logprobs at all."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A question to an endpoint. What is asked is in `body`; everything else is why."""

    purpose: Purpose
    body: dict[str, Any]
    """The JSON that is sent, with `model` and `messages`."""
    prompt_id: str
    sample_idx: int = 0
    """The draw number for this body; 0 at temperature 0."""
    endpoint: Endpoint = "chat"
    context_hash: str | None = None
    """Hash of the teacher's private prompt; None for a bare one."""
    completion_id: str | None = None
    """The student's text that is asked about; None where the question is about no text."""
    cut_byte: int | None = None
    """Where that text was cut, in UTF-8 bytes; None where it is whole."""
    request_key: str = ""
    """Hash of what the endpoint is asked: base URL, key, run, headers and template names are not in it."""

    def __post_init__(self) -> None:
        asked = {
            "wire": WIRE_VERSION,
            "endpoint": self.endpoint,
            "body": self.body,
            "sample_idx": self.sample_idx,
        }
        msgspec.structs.force_setattr(self, "request_key", content_id(asked))

    @property
    def model(self) -> str:
        """The model asked for; the one that served is in the completion."""
        return str(self.body["model"])


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answer, as the endpoint bills them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Reasoning tokens included, as in the chat-completions API."""
    cached_tokens: int = 0
    """The part of `prompt_tokens` that was read from the provider's cache."""
    reasoning_tokens: int = 0


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One token and its natural log-probability. https://platform.openai.com/docs/api-reference/chat/object"""

    token: str
    logprob: float
    bytes: list[Byte] | None = None
    """UTF-8 bytes; None where the endpoint gives none."""
    id: int | None = None
    """The endpoint's own token id; None where it gives none."""


class TokenLogprob(TopLogprob, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A sampled token with the alternatives shown beside it (it may be outside of them)."""

    top_logprobs: list[TopLogprob] = []


class VocabToken(NamedTuple):
    """A token of a scorer, as its endpoint shows it."""

    text: str
    bytes: bytes | None
    """None where the endpoint gives none."""


class TeacherTokens(NamedTuple):
    """One completion as its scorer saw it: T tokens with K alternatives each, ids as in `vocab`, natural logprobs."""

    token_ids: np.ndarray
    """(T,) int64; below 0 where the endpoint gives no ids."""
    token_logprobs: np.ndarray
    """(T,) float64; NaN where the endpoint hides one."""
    top_ids: np.ndarray
    """(T, K) int64; 0 where fewer than K were shown."""
    top_logprobs: np.ndarray
    """(T, K) float64; -inf where fewer than K were shown, or one is hidden."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    request_key: str
    prompt_id: str
    author: Author
    model: str
    text: str
    finish_reason: str
    choice_idx: int = 0
    policy: str | None = None
    """Content hash of the base and adapter that wrote it, `base:HASH` without an adapter; None for a teacher."""
    round: int = 0
    """0 before the on-policy stage, then its rounds from 1."""
    reasoning: str | None = None
    served_model: str | None = None
    system_fingerprint: str | None = None
    usage: Usage = Usage()
    logprobs: list[TokenLogprob] | None = None
    """None where none were asked for or given."""
    text_bytes: bool = False
    """Whether token bytes were left out because they are those of the text."""
    completion_id: str = ""
    """Hash of request, choice and text."""

    def __post_init__(self) -> None:
        identity = content_id([self.request_key, self.choice_idx, self.author, self.text])
        msgspec.structs.force_setattr(self, "completion_id", identity)


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """A completion as a scorer that did not write it sees it."""

    completion_id: str
    model: str
    """The scorer's, whose tokens these are."""
    logprobs: list[TokenLogprob]
    text_bytes: bool = False
    """As in `Completion`."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP call, failures too."""

    attempt_id: str
    request_key: str
    run_id: str
    attempted_at: float
    """Seconds since the epoch."""
    status: int | None = None
    """HTTP status; None where there was no answer."""
    error: str | None = None
    retry_after_s: float | None = None
    latency_s: float | None = None
    server_request_id: str | None = None
    usage: Usage = Usage()
    cost_usd: float | None = None
    """None where the price is not known."""
    billed: bool | None = None
    """None where nobody can know: the call was in flight when the process or the connection died."""


class TopK(NamedTuple):
    """The likeliest next tokens at S places of a text, in the student's vocabulary."""

    ids: np.ndarray
    """(S, K) int, unique in a row; empty slots are id 0 with -inf."""
    logprobs: np.ndarray
    """(S, K) nats."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """The student's own sample for one prompt."""

    prompt: Prompt
    completion: Completion
    prompt_ids: list[int]
    """The rendered prompt in the student's tokens."""
    completion_ids: list[int]
    """The student's tokens as drawn, the end token included where it was drawn."""
    logprobs: list[float]
    """log pi(token) of each completion token under the policy that wrote it, temperature 1, eval mode."""
    draw: int = 0
    """Number among the samples of its prompt in this round."""
    top: Any = None
    """TopK of that policy at each completion token, in descending order; None where none was kept."""


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """What the teacher, judge or discriminator said of a student completion."""

    completion_id: str
    kind: str
    """`rewrite`, `afresh`, `grade`, ..."""
    scorer: str
    """Model and context hash that said it."""
    value: float | None = None
    """A score; None for feedback that is a text."""
    target_completion_id: str | None = None
    """The better text; None for feedback that is a score."""
    detail: dict[str, Any] = {}


class TrainSample(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens to learn from. The trainer reads weights, never an algorithm's name."""

    sample_id: str
    """completion_id of the text."""
    input_ids: list[int]
    weights: Mapping[str, list[float]]
    """Loss component (`student.components`) -> one weight for each of `input_ids`; 0 on tokens it does not train.

    For `pg` the weight is the advantage; for `pair` it is 1 on the chosen answer's tokens and -1 on the rejected one's.
    """
    soft: Any = None
    """TopK of the teacher at the tokens whose `topk_kl` weight is not 0, in their order; None where there are none."""
    logprobs: Mapping[str, list[float]] = {}
    """`old`: of the policy that wrote the tokens (`pg`); `ref`: of the reference (`pair`). As long as `input_ids`."""
    pair_id: str | None = None
    """Two samples of one pair share it, and are trained in one micro-batch."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A mean and its bootstrap 95% interval."""

    value: float
    lo: float
    hi: float
