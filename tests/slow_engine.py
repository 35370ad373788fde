"""Makes the engine of a real server slow: it is suspended and resumed by its pid."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def slowed(engine: psutil.Process, *, works_s: float, rests_s: float) -> Iterator[None]:
    """Let a process work for `works_s`, then rest for `rests_s`, and so on. At the end it works again.

    A process that ends meanwhile is no error here.
    """
    over = threading.Event()

    def slow_down() -> None:
        while not over.is_set():
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.suspend()
                time.sleep(rests_s)
                engine.resume()
            time.sleep(works_s)

    thread = threading.Thread(target=slow_down, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.resume()


def engine_of(server_pid: int) -> psutil.Process:
    """Return SGLang's engine among the processes of a server."""
    children = psutil.Process(server_pid).children(recursive=True)
    return next(process for process in children if "scheduler" in process.name())
