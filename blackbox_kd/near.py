"""Which texts are nearly the same: the Jaccard index of their word pairs, its candidates by MinHash. Pure.

Broder, "On the resemblance and containment of documents" (1997); the hashing and its tables are datasketch's.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blackbox_kd.types import Prompt

if TYPE_CHECKING:
    from datasketch import MinHash

PERMUTATIONS = 128
"""Of a MinHash."""
MISSED = 1e-4
"""The largest probability that a pair just at the threshold is not found."""
MOST_CANDIDATES = 100
"""Looked at for one text, the earliest: thousands of texts that share a long part would else be compared one by one."""
COMMON = 0.5, 3
"""What stands in more than this share of the texts, and in more than so many, is their template."""
FREQUENT = 0.1, 10
"""So may be what stands in more than these (GPT-3 ignored what more than 10 documents held, 2005.14165, appendix C)."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts without blanks between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese): each character is a word."""
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|\S")
_FULL_STOP = " .?!\u2026\u3002\uff1f\uff01"


def said(prompt: Prompt) -> str:
    """All messages of it, whoever's, as one text."""
    return "\n".join(message["content"] for message in prompt.messages)


def normalised(text: str) -> str:
    """Without what nobody means: case, blanks, the forms of one character (NFKC), and the mark that ends a sentence."""
    return " ".join(_folded(text).split()).rstrip(_FULL_STOP)


def words(text: str) -> list[str]:
    """Its words, and each other sign by itself: `2+2` and `2*2` are not the same."""
    return _WORD.findall(_folded(text))


def _folded(text: str) -> str:
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def shingles(text: str) -> set[int]:
    """Hashes of its word pairs; of a lone word, its own."""
    found = words(text)
    pairs = map(" ".join, pairwise(found)) if len(found) > 1 else found
    return {zlib.crc32(pair.encode()) for pair in pairs}


def jaccard(one: Collection[int], other: Collection[int]) -> float:
    """`|A and B| / |A or B|`; 1 for two empty ones."""
    mine, theirs = set(one), set(other)
    return len(mine & theirs) / len(mine | theirs) if mine or theirs else 1.0


class Templates(NamedTuple):
    """Parts (shingles, n-grams) that many texts share."""

    common: set[Any]
    """They tell none of the texts from another."""
    frequent: set[Any]
    """These, and those of a tenth: one of several templates, or what a few texts say in nearly the same words."""


def templates(texts: Sequence[Iterable[Any]], collections: Sequence[str]) -> Templates:
    """Of texts by their parts; `collections` names the one of each, for a template is that of a collection."""
    count, found = defaultdict[str, Counter[Any]](Counter), Templates(set(), set())
    for collection, parts in zip(collections, texts, strict=True):
        count[collection].update(set(parts))
    sizes = Counter(collections)
    for collection, parts in count.items():
        common, frequent = (max(share * sizes[collection], least) for share, least in (COMMON, FREQUENT))
        found.common.update(part for part, texts_with in parts.items() if texts_with > common)
        found.frequent.update(part for part, texts_with in parts.items() if texts_with > min(common, frequent))
    return found


def may_have_twins(texts: Sequence[np.ndarray], threshold: float) -> list[bool]:
    """For each text, by its unique shingles: whether enough of them stand in another one for a Jaccard at `threshold`.

    Spares nearly every text its MinHash (0.1 ms): a twin holds that share of its shingles, so they are seen twice.
    """
    sizes = np.array([len(text) for text in texts])
    if not sizes.sum():
        return [False] * len(texts)
    _, place, count = np.unique(np.concatenate(texts), return_inverse=True, return_counts=True)
    shared = np.cumsum(np.append(0, count[place] > 1))
    ends = np.cumsum(sizes)
    enough = (sizes > 0) & (shared[ends] - shared[ends - sizes] >= threshold * sizes)
    return [bool(each) for each in enough]


class NearIndex:
    """Finds, among the texts that were added, those whose Jaccard index with another is at least `threshold`."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # with scipy, which takes half a second

        rows = next((r for r in range(16, 1, -1) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSED), 1)
        self._threshold, self._texts = threshold, dict[int, frozenset[int]]()
        self._empty = MinHash(PERMUTATIONS, hashfunc=int)
        self._tables = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))

    def add(self, key: int, text: Collection[int]) -> None:
        """One more, by its shingles; a text without any is near to nothing."""
        if text:
            self._texts[key] = frozenset(text)
            self._tables.insert(key, self._minhash(text))

    def near(self, text: Collection[int]) -> Iterator[tuple[int, float]]:
        """(key, true Jaccard index) of those that are near, in the order of their keys."""
        candidates = self._tables.query(self._minhash(text)) if text else []
        for key in sorted(candidates)[:MOST_CANDIDATES]:
            if (found := jaccard(text, self._texts[key])) >= self._threshold:
                yield key, found

    def _minhash(self, text: Collection[int]) -> MinHash:
        made = self._empty.copy()
        made.update_batch(map(int, text))
        return made
