"""What can this endpoint do? About a dozen calls of a few tokens, each believed for what came back, not for its 200.

Parameters are dropped, capped and misread in silence by servers and gateways alike. A rejected call means no.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import RequestRejected, TeacherRefused, TransientError
from blackbox_kd.hashing import content_id
from blackbox_kd.teachers import checks, scores
from blackbox_kd.teachers.base import Capabilities, Reply, TeacherConfig
from blackbox_kd.teachers.checks import Answer, Verdict
from blackbox_kd.teachers.prefill import PREFILLS, Body, prefilled
from blackbox_kd.teachers.wire import chat_body, native_body
from blackbox_kd.types import Endpoint, Message, Request, SamplingParams

Ask: TypeAlias = Callable[[Request], Awaitable[Reply]]
"""Sends one request; raises a TeacherError where the reply is no 200."""

QUESTION: list[Message] = [
    {"role": "user", "content": "Write one surprising sentence about a fox and a lighthouse."},
]
"""Its answers have an open wording: one that is copied, shifted or started anew does not pass for another."""
OPENING = "A fox once lived in an old lighthouse by the sea. One night it"
"""The same for /completions, which continues raw text."""
ANSWER_TOKENS = 16
PREFILL_TOKENS = 6
"""Some count those that are given; where there are no logprobs, a few words must match."""
REASONING_REFUSES = {"temperature", "top_p", "seed"}
"""The last try is without them, and with room to think; models that reason reject a limit that they run into."""
REASONING_TOKENS = 1024
HOSTED_TOP = 20
"""What the hosted APIs allow at most; an endpoint that gives so many is asked for MORE_TOP."""
MORE_TOP = 100


def capabilities(corpus: Corpus, config: TeacherConfig) -> Capabilities:
    """What later stages go by: `teacher.capabilities` over what was probed over the defaults."""
    probed = corpus.capabilities(config.model, config.address)
    return msgspec.convert(probed | config.capabilities, Capabilities)


async def probe(config: TeacherConfig, ask: Ask) -> dict[str, tuple[Any, str]]:
    """Name of a capability -> what was found, and how.

    Raises:
        TeacherError: a refusal (key, quota), a rate limit, a broken connection, or no answer to anything; other
            rejected calls only mean no.
    """
    probing = _Probing(config, ask)
    await probing.writing()
    await probing.drawing()
    await probing.prefilling()
    await probing.scoring()
    if not probing.greedy.choices and not probing.opening.choices:
        raise TeacherRefused(
            f"{config.model} answers neither chat nor completions ({probing.greedy.no}); "
            "check teacher.base_url, teacher.model and teacher.token_limit_param"
        )
    return probing.found


class _Probing:
    """The calls in order; later ones build on the greedy answer of the first."""

    def __init__(self, config: TeacherConfig, ask: Ask) -> None:
        self.config, self.ask = config, ask
        self.found: dict[str, tuple[Any, str]] = {}
        self.omit = set(config.omit_params)
        self.top: int | None = None
        self.greedy = self.again = self.opening = Answer()

    async def send(self, body: dict[str, Any], endpoint: Endpoint = "chat") -> Answer:
        """One call; what it takes for a no, and what it raises, see `probe`."""
        body = {key: value for key, value in body.items() if key not in self.omit}
        request = Request(purpose="probe", body=body, prompt_id=content_id(QUESTION), endpoint=endpoint)
        try:
            reply = await self.ask(request)
        except (RequestRejected, TransientError) as error:
            if isinstance(error, TransientError) and error.status not in (200, 500, 501):
                raise  # busy or gone: that says nothing about what it can do
            return Answer(no=str(error))
        return checks.read(reply)

    def chat(self, *, top: int | None = None, tokens: int = ANSWER_TOKENS, hot: bool = False, draw: int = 0) -> Body:
        """A body that asks the question."""
        temperature = 1.0 if hot else 0.0
        sampling = SamplingParams(temperature=temperature, max_completion_length=tokens, top_logprobs=top)
        return chat_body(self.config, QUESTION, sampling, draw)

    def completion(self, text: str, tokens: int = 1, **more: Any) -> Body:
        """A body that continues raw text; tokens: 0 would mean one to some servers and no limit to others."""
        given = {"model": self.config.model, "prompt": text, "max_tokens": tokens, "temperature": 0, "logprobs": 5}
        return given | self.config.extra_body | more

    async def writing(self) -> None:
        """Two greedy answers under different seeds, with as many alternatives as are accepted."""
        refused = await self._first_answer()
        answer, tokens = self.greedy, self.greedy.chat_tokens
        self.found["chat"] = bool(answer.choices), answer.no or "answers"
        self.found["reasoning_hidden"] = checks.hides_reasoning(answer)
        names = checks.rate_headers(answer.headers)
        self.found["rate_headers"] = bool(names), ", ".join(names) or "none with the first answer"
        for name, field in (("has_bytes", "bytes"), ("token_ids", "id")):
            count = sum(getattr(token, field) is not None for token in tokens)
            self.found[name] = count > 0, f"{count} of {len(tokens)} tokens"
        if answer.choices:
            self.again = await self.send(self.chat(top=self.top, draw=1))
        nats = scores.apart(tokens, self.again.chat_tokens)
        self.found["determinism_nats"] = nats, self.again.no or "largest difference between two greedy answers"
        self.found["top_logprobs_max"] = await self._alternatives(refused)

    async def _first_answer(self) -> str:
        """Set the greedy answer; returns what the endpoint said to more than it allows."""
        said = ""
        for self.top in (HOSTED_TOP, 5, None):
            self.greedy = await self.send(self.chat(top=self.top))
            said = said or self.greedy.no
            if self.greedy.choices:
                return said
        self.omit |= REASONING_REFUSES
        self.greedy = await self.send(self.chat(tokens=REASONING_TOKENS))
        if not self.greedy.choices:
            self.omit = set(self.config.omit_params)
        return said

    async def _alternatives(self, refused: str) -> tuple[int, str]:
        given = self.greedy.alternatives
        if self.top and not given:
            return 0, f"asked for {self.top}, got none with a 200"
        if given < HOSTED_TOP:
            return given, refused or f"asked for {self.top}"
        more = await self.send(self.chat(top=MORE_TOP, tokens=1))
        return max(given, more.alternatives), more.no or f"asked for {MORE_TOP}"

    async def drawing(self) -> None:
        """Temperature, seed and n: draws that must differ from each other, or must not."""
        first = await self.send(self.chat(hot=True)) if self.greedy.choices else Answer(no=self.greedy.no)
        same = await self.send(self.chat(hot=True)) if first.choices else first
        others = await self._several() if first.choices else first
        self.found.setdefault("n_max", (1, first.no))
        self.found["temperature_honoured"] = checks.heeds_temperature(self.greedy, self.again, [first, others])
        self.found["seed_honoured"] = checks.heeds_seed(
            first, same, others, sent="seed" in self.chat().keys() - self.omit
        )

    async def _several(self) -> Answer:
        """As many choices as are accepted, under another seed."""
        answer = Answer(no="n is in teacher.omit_params")
        for n in () if "n" in self.omit else (8, 4, 2):
            answer = await self.send(self.chat(hot=True, draw=1) | {"n": n})
            if answer.choices:
                break
        different = len(set(answer.texts))
        why = answer.no or f"asked for {n}, got {len(answer.choices)}, {different} different"
        self.found["n_max"] = len(answer.choices) if different > 1 else 1, why
        return answer if answer.choices else await self.send(self.chat(hot=True, draw=1))

    async def prefilling(self) -> None:
        """Give back a part of the greedy answer; in the form that works, the rest follows."""
        given = checks.cut(self.greedy.texts[0], self.greedy.tokens) if self.greedy.choices else None
        self.found["prefill"] = "none", self.greedy.no or "no text to cut"
        self.found["prefill_reply"] = "new", "nothing was continued"
        if given is None:
            return
        said = []
        for form in PREFILLS:
            body = prefilled(self.chat(top=self.top, tokens=PREFILL_TOKENS), given.prefix, form)
            answer = await self.send(body)
            works, why = checks.continues(answer, given)
            said.append(f"{form}: {why}")
            self.found["prefill"] = form if works else "none", "; ".join(said)
            if works:
                self.found["prefill_reply"] = checks.prefill_reply(answer, given)
                break

    async def scoring(self) -> None:
        """The first way that gives what the endpoint gave when it wrote the same tokens; the cheapest first."""
        said = []
        checks_of = {"prompt_logprobs": self._prompt_logprobs, "echo": self._echo, "generate": self._generate,
                     "forced": self._forced}  # fmt: skip
        for way, check in checks_of.items():
            works, why = await check()
            said.append(f"{way}: {why}")
            self.found["scoring"] = way if works else "none", "; ".join(said)
            if works:
                break

    async def _prompt_logprobs(self) -> Verdict:
        """vLLM scores a conversation: the greedy answer is its last message."""
        if not self.greedy.tokens:
            return False, self.greedy.no or "no logprobs to check it by"
        body = prefilled(self.chat(tokens=1), self.greedy.texts[0], "assistant_last")
        answer = await self.send(body | {"prompt_logprobs": 1})
        return checks.agreement(self.greedy.tokens, scores.prompt_tokens(answer.data), answer.no)

    async def _echo(self) -> Verdict:
        """/completions repeats its prompt with logprobs."""
        self.opening = await self.send(self.completion(OPENING, ANSWER_TOKENS), "completions")
        wrote = self.opening.tokens
        if not wrote:
            return False, self.opening.no or "no logprobs to check it by"
        answer = await self.send(self.completion(OPENING + self.opening.texts[0], echo=True), "completions")
        return checks.agreement(wrote, scores.echoed_tokens(answer.data), answer.no)

    async def _generate(self) -> Verdict:
        """SGLang's own endpoint."""
        if not self.opening.tokens:
            return False, self.opening.no or "no logprobs to check it by"
        body = native_body(self.config, OPENING + self.opening.texts[0], 1)
        answer = await self.send(body, "native")
        return checks.agreement(self.opening.tokens, scores.native_tokens(answer.data), answer.no)

    async def _forced(self) -> Verdict:
        """One token a call, by `logit_bias`: an unlikely one must keep the logprob that it had as an alternative."""
        wrote = self.opening.tokens
        others = [top for token in wrote[:1] for top in token.top_logprobs if top.id not in (None, token.id)]
        if not others:
            return False, self.opening.no or "no token ids to force"
        middle = len(wrote) // 2
        before = "".join(scores.spelling(token) for token in wrote[:middle])
        offs = []
        for text, token in ((OPENING, others[0]), (OPENING + before, wrote[middle])):
            answer = await self.send(self.completion(text, logit_bias={str(token.id): 100}), "completions")
            got = answer.tokens
            if not got or got[0].id != token.id:
                return False, answer.no or "ignored: another token comes back"
            offs.append(abs(got[0].logprob - token.logprob))
        return max(offs) <= scores.TOLERANCE_NATS, f"{len(offs)} forced tokens, off by {max(offs):.3f} nats"
