"""The student writes, and its samples are rows: a phase that was drawn before is read back, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import AlignmentError
from blackbox_kd.progress import say
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


def roll_out(
    student: Student,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    purpose: Purpose,
    round_: int,
    seed: int,
    batch_size: int,
    corpus: Corpus,
    run_id: str,
) -> list[Rollout]:
    """One completion for each prompt that fits into `student.max_length`, in order.

    The behaviour log-probs come from a forward pass in eval mode, as the update computes them.
    """
    rendered = {prompt.prompt_id: student.renderer.prompt(prompt.messages) for prompt in prompts}
    longest = student.config.max_length - sampling.max_completion_length
    fitting = [prompt for prompt in prompts if len(rendered[prompt.prompt_id]) <= longest]
    if len(fitting) < len(prompts):
        say(f"{len(prompts) - len(fitting)} prompts are longer than student.max_length allows; they are left out")
    requests = [_request(student, prompt, sampling, purpose, seed) for prompt in fitting]
    known = corpus.answers([request.request_key for request in requests])
    todo = [(p, r) for p, r in zip(fitting, requests, strict=True) if r.request_key not in known]
    if todo:
        corpus.add_requests([request for _, request in todo])
        drawn = student.generate(
            [rendered[prompt.prompt_id] for prompt, _ in todo],
            sampling,
            batch_size=batch_size,
            seed=seed,
            description=f"student writes ({purpose})",
        )
        rows = [student.renderer.join(rendered[p.prompt_id], ids) for (p, _), ids in zip(todo, drawn, strict=True)]
        logprobs = student.logprobs(rows, batch_size=batch_size)
        written = [
            _completion(student, request, len(rendered[prompt.prompt_id]), ids, values, round_)
            for (prompt, request), ids, values in zip(todo, drawn, logprobs, strict=True)
        ]
        corpus.add_completions(written, scorer=scorer(student.config.model, student.policy), run_id=run_id)
        known |= {completion.request_key: [completion] for completion in written}
    return [
        _rollout(student, prompt, known[request.request_key][0], rendered[prompt.prompt_id])
        for prompt, request in zip(fitting, requests, strict=True)
    ]


def _request(student: Student, prompt: Prompt, sampling: SamplingParams, purpose: Purpose, seed: int) -> Request:
    body = {
        "model": student.config.model,
        "policy": student.policy,
        "messages": prompt.messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_completion_length,
    }
    if sampling.temperature > 0:
        body["seed"] = seed
    return Request(purpose=purpose, endpoint="generate", body=body, prompt_id=prompt.prompt_id)


def _completion(
    student: Student, request: Request, prompt_tokens: int, ids: list[int], logprobs: list[float], round_: int
) -> Completion:
    if len(ids) != len(logprobs):
        raise AlignmentError(f"{len(logprobs)} log-probs for {len(ids)} drawn tokens")
    tokens = [
        TokenLogprob(token=student.tokenizer.decode([i]), id=i, logprob=value)
        for i, value in zip(ids, logprobs, strict=True)
    ]
    return Completion(
        request_key=request.request_key,
        prompt_id=request.prompt_id,
        author="student",
        model=request.model,
        policy=student.policy,
        round=round_,
        text=student.renderer.decode(ids),
        finish_reason="stop" if ids[-1:] == [student.renderer.end_id] else "length",
        usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=len(ids)),
        logprobs=tokens,
    )


def _rollout(student: Student, prompt: Prompt, completion: Completion, prompt_ids: list[int]) -> Rollout:
    tokens = completion.logprobs or []
    ids = [token.id if token.id is not None else -1 for token in tokens]
    if student.renderer.decode(ids) != completion.text:
        raise AlignmentError(f"the stored tokens of rollout {completion.completion_id} do not spell its text")
    return Rollout(
        prompt=prompt,
        completion=completion,
        prompt_ids=prompt_ids,
        completion_ids=ids,
        logprobs=[token.logprob for token in tokens],
    )
