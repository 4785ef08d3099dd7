"""A world in which everything is known: a teacher that is a table, a student so small that all its answers are counted.

A prompt is a kind (x or y) and two digits, an answer a few signs. The teacher's next sign hangs on the kind and
on the sign before; the digits mean nothing, and make many prompts of two. An answer is drawn by at most LONGEST
tokens, so it is one of 40 (`ANSWERS`), and the KL between teacher and student is a sum over them: nothing is drawn,
nothing is estimated. The teacher gives every sign some mass everywhere, so that both directions are finite.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blackbox_kd.student.render import Renderer
from blackbox_kd.student.student import Student
from tests.tiny import llama

SIGNS, END = "+-*", "<|end|>"
"""A word is not cut in two by `prefix` and `forks`, so an answer has no words."""
TOKENS = (*SIGNS, END)
LONGEST = 3
"""Tokens of an answer; one that has not ended then is cut off."""
PROMPTS = [f"{kind}{number:02}" for number in range(100) for kind in "xy"]
SPECIAL = (END, "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Path_ = tuple[str, ...]


class Language(NamedTuple):
    """kind -> sign before ("" at the start) -> weights of TOKENS."""

    tables: Mapping[str, Mapping[str, Sequence[int]]]

    def next(self, prompt: str, written: str) -> dict[str, float]:
        """Token -> probability. Two signs are as good as an end, and so is what is no sign."""
        weights = self.tables[prompt[0]].get(written, (1, 1, 1, 97))
        return {token: weight / sum(weights) for token, weight in zip(TOKENS, weights, strict=True)}

    def logprob(self, prompt: str, answer: Path_) -> float:
        """Nats of a whole answer."""
        return sum(math.log(self.next(prompt, "".join(answer[:i]))[token]) for i, token in enumerate(answer))

    def write(self, prompt: str, written: str, rng: random.Random | None, limit: int) -> list[str]:
        """Tokens behind `written`, with the end where it was drawn; the likeliest ones where there is no `rng`."""
        tokens: list[str] = []
        while len(tokens) < limit and END not in tokens:
            given = self.next(prompt, written + "".join(tokens))
            tokens += rng.choices(list(given), list(given.values())) if rng else [max(given, key=lambda t: given[t])]
        return tokens


TEACHER = Language({
    "x": {"": (70, 20, 8, 2), "+": (5, 55, 5, 35), "-": (10, 5, 35, 50), "*": (40, 5, 10, 45)},
    "y": {"": (8, 20, 70, 2), "+": (10, 5, 35, 50), "-": (50, 10, 5, 35), "*": (5, 20, 5, 70)},
})  # fmt: skip
SWAPPED = Language({"x": TEACHER.tables["y"], "y": TEACHER.tables["x"]})
"""A teacher that answers the other question: what is learnt from it is not the teacher's."""
WRONG = Language({
    "x": {"": (23, 70, 5, 2), "+": (35, 35, 10, 20), "-": (10, 45, 30, 15), "*": (40, 20, 30, 10)},
    "y": {"": (5, 70, 23, 2), "+": (35, 10, 35, 20), "-": (30, 45, 10, 15), "*": (10, 50, 30, 10)},
})  # fmt: skip
"""What the student speaks before it meets the teacher: far off, but it tells the kinds apart. One that must learn to do
so (or to take each for the other) stays for long where both are answered alike."""

ANSWERS: list[Path_] = [
    (*signs, END) for size in range(LONGEST) for signs in product(SIGNS, repeat=size)
] + list(product(SIGNS, repeat=LONGEST))  # fmt: skip


class Distance(NamedTuple):
    """Between teacher and student, in nats an answer, mean over prompts."""

    forward: float
    """`sum_y p(y) log p(y)/q(y)`, p of the teacher."""
    reverse: float
    """`sum_y q(y) log q(y)/p(y)`, q of the student among ANSWERS."""
    behind: float
    """`sum_a q(a) sum_z p(z|a) log p(z|a)/q(z|a)`, a the first token, z what follows: the forward KL on states of the
    student's own, as far as that can be learnt from its beginnings."""
    astray: float
    """Mass that the student gives to anything else: other bytes, marks of the template."""


