"""Stop requests: long-running code checks for one between two pieces of work.

This module does not receive signals (see `train.launch`, `train.__main__` and `cli`) and does not save anything (see
`train.trainer`). Invariants: a signal itself raises nothing, so no work is interrupted in the middle. Code that can
stop calls `check`. If several ranks work together, `check` is called inside `mcore.collective.raise_on_all_ranks`, so
that all of them raise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tropd_mcore.errors import StopRequested

_asked: str | None = None
_waiting = 0
_held = 0


def request(reason: str) -> None:
    """Ask this process to stop. `reason` is for the message, for example `SIGTERM`; the first one is kept."""
    global _asked
    _asked = _asked or reason


def requested() -> str | None:
    """Return why this process should stop; None if it should continue."""
    return _asked


def check() -> None:
    """Raise StopRequested if a stop was requested and is not held back (`held`)."""
    if _asked is not None and not _held:
        raise StopRequested(_asked)


def forget() -> None:
    """Withdraw the request, for a process that continues after it."""
    global _asked
    _asked = None


@contextmanager
def safe_points() -> Iterator[None]:
    """Mark a block that checks for requests itself and has something to save. Outside, a stop may come at any time."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


def waits() -> bool:
    """Return whether a request has to wait for the next `check`, because there is something to save."""
    return _waiting > 0


@contextmanager
def held() -> Iterator[None]:
    """Hold requests back in a block that must finish, such as writing a checkpoint."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
