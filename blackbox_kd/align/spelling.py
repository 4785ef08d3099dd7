"""What tokens spell, in bytes: the common ground of two tokenizers. Pure.

Endpoints show a token in many ways: with its bytes, as plain text, with the vocabulary's own marks for a space
("Ġthe", "▁the"), with its bytes written out ("\\xe2\\x80", "<0xE2>"), or, where it cuts a character, as U+FFFD
(and then even the "bytes" of some servers are only those of U+FFFD).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

from blackbox_kd.errors import AlignmentError
from blackbox_kd.types import TeacherTokens, VocabToken

REPLACED = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")
_ESCAPED = re.compile(r"bytes:|(?:\\x[89a-fA-F][0-9a-fA-F])+$")


def byte_alphabet() -> dict[str, int]:
    """Printable character -> byte, as byte-level BPE writes bytes (Radford et al. 2019, GPT-2's encoder)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def from_alphabet(piece: str) -> bytes:
    """A piece of a byte-level BPE vocabulary; what is not in its alphabet stands for itself."""
    if all(char in _ALPHABET for char in piece):
        return bytes(_ALPHABET[char] for char in piece)
    return piece.encode()


def from_metaspace(piece: str) -> bytes:
    """A piece of a SentencePiece vocabulary: `▁` is a space, `<0xE2>` a byte."""
    if found := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("▁", " ").encode()


def spell(vocab: Mapping[int, VocabToken]) -> dict[int, bytes | None]:
    """Token id -> the bytes that it spells; None where a cut character hides them."""
    shown = [token.text for token in vocab.values() if _only_text(token)]
    read = _reader(shown)
    return {token_id: read(t.text) if _only_text(t) else t.bytes for token_id, t in vocab.items()}


def _only_text(token: VocabToken) -> bool:
    return token.bytes is None or token.bytes == token.text.encode()


def _reader(shown: Sequence[str]) -> Callable[[str], bytes | None]:
    """How these texts are to be read: marks are believed where they are more frequent than spaces."""
    spaces, byte_level, metaspace = (sum(text.startswith(mark) for text in shown) for mark in " Ġ▁")
    if byte_level > spaces:
        return from_alphabet
    if metaspace > spaces:
        return from_metaspace
    return _plain


def _plain(text: str) -> bytes | None:
    if REPLACED in text:
        return None
    if _BYTE_TOKEN.fullmatch(text):
        return from_metaspace(text)
    if _ESCAPED.match(text):
        return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), text.removeprefix("bytes:").encode())
    return text.encode()


def learn_end_ids(vocab: Mapping[int, VocabToken], stopped: Iterable[tuple[str, TeacherTokens]]) -> frozenset[int]:
    """The tokens that end an answer: last of a completion that stopped by itself, and not part of its text.

    Args:
        vocab: the scorer's tokens.
        stopped: (text, tokens) of completions whose `finish_reason` is "stop".
    """
    spelled = spell(vocab)
    last, inside = set[int](), set[int]()
    for text, tokens in stopped:
        ids = tokens.token_ids.tolist()
        inside.update(ids[:-1])
        if ids and _beyond(spelled.get(ids[-1]), text):
            last.add(ids[-1])
    return frozenset(last - inside)


def _beyond(spelled: bytes | None, text: str) -> bool:
    """Whether the last token is none of the text. Whitespace may have been stripped, a cut character says nothing."""
    if spelled is None or (spelled and not spelled.strip()):
        return False
    return not spelled or not text.encode().rstrip().endswith(spelled.strip())


def starts(raw: bytes, spelled: Sequence[bytes | None], texts: Sequence[str]) -> np.ndarray:
    """(T,) byte of `raw` at which each token starts; below 0 in whitespace that was stripped from `raw`.

    Tokens with `None` have an unknown length: where the first of a run starts is known, the others get the same number.

    Args:
        raw: the text, stripped or not.
        spelled: bytes of each token, None where they are not known.
        texts: how the tokens are shown; read only where `spelled` is None.

    Raises:
        AlignmentError: the tokens spell something else.
    """
    if None in spelled:
        return _resynchronised(raw, spelled, texts)
    known: list[bytes] = spelled  # type: ignore[assignment]
    whole = b"".join(known)
    lead = whole.find(raw)
    if lead < 0 or not (_blank(whole[:lead]) and _blank(whole[lead + len(raw) :])):
        raise mismatch("the teacher's tokens", whole, raw)
    ends = np.cumsum([len(piece) for piece in known], dtype=np.int64)
    return np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(known)] - lead


def mismatch(whose: str, spelled: bytes, raw: bytes) -> AlignmentError:
    """Where two spellings part."""
    at = next((i for i, (a, b) in enumerate(zip(spelled, raw, strict=False)) if a != b), min(len(spelled), len(raw)))
    near = slice(max(at - 10, 0), at + 20)
    return AlignmentError(f"{whose} spell {spelled[near]!r} where the text has {raw[near]!r} (byte {at})")


def _blank(raw: bytes) -> bool:
    return not raw.decode("utf-8", "replace").strip()


def _resynchronised(raw: bytes, spelled: Sequence[bytes | None], texts: Sequence[str]) -> np.ndarray:
    """Each run of known tokens is looked for behind the shortest text that the unknown ones before it can spell."""
    found = np.zeros(len(spelled), np.int64)
    runs = [(is_known, list(run)) for is_known, run in groupby(range(len(spelled)), lambda t: spelled[t] is not None)]
    place, shortest = 0, 0
    for number, (is_known, run) in enumerate(runs):
        if not is_known:
            found[run] = place
            shortest = sum(len(texts[t].strip().replace(REPLACED, "?").encode()) for t in run)
            continue
        pieces = [spelled[t] or b"" for t in run]
        known = b"".join(pieces)
        if number == 0:
            at = 0 if raw.startswith(known) else len(known.lstrip()) - len(known)
        elif number == len(runs) - 1:  # whitespace at the end may have been stripped
            at = len(raw) - len(known if raw.endswith(known) else known.rstrip())
        else:
            at = raw.find(known, place + shortest)
        expected = known[-at:] if at < 0 else known
        if at < place + shortest - (number == 0) * len(known) or not _agree(raw, max(at, 0), expected):
            raise mismatch("the teacher's tokens", known, raw[max(place, 0) :])
        found[run] = at + np.cumsum([0, *map(len, pieces[:-1])])
        place, shortest = at + len(known), 0
    return found


def _agree(raw: bytes, at: int, known: bytes) -> bool:
    """Whether `known` stands there, up to stripped whitespace behind the text."""
    there = raw[at : at + len(known)]
    return there == known or (at + len(there) == len(raw) and there == known.rstrip())