def distance(student: Student, teacher: Language = TEACHER, prompts: Sequence[str] = PROMPTS[::21]) -> Distance:
    """Exact: every answer through the student's real forward pass."""
    renderer = student.renderer
    ids = [renderer.tokenizer.convert_tokens_to_ids(list(answer)) for answer in ANSWERS]
    asked = [renderer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    rows = [renderer.join(prompt_ids, answer_ids) for prompt_ids in asked for answer_ids in ids]
    sums = [sum(values) for values in student.logprobs(rows, batch_size=256)]
    return _distance(_logprobs(teacher, prompts), np.array(sums).reshape(len(prompts), len(ANSWERS)))


def blind(teacher: Language = TEACHER) -> Distance:
    """The least that is reached without a look at the question: one answer distribution for both kinds.

    For `forward` that is the mean of the teacher's two, for `reverse` their geometric mean; `behind` is the former's.
    """
    log_p_PY = _logprobs(teacher, "xy")
    mean_Y, geometric_Y = np.log(np.exp(log_p_PY).mean(0)), log_p_PY.mean(0)
    mean, geometric = (_distance(log_p_PY, np.stack([log_q_Y] * 2)) for log_q_Y in (mean_Y, geometric_Y))
    return mean._replace(reverse=geometric.reverse)


def _logprobs(language: Language, prompts: Sequence[str]) -> np.ndarray:
    return np.array([[language.logprob(prompt, answer) for answer in ANSWERS] for prompt in prompts])


def _distance(log_p_PY: np.ndarray, log_q_PY: np.ndarray) -> Distance:
    p_PY, among_P1 = np.exp(log_p_PY), np.exp(log_q_PY).sum(1, keepdims=True)
    q_PY = np.exp(log_q_PY) / among_P1
    means = (
        (p_PY * (log_p_PY - log_q_PY)).sum(1),
        (q_PY * (np.log(q_PY) - log_p_PY)).sum(1),
        _behind(p_PY, q_PY),
        1 - among_P1[:, 0],
    )
    return Distance(*(float(each.mean()) for each in means))


def _behind(p_PY: np.ndarray, q_PY: np.ndarray) -> np.ndarray:
    starts_AY = np.array([[answer[0] == token for answer in ANSWERS] for token in TOKENS], float)
    p_PA, q_PA = p_PY @ starts_AY.T, q_PY @ starts_AY.T
    after_PY = (p_PY / (p_PA @ starts_AY)) * np.log(p_PY / (p_PA @ starts_AY) / (q_PY / (q_PA @ starts_AY)))
    found: np.ndarray = (q_PA * (after_PY @ starts_AY.T)).sum(1)
    return found


def make_student(folder: Path, language: Language = WRONG, steps: int = 250) -> Path:
    """Save a two-layer chat model that speaks `language`; its tokens are bytes, since alignment works on bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=list(SPECIAL[1:])
    )
    fast.chat_template = TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = llama(fast, max_position_embeddings=64)
        _teach(model, Renderer(fast, [fast.eos_token_id]), language, steps)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _teach(model: Any, renderer: Renderer, language: Language, steps: int) -> None:
    """Cross entropy against the whole distribution at every token of the answers of LONGEST signs."""
    ids = renderer.tokenizer.convert_tokens_to_ids(list(TOKENS))
    rows, targets = [], []
    for prompt in PROMPTS:
        prompt_ids = renderer.prompt([{"role": "user", "content": prompt}])
        for path in product(SIGNS, repeat=LONGEST - 1):
            rows.append([*prompt_ids, *renderer.tokenizer.convert_tokens_to_ids(list(path))])
            targets.append([list(language.next(prompt, "".join(path[:i])).values()) for i in range(LONGEST)])
    rows_NT, targets_NSA = torch.tensor(rows), torch.tensor(targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model.train()
    for _ in range(steps):
        mine = torch.randint(len(rows), (64,))
        logprobs_BSV = model(rows_NT[mine], logits_to_keep=LONGEST).logits.log_softmax(-1)
        loss = -(targets_NSA[mine] * logprobs_BSV[:, :, ids]).sum(-1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
