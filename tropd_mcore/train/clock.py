"""Seconds of each phase of a step.

Not for kernels: a phase ends when the host goes on, and the phases of a step are separated by host objects anyway.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

NOTHING_S = 1e-3
"""A phase that took less had nothing to do in this run."""


class StepClock:
    """Phases of one step; `seconds` has the times of those that did something, and `step`, since the clock was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - start

    @property
    def seconds(self) -> dict[str, float]:
        done = {name: seconds for name, seconds in self._phases.items() if seconds >= NOTHING_S}
        return {**done, "step": time.monotonic() - self._start}
