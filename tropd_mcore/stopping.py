"""A request to stop, which code that takes long looks for between two pieces of work.

Not for who asks (signals: `train.launch` and `cli`) and not for what is saved (`train.trainer`). Invariant: nothing is
raised by a signal itself, so no work is torn in the middle: who can stop calls `check`.
"""

from tropd_mcore.errors import StopRequested

_asked: str | None = None


def request(reason: str) -> None:
    """Ask this process to stop; `reason` is for the message, for example `SIGTERM`. The first reason stays."""
    global _asked
    _asked = _asked or reason


def requested() -> str | None:
    """Return why this process shall stop; None where it shall go on."""
    return _asked


def check() -> None:
    """Raise StopRequested where this process shall stop."""
    if _asked is not None:
        raise StopRequested(_asked)


def forget() -> None:
    """Withdraw the request, for a process that goes on after it."""
    global _asked
    _asked = None
