"""Who asks what just now: two runs on one corpus do not pay for the same question.

A claim is a locked byte of an empty file beside the corpus, file and offset made of the request_key; the kernel lets
go of it when its process dies. Such locks belong to the process, and closing any descriptor of a file drops them all:
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

FILES = 16
"""One for each last digit of a key: the kernel goes through all locks of a file to set one (of 2,000: 14 us)."""


class _Held:
    """What this process holds of a corpus, whichever call of the engine asks it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.users = folder, 0
        self.keys: set[str] = set()
        """request_keys."""
        try:
            folder.mkdir(exist_ok=True)
            self._fds = [os.open(folder / f"{i:x}", os.O_RDWR | os.O_CREAT, 0o666) for i in range(FILES)]
        except OSError as error:
            raise CorpusError(f"cannot make {folder}: {error.strerror}") from error

    def lock(self, key: str) -> bool:
        """Whether nobody else had it."""
        if key in self.keys:  # by another call in this process, for which the kernel would let us in
            return False
        try:
            self._set(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise CorpusError(f"cannot lock a file in {self.folder}: {error.strerror}") from error
        self.keys.add(key)
        return True

    def free(self, keys: Collection[str]) -> None:
        for key in keys:
            self._set(key, fcntl.LOCK_UN)
        self.keys.difference_update(keys)

    def _set(self, key: str, operation: int) -> None:
        """By 66 bits of the hash: where two questions share them, one waits for the other."""
        fcntl.lockf(self._fds[int(key[-1], 16)], operation, 1, int(key.replace("-", "")[:16], 16) >> 2)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


class Claims:
    """The questions of one call of the engine, while the block lasts."""

    def __init__(self, corpus: Path, asking: set[str]) -> None:
        """`asking`: request_keys to be asked and in flight; claiming adds to it, the caller removes what is through."""
        corpus = corpus.resolve()
        self._folder, self._asking = corpus.with_name(corpus.name + ".claims"), asking
        self.mine: set[str] = set()
        """request_keys."""
        self._ended = False

    def __enter__(self) -> Claims:
        with _guard:
            self._held = _held.get(self._folder) or _Held(self._folder)
            _held[self._folder] = self._held
            self._held.users += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with _guard:
            self._ended = True
            self._free(self.mine)
            self._held.users -= 1
            if not self._held.users:
                _held.pop(self._folder).close()

    def take(self, keys: Collection[str]) -> set[str]:
        """Claim those that nobody else asks, and return them.

        Raises:
            CorpusError: this file system has no locks.
        """
        with _guard:
            taken = {key for key in keys if not self._ended and self._held.lock(key)}  # a thread may be late
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
        self._held.free(keys)
        self.mine = self.mine - keys
