"""Signs of life of everything that takes long: what runs, how far it is, how long it takes.

Not for the metrics of a step (`monitor`). Invariants: nothing that runs inside `progress` is silent for longer than
30 s; the reporting thread ends with the block, whatever the block does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EVERY_S = 30.0
"""Longest silence."""


@dataclass
class Progress:
    """How far one piece of work is. `total` is None where nobody knows."""

    what: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    note: str = ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Say that `count` more units are done; `note` is shown beside them."""
        global _ticks
        self.done += count
        self.note = self.note if note is None else note
        _ticks += 1


_stack: list[Progress] = []
_ticks = 0


def activity() -> str:
    """Return what this process is at, for messages about it; empty where nothing long runs."""
    return _stack[-1].what if _stack else ""


def ticks() -> int:
    """Return a number that grows whenever this process gets on with anything."""
    return _ticks


@contextmanager
def progress(
    log: logging.Logger, what: str, *, total: int | None = None, unit: str = "", every_s: float = EVERY_S
) -> Iterator[Progress]:
    """Report `what` every `every_s` seconds until the block ends; the block says how far it is by `advance`."""
    global _ticks
    state = Progress(what, total, unit)
    over = threading.Event()
    begun = time.monotonic()

    def beat() -> None:
        while not over.wait(every_s):
            log.info("%s: %.0f s so far", what, time.monotonic() - begun)

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    _stack.append(state)
    _ticks += 1
    thread.start()
    try:
        yield state
    finally:
        over.set()
        thread.join()
        _stack.remove(state)
        _ticks += 1
