"""Texts as they are known by their letters: refusals, loops, personal data. Pure, and linear in the text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from blackbox_kd.near import normalised, words

_CANNOT = ["can't", "cannot", "can not", "won't", "am unable to", "'m unable to", "am not able to", "'m not able to"]
_HELP = ["assist", "help with", "help you with", "comply", "fulfil", "do that", "answer that", "discuss that"]
_MAKE = ["help", "provide", "create", "generate", "write", "share", "answer", "continue", "do this", "engage"]
_SORRY = ["sorry, but ", "i'm sorry, but ", "i'm sorry, ", "i am sorry, but ", "i apologize, but ", "unfortunately, "]
REFUSALS = [
    *(f"i {cannot} {help_}".replace("i '", "i'") for cannot in _CANNOT for help_ in _HELP),
    *(f"{sorry}i {cannot} {do}".replace("i '", "i'")
      for sorry in _SORRY for cannot in _CANNOT for do in (*_HELP, *_MAKE)),
    *(f"{sorry}as an ai{what}"
      for sorry in ("", *_SORRY) for what in (" language model", " model", " assistant,", ", i")),
    "as a language model", "as a large language model", "i must decline", "i have to decline",
]  # fmt: skip
"""How an answer begins that declines to be one, normalised."""

OPENING = 400
"""Characters of an answer that are looked at."""

LOOP_WORDS = 16
"""Longest n-gram that is looked for."""
LOOP_TIMES = 6
"""It stands at least so often in a row ..."""
LOOP_SHARE = 0.5
"""... is that share of the words ..."""
LOOP_LEAST = 16
"""... and so many of them: `no no no` is an answer."""
LOOP_OF_LETTERS = 40
LOOP_LETTERS = re.compile(rf"([^\W\d_]{{1,8}}?)\1{{{LOOP_OF_LETTERS - 1},}}")
"""Letters in the same sense, in a word that does not end; a long number is one, and a row of dashes is a table's."""

QUOTED = 40
"""Characters of a text in what is said of it."""

PII = {
    "mail": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}\b"),
    "phone": re.compile(
        r"(?<![\w.+-])(?:\+\d{1,3}[ ./-]?(?:\(\d{1,5}\)|\d{1,5})(?:[ ./-]?\d{2,5}){2,5}"  # +49 (30) 1234-567
        r"|\(\d{2,5}\)[ ./-]?\d{3,5}(?:[ ./-]?\d{2,5}){1,3}"  # (555) 123-4567
        r"|\d{3}[-. ]\d{3}[-. ]\d{4}|(?<!\d )0\d{2,4}[ /-]\d{3,5}(?:[ -]?\d{2,4}){1,3})(?![\w-]|\.\d)"
    ),
    "key": re.compile(
        r"(?<![A-Za-z0-9])(?:sk-(?:[A-Za-z]{2,8}-)?[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
        r"|github_pat_\w{30,}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}"
        r"|glpat-[A-Za-z0-9_-]{20,}|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})"
        r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
    ),
}
"""What personal data and secrets look like: name -> pattern."""


def refusal(text: str, phrases: Iterable[str]) -> str | None:
    """The phrase that it begins with."""
    begin = opening(text)
    known = (*filter(None, phrases), *REFUSALS)
    return next(filter(begin.startswith, known)) if begin.startswith(known) else None


def opening(text: str) -> str:
    """What a phrase is compared with."""
    return normalised(text[:OPENING].replace("\u2019", "'"))


def loop(text: str) -> str | None:
    """The n-gram that it repeats again and again, as far as it may be quoted."""
    endless = any(len(word) >= LOOP_OF_LETTERS for word in text.split())
    if endless and (letters := LOOP_LETTERS.search(text)) and len(letters[0]) >= LOOP_SHARE * len(text):
        return f"{letters[1]!r} {len(letters[0]) // len(letters[1])} times"
    found = [word for word in words(text) if word not in string.punctuation]
    if len(found) < LOOP_LEAST or max(Counter(pairwise(found)).values()) < LOOP_TIMES - 1:
        return None
    number = dict[str, int]()
    ids = np.array([number.setdefault(word, len(number)) for word in found])
    for size in range(1, min(LOOP_WORDS, len(ids) // LOOP_TIMES) + 1):
        start, run = _longest_run(ids[size:] == ids[:-size])
        covered = run + size
        if covered >= max(LOOP_TIMES * size, LOOP_LEAST, LOOP_SHARE * len(ids)):
            return f"{quoted(found[start : start + size], text)} {covered // size} times"
    return None


def pii(text: str) -> str | None:
    """What kinds there are, never the thing itself."""
    return ", ".join(name for name, pattern in PII.items() if pattern.search(text)) or None


def quoted(gram: Sequence[str], text: str) -> str:
    """The first words of an n-gram of a text; how many they are, where personal data or a secret is in the text."""
    return f"{len(gram)} words" if pii(text) else repr(" ".join(gram)[:QUOTED])


def _longest_run(same: np.ndarray) -> tuple[int, int]:
    """Where the longest row of trues starts, and how long it is."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], same.astype(np.int8), [0]))))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest] - starts[longest])
