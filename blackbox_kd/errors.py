"""Everything that can go wrong, as one tree.

    BlackboxKDError                 shown as one line, without a traceback (`--debug` shows it)
    ├── ConfigError                 2   a key, a flag, a file or a name is wrong
    ├── CorpusError                 2   the corpus file cannot be opened, read or written
    │   └── CorpusBusy              2   another program holds it open
    ├── ModelError                  2   a student model cannot be loaded or does not fit
    ├── AlignmentError              2   rows, tokens or scores that must match up do not
    ├── TrainingError               2   an update that would be a no-op or has diverged
    ├── GateFailed              5   the result is not what it looks like: a judge that is gamed
    ├── BudgetExhausted             4   the next call could pass the cap; the same command with a higher one goes on
    └── TeacherError                3   the endpoint failed
        ├── TeacherRefused          3   for good: key, quota, permission
        ├── TeacherUnreachable      3   nobody answers at this address
        ├── RequestRejected         3   400, 404, 422: this request will never succeed (a dead letter)
        ├── RateLimited             3   429: wait at the shared gate
        └── TransientError          3   408, 409, 5xx, broken connection or body: ask again

The number is the exit code. Every message says what was wrong, the value seen and what to do.
A bad row is data (`dead_letters`), not an exception that leaves the engine.
"""

from __future__ import annotations

from collections.abc import Mapping


class BlackboxKDError(Exception):
    """The root; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(BlackboxKDError, ValueError):
    """A key, a flag, a file or a name that the user gave is wrong."""


class CorpusError(BlackboxKDError):
    """The corpus file cannot be opened, read or written."""


class CorpusBusy(CorpusError):
    """Another program holds the corpus file open."""


class ModelError(BlackboxKDError):
    """A student model cannot be loaded, or lacks what the stage needs."""


class AlignmentError(BlackboxKDError):
    """Rows, tokens or scores that must match up do not."""


class TrainingError(BlackboxKDError):
    """An update that would change nothing, or whose loss is not a number."""


class BudgetExhausted(BlackboxKDError):
    """The next call could pass the cap; what was received is kept."""

    exit_code = 4


class GateFailed(BlackboxKDError):
    """The run did what it was told, and its result must not be used."""

    exit_code = 5


class TeacherError(BlackboxKDError):
    """The endpoint failed; `status` is the HTTP status, None where there was no answer."""

    exit_code = 3

    def __init__(self, message: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.server_request_id: str | None = None
        """What the provider's support asks for."""
        self.detail = ""
        """More of a reply that cannot be read."""
        self.headers: Mapping[str, str] = {}
        """Of the reply, in lower case: some say how much is left."""


class TeacherRefused(TeacherError):
    """Refused for good: a wrong key, no permission, no quota left."""


class TeacherUnreachable(TeacherError):
    """Nobody answers at this address."""


class RequestRejected(TeacherError):
    """This one request will never succeed; it becomes a row of `dead_letters`."""


class RateLimited(TeacherError):
    """429: everyone waits `retry_after_s` at the shared gate."""


class TransientError(TeacherError):
    """Worth asking again: 408, 409, 5xx, a broken connection, a body that is cut short or has the wrong shape."""
