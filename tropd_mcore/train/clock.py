"""Seconds of each phase of a step.

Not for kernels: a phase ends when the host goes on, and the phases of a step are separated by host objects anyway.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """Phases of one step; `seconds` has their times and `step`, the time since the clock was made."""

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
        return {**self._phases, "step": time.monotonic() - self._start}
