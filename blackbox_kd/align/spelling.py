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
    lengths = np.fromiter(map(len, known), np.int64, len(known))
    return np.cumsum(lengths) - lengths - lead


def mismatch(whose: str, spelled: bytes, raw: bytes) -> AlignmentError:
    """Where two spellings part."""
    at = next((i for i, (a, b) in enumerate(zip(spelled, raw, strict=False)) if a != b), min(len(spelled), len(raw)))
    near = slice(max(at - 10, 0), at + 20)
    return AlignmentError(f"{whose} spell {spelled[near]!r} where the text has {raw[near]!r} (byte {at})")


def _blank(raw: bytes) -> bool:
    return not raw.decode("utf-8", "replace").strip()


def _resynchronised(raw: bytes, spelled: Sequence[bytes | None], texts: Sequence[str]) -> np.ndarray:
    """Each run of known tokens is looked for behind the shortest text that the unknown ones before it can spell.

    Whitespace that was stripped is put back first. Tokens that spell nothing, but for those at the end, are unknown:
    some servers show a whole character at its last token.
    """
    count = max((t + 1 for t, piece in enumerate(spelled) if piece != b""), default=0)
    runs = [(known, list(run)) for known, run in groupby(range(count), lambda t: bool(spelled[t]))]
    pieces = [b"".join(spelled[t] or b"" for t in run) for _, run in runs]
    lead = b"" if raw.startswith(pieces[0]) else pieces[0][: len(pieces[0]) - len(lstrip(pieces[0]))]
    trail = b"" if raw.endswith(pieces[-1]) else pieces[-1][len(_rstrip(pieces[-1])) :]
    whole = lead + raw + trail
    found = np.full(len(spelled), len(whole), np.int64)
    place, shortest = 0, 0
    for number, ((known, run), piece) in enumerate(zip(runs, pieces, strict=True)):
        if known:
            last = number == len(runs) - 1
            at = len(whole) - len(piece) if last else whole.find(piece, place + shortest) if number else 0
            if at < place + shortest or whole[at : at + len(piece)] != piece:
                raise mismatch("the teacher's tokens", piece, whole[place:])
            found[run] = at + np.cumsum([0, *(len(spelled[t] or b"") for t in run[:-1])])
            place, shortest = at + len(piece), 0
        else:
            found[run] = place
            shortest = sum(len(texts[t].strip().replace(REPLACED, "?").encode()) for t in run if spelled[t] is None)
    if place + shortest > len(whole):
        raise mismatch("the teacher's tokens", b"more", whole[place:])
    return found - len(lead)


def lstrip(piece: bytes) -> bytes:
    """Without the whitespace that it begins with, as `str` has it."""
    return piece.decode("utf-8", "surrogateescape").lstrip().encode("utf-8", "surrogateescape")


def _rstrip(piece: bytes) -> bytes:
    return piece.decode("utf-8", "surrogateescape").rstrip().encode("utf-8", "surrogateescape")
