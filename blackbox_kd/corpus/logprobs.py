"""Token logprobs -> flat lists of numbers, by the batch: they are nearly all of what a corpus holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa

from blackbox_kd.types import Completion, Scores, TokenLogprob, TopLogprob

SENTINEL_LOGPROB = -9999.0
"""OpenAI's stand-in for `not among the likeliest`; stored as NULL."""
DECIMALS = 3
"""Nats are rounded to 1e-3: DuckDB packs such floats into half the space, and no endpoint repeats itself so closely."""


class Vocabs:
    """Vocabularies by model, remembered from one batch to the next: reading one takes longer than ingesting."""

    def __init__(self) -> None:
        self._known: dict[str, Vocab] = {}

    def of(self, con: duckdb.DuckDBPyConnection, model: str) -> Vocab:
        """As the corpus has it now: another process, or another thread, may have added tokens."""
        stored = con.execute("SELECT count(*) FROM vocab WHERE model = ?", [model]).fetchall()[0][0]
        if model not in self._known or len(self._known[model]) != stored:
            self._known[model] = Vocab(con, model)
        return self._known[model]

    def forget(self) -> None:
        """Read them anew: a failed transaction has lost some tokens, and others may come in their number."""
        self._known.clear()


class Vocab:
    """Token ids of one model: the endpoint's own, else -1, -2, ... in order of arrival."""

    def __init__(self, con: duckdb.DuckDBPyConnection, model: str) -> None:
        known = con.execute("SELECT token_id, text, bytes FROM vocab WHERE model = ?", [model]).fetchall()
        self.model = model
        self.new: list[dict[str, Any]] = []
        self._ids = {token_id for token_id, _, _ in known}
        self._interned = {(text, raw): token_id for token_id, text, raw in known if token_id < 0}
        self._by_text: dict[bool, dict[str, int]] = {True: {}, False: {}}

    def __len__(self) -> int:
        return len(self._ids)

    def ids_of(self, tokens: Sequence[TopLogprob], text_bytes: bool) -> list[int]:
        """`text_bytes`: bytes that are left out are those of the text."""
        if tokens and tokens[0].id is not None:
            if any(t.id is not None and not _fits(t.id) for t in tokens):
                return self.ids_of([msgspec.structs.replace(t, id=None) for t in tokens], text_bytes)
            return [t.id if t.id is not None and t.id in self._ids else self._add(t, text_bytes) for t in tokens]
        ids: list[Any] = list(map(self._by_text[text_bytes].get, [t.token for t in tokens]))
        if None in ids:
            for place in [place for place, known in enumerate(ids) if known is None]:
                ids[place] = self._add(tokens[place], text_bytes)
        return ids

    def _add(self, token: TopLogprob, text_bytes: bool) -> int:
        raw = bytes(token.bytes) if token.bytes is not None else token.token.encode() if text_bytes else None
        token_id = token.id if token.id is not None and _fits(token.id) else None
        if token_id is None:
            token_id = self._interned.setdefault((token.token, raw), -len(self._interned) - 1)
            if token.bytes is None and "\ufffd" not in token.token:  # a cut token is many tokens of one text
                self._by_text[text_bytes][token.token] = token_id
        if token_id not in self._ids:
            self._ids.add(token_id)
            self.new.append({"model": self.model, "token_id": token_id, "text": token.token, "bytes": raw})
        return token_id


def _fits(token_id: int) -> bool:
    """Whether the column holds it."""
    return -(1 << 31) <= token_id < 1 << 31


MASS_DECIMALS = 6
"""Of `missing_mass`; more would be noise that does not pack."""


def table(scored: Sequence[tuple[Completion | Scores, str]], vocab: Vocab) -> pa.Table:
    """Rows of `logprobs` for completions (with the scorer of each): flat lists, T tokens and T * k alternatives."""
    sizes, widths = list[int](), list[int]()
    ids, values, top_ids = list[int](), list[float](), list[int]()
    mass, top_values, places = [np.array([])], [np.array([])], [np.array([], dtype=bool)]
    for completion, _ in scored:
        tokens: list[TokenLogprob] = completion.logprobs or []
        tops = [token.top_logprobs for token in tokens]
        shown = list(chain.from_iterable(tops))
        shown_Tk, places_Tk = _padded([top.logprob for top in shown], [len(top) for top in tops])
        ids += vocab.ids_of(tokens, completion.text_bytes)
        values += [token.logprob for token in tokens]
        top_ids += vocab.ids_of(shown, completion.text_bytes)
        top_values.append(shown_Tk.ravel())
        places.append(places_Tk.ravel())
        mass.append(_missing_mass(shown_Tk))
        sizes.append(len(tokens))
        widths.append(shown_Tk.shape[1])
    given = np.concatenate(places)
    spread = np.zeros(len(given), dtype=np.int64)
    spread[given] = top_ids
    slots_of = [size * k for size, k in zip(sizes, widths, strict=True)]
    return pa.table(
        {
            "completion_id": [completion.completion_id for completion, _ in scored],
            "scorer": [by for _, by in scored],
            "token_ids": _lists(pa.array(np.array(ids, dtype=np.int64)), sizes),
            "token_logprobs": _lists(_nats(np.array(values, dtype=np.float64)), sizes),
            "top_ids": _lists(pa.array(spread, mask=~given), slots_of),
            "top_logprobs": _lists(_nats(np.concatenate(top_values)), slots_of),
            "k": widths,
            "missing_mass": _lists(pa.array(np.round(np.concatenate(mass), MASS_DECIMALS)), sizes),
        }
    )


def _padded(logprobs: list[float], widths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What T tokens show, one after the other -> (T, k) with -inf where fewer than k were shown, and where not."""
    places_Tk = np.arange(max(widths, default=0)) < np.array(widths, dtype=np.int64)[:, None]
    shown_Tk = np.full(places_Tk.shape, -np.inf)
    shown_Tk[places_Tk] = logprobs
    return shown_Tk, places_Tk


def _missing_mass(shown_TK: np.ndarray) -> np.ndarray:
    """1 - sum of p over what is shown, before rounding."""
    shown = np.exp(np.where(shown_TK <= SENTINEL_LOGPROB, -np.inf, shown_TK))
    missing: np.ndarray = np.clip(1.0 - shown.sum(1), 0.0, None)
    return missing


def _nats(values: np.ndarray) -> pa.Array:
    hidden = values <= SENTINEL_LOGPROB
    return pa.array(np.round(np.where(hidden, 0.0, values), DECIMALS).astype(np.float32), mask=hidden)


def _lists(flat: pa.Array, sizes: list[int]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)), flat)
