"""The student writes, and its samples are rows: a phase that was drawn before is read back, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blackbox_kd import health, vllm
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import AlignmentError, TeacherError
from blackbox_kd.progress import say
from blackbox_kd.sections import VllmConfig
from blackbox_kd.student.student import Student
from blackbox_kd.types import (
    Completion,
    Prompt,
    Purpose,
    Request,
    Rollout,
    SamplingParams,
    TokenLogprob,
    Usage,
    scorer,
)

TOP = 20
"""Alternatives of the student's own that a rollout carries: as many as the hosted APIs show of a teacher's."""
SAME_POLICY_NATS = 0.05
"""Mean of a token over a round; as far as an endpoint's scores may be from what it wrote with (`checks.agreement`)."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A student that writes under one setting; what it wrote before is read back."""

    student: Student
    sampling: SamplingParams
    purpose: Purpose
    round: int
    seed: int
    """Of the draws; it is part of the request at a temperature above 0."""
    batch_size: int
    corpus: Corpus
    run_id: str
    server: VllmConfig | None = None
    """Draws scored answers in the student's place."""
    adapter: Path | None = None
    """What the server is to load: the adapter that the student has; None for its base."""

    def answers(
        self, prompts: Sequence[Prompt], *, n: int = 1, scored: bool = False
    ) -> list[tuple[Prompt, Completion]]:
        """`n` completions for each prompt that fits into `student.max_length`, in order.

        `scored` stores the drawn tokens with their log-probs, from a forward pass in eval mode as the update's.
        """
        student = self.student
        prompt_ids = {prompt.prompt_id: student.renderer.prompt(prompt.messages) for prompt in prompts}
        longest = student.config.max_length - self.sampling.max_completion_length
        fitting = [prompt for prompt in prompts if len(prompt_ids[prompt.prompt_id]) <= longest]
        if len(fitting) < len(prompts):
            say(f"{len(prompts) - len(fitting)} prompts are longer than student.max_length allows; they are left out")
        drawn = [(prompt, draw) for prompt in fitting for draw in range(n)]
        requests = [self._request(prompt, draw) for prompt, draw in drawn]
        known = self.corpus.answers([request.request_key for request in requests])
        todo = [(p, r) for (p, _), r in zip(drawn, requests, strict=True) if r.request_key not in known]
        if todo:
            asked = [(request, prompt_ids[prompt.prompt_id]) for prompt, request in todo]
            known |= self._served(self.server, asked) if self.server and scored else self._written(asked, scored)
        return [(p, known[r.request_key][0]) for (p, _), r in zip(drawn, requests, strict=True)]

    def rollouts(self, prompts: Sequence[Prompt], *, n: int = 1) -> list[Rollout]:
        """Scored answers with their tokens, `n` for each prompt.

        They are scored anew, also where they were read back: the corpus rounds, and an update that was repeated after
        a kill would not be the same.

        Raises:
            AlignmentError: stored tokens that do not spell the stored text, or that another policy wrote.
            TeacherError: see `vllm.draw`.
        """
        student = self.student
        answers = self.answers(prompts, n=n, scored=True)
        ids = [self._ids(completion) for _, completion in answers]
        prompt_ids = [student.renderer.prompt(prompt.messages) for prompt, _ in answers]
        rows = [student.renderer.join(*each) for each in zip(prompt_ids, ids, strict=True)]
        scores = student.score(rows, batch_size=self.batch_size, k=TOP)
        found = [
            Rollout(
                prompt=prompt,
                completion=completion,
                prompt_ids=prompt_ids[i],
                completion_ids=ids[i],
                logprobs=scores[i].logprobs.tolist(),
                draw=i % n,
                top=scores[i].top,
            )
            for i, (prompt, completion) in enumerate(answers)
        ]
        if not (apart := health.logprob_gap(found)) <= SAME_POLICY_NATS:
            raise AlignmentError(
                f"the drawn tokens were kept with log-probs that are {apart:.3f} nats a token from the student's (the "
                f"limit is {SAME_POLICY_NATS}): another policy wrote them"
            )
        return found

    def _request(self, prompt: Prompt, draw: int) -> Request:
        body = {
            "model": self.student.config.model,
            "policy": self.student.policy,
            "messages": prompt.messages,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_completion_length,
        }
        if self.sampling.temperature > 0:
            body["seed"] = self.seed
        return Request(
            purpose=self.purpose, endpoint="generate", body=body, prompt_id=prompt.prompt_id, sample_idx=draw
        )

    def _served(self, server: VllmConfig, todo: Sequence[tuple[Request, list[int]]]) -> dict[str, list[Completion]]:
        sizes = {request.request_key: len(prompt_ids) for request, prompt_ids in todo}

        def made(request: Request, ids: list[int], logprobs: list[float]) -> Completion:
            return self._completion(request, sizes[request.request_key], ids, self._tokens(ids, logprobs))

        model = server.model if self.adapter is None else f"policy-{self.student.policy}"
        drawing = vllm.Drawing(model, todo, self.student.renderer.end_id, made)
        vllm.draw(server, self.adapter, drawing, self.corpus, self.run_id)
        found = self.corpus.answers(list(sizes))
        if len(found) < len(sizes):
            raise TeacherError(
                f"onpolicy.vllm: {len(sizes) - len(found)} of {len(sizes)} rollouts were not written; the same "
                "command asks for them again"
            )
        return found

    def _written(self, todo: Sequence[tuple[Request, list[int]]], scored: bool) -> dict[str, list[Completion]]:
        student = self.student
        written = self._write(todo, scored)
        by = scorer(student.config.model, student.policy)
        with self.corpus.connect():
            self.corpus.add_requests([request for request, _ in todo])
            self.corpus.add_completions(written, scorer=by, run_id=self.run_id)
        return {completion.request_key: [completion] for completion in written}

    def _write(self, todo: Sequence[tuple[Request, list[int]]], scored: bool) -> list[Completion]:
        student = self.student
        drawn = student.generate(
            [prompt_ids for _, prompt_ids in todo],
            self.sampling,
            batch_size=self.batch_size,
            seed=self.seed,
            description=f"student writes ({self.purpose})",
        )
        tokens: list[list[TokenLogprob] | None] = [None] * len(drawn)
        if scored:
            rows = [student.renderer.join(prompt_ids, ids) for (_, prompt_ids), ids in zip(todo, drawn, strict=True)]
            scores = student.logprobs(rows, batch_size=self.batch_size)
            tokens = [self._tokens(ids, values) for ids, values in zip(drawn, scores, strict=True)]
        return [
            self._completion(request, len(prompt_ids), ids, logprobs)
            for (request, prompt_ids), ids, logprobs in zip(todo, drawn, tokens, strict=True)
        ]

    def _tokens(self, ids: list[int], logprobs: list[float]) -> list[TokenLogprob]:
        if len(ids) != len(logprobs):
            raise AlignmentError(f"{len(logprobs)} log-probs for {len(ids)} drawn tokens")
        texts = [self.student.tokenizer.decode([i]) for i in ids]
        return [TokenLogprob(token=t, id=i, logprob=v) for t, i, v in zip(texts, ids, logprobs, strict=True)]

    def _completion(
        self, request: Request, prompt_tokens: int, ids: list[int], logprobs: list[TokenLogprob] | None
    ) -> Completion:
        return Completion(
            request_key=request.request_key,
            prompt_id=request.prompt_id,
            author="student",
            model=request.model,
            policy=self.student.policy,
            round=self.round,
            text=self.student.renderer.decode(ids),
            finish_reason="stop" if ids[-1:] == [self.student.renderer.end_id] else "length",
            usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=len(ids)),
            logprobs=logprobs,
        )

    def _ids(self, completion: Completion) -> list[int]:
        ids = [token.id if token.id is not None else -1 for token in completion.logprobs or []]
        if len(ids) != completion.usage.completion_tokens or self.student.renderer.decode(ids) != completion.text:
            raise AlignmentError(f"the stored tokens of rollout {completion.completion_id} do not spell its text")
        return ids
