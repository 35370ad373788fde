"""A request to stop, which code that takes long looks for between two pieces of work.

Not for who asks (signals: `train.launch`, `train.__main__` and `cli`) and not for what is saved (`train.trainer`).
Invariants: nothing is raised by a signal itself, so no work is torn in the middle: who can stop calls `check`; where
several ranks work together, a rank that raises is inside `mcore.collective.raise_on_all_ranks`, so that all of them do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tropd_mcore.errors import StopRequested

_asked: str | None = None
_waiting = 0
_held = 0


def request(reason: str) -> None:
    """Ask this process to stop; `reason` is for the message, for example `SIGTERM`. The first reason stays."""
    global _asked
    _asked = _asked or reason


def requested() -> str | None:
    """Return why this process shall stop; None where it shall go on."""
    return _asked


def check() -> None:
    """Raise StopRequested where this process shall stop and nobody has held that back."""
    if _asked is not None and not _held:
        raise StopRequested(_asked)


def forget() -> None:
    """Withdraw the request, for a process that goes on after it."""
    global _asked
    _asked = None


@contextmanager
def safe_points() -> Iterator[None]:
    """Mark a block that looks for requests itself and has something to save; outside, a stop may come at once."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


def waits() -> bool:
    """Return whether a request waits for the next `check`, because there is something to save."""
    return _waiting > 0


@contextmanager
def held() -> Iterator[None]:
    """Hold requests back in a block that is finished whatever comes, such as writing a checkpoint."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
