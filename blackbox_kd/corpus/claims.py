"""Who asks what just now: two runs on one corpus do not pay for the same question.

A claim is a locked byte of an empty file beside the corpus, at an offset made of the request_key; the kernel lets go
of it when its process dies. Such locks belong to the process, and closing any descriptor of the file drops them all:
a process has one for all its claims on a corpus.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

from blackbox_kd.errors import CorpusError


class _File:
    """This process's descriptor of a claims file."""

    def __init__(self, path: Path) -> None:
        self.path, self.users = path, 0
        self.held: set[str] = set()
        """request_keys that somebody in this process asks."""
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CorpusError(f"cannot make {path}: {error.strerror}") from error

    def lock(self, key: str) -> bool:
        """Whether nobody else had it."""
        if key in self.held:  # by another call in this process, for which the kernel would let us in
            return False
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(key))
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise CorpusError(f"cannot lock {self.path}: {error.strerror}") from error
        self.held.add(key)
        return True

    def free(self, keys: Collection[str]) -> None:
        for key in keys:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, _offset(key))
        self.held.difference_update(keys)


_files: dict[Path, _File] = {}
_guard = threading.Lock()


class Claims:
    """The questions of one call of the engine, while the block lasts."""

    def __init__(self, corpus: Path, asking: set[str]) -> None:
        """`asking`: request_keys to be asked and in flight; claiming adds to it, the caller removes what is through."""
        corpus = corpus.resolve()
        self._path, self._asking = corpus.with_name(corpus.name + ".claims"), asking
        self.mine: set[str] = set()
        """request_keys."""
        self._ended = False

    def __enter__(self) -> Claims:
        with _guard:
            self._file = _files.get(self._path) or _File(self._path)
            _files[self._path] = self._file
            self._file.users += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with _guard:
            self._ended = True
            self._free(self.mine)
            self._file.users -= 1
            if not self._file.users:
                del _files[self._path]
                os.close(self._file.fd)

    def take(self, keys: Collection[str]) -> set[str]:
        """Claim those that nobody else asks, and return them.

        Raises:
            CorpusError: this file system has no locks.
        """
        with _guard:
            taken = {key for key in keys if not self._ended and self._file.lock(key)}  # a thread may be late
            self._asking |= taken
            self.mine |= taken
        return taken

    def free(self, keys: Collection[str]) -> None:
        """Let go of what needs not be asked."""
        with _guard:
            self._asking.difference_update(keys)
            self._free(self.mine.intersection(keys))

    def free_settled(self, unstored: Callable[[], set[str]]) -> None:
        """Let go of what is neither asked nor `unstored`: answered but not yet in DuckDB."""
        with _guard:  # an answer is unstored before it ceases to be asked, hence this order
            asked_no_more = self.mine - self._asking
            self._free(asked_no_more - unstored())

    def _free(self, keys: set[str]) -> None:
        self._file.free(keys)
        self.mine = self.mine - keys


def _offset(key: str) -> int:
    """62 bits of the hash: where two questions share them, one waits for the other."""
    return int(key.replace("-", "")[:16], 16) >> 2
