"""A log line every half minute while something long runs, so that a silent job is a hung job.

Not for progress in percent. Invariant: the thread ends with the block, whatever the block does.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_S = 30.0
"""Longest silence."""


@contextmanager
def heartbeat(log: logging.Logger, what: str, *, every_s: float = EVERY_S) -> Iterator[None]:
    """Log "`what`: <n> s so far" every `every_s` seconds until the block ends."""
    over = threading.Event()
    begun = time.monotonic()

    def beat() -> None:
        while not over.wait(every_s):
            log.info("%s: %.0f s so far", what, time.monotonic() - begun)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
