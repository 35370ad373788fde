"""Seconds of each phase of a step.

This module does not time kernels. A phase ends when the host continues; the phases of a step are separated by host
objects anyway. Invariant: every second belongs to at most one phase, the innermost one, so the phases never add up to
more than the step.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

NOTHING_S = 1e-3
"""A phase that took less time had nothing to do in this run."""


class StepClock:
    """Phases since the last `take`. Whatever follows a step's line, such as its checkpoint, belongs to the next
    line."""

    def __init__(self) -> None:
        self._begun = self._charged = time.monotonic()
        self._phases: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`, without the time of the phases inside it."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase that did something and of the whole `step`, then start again from zero."""
        self._charge()
        done = {name: seconds for name, seconds in self._phases.items() if seconds >= NOTHING_S}
        seconds = {**done, "step": self._charged - self._begun}
        self._phases, self._begun = {}, self._charged
        return seconds

    def _charge(self) -> None:
        """Add the time since the last call to the innermost open phase."""
        now = time.monotonic()
        if self._open:
            self._phases[self._open[-1]] = self._phases.get(self._open[-1], 0.0) + now - self._charged
        self._charged = now
