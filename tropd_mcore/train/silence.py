"""Measures how long something else has shown no change, in time during which the measuring process itself ran."""

from __future__ import annotations


class Silence:
    """How long a value of another process has not changed, in seconds."""

    def __init__(self) -> None:
        self.value: object = None
        self.still_s = 0.0
        self.changes = 0
        """Number of times that another value was seen; the first value counts."""

    def look(self, value: object, seconds: float) -> float:
        """Record `value` after `seconds`; returns for how long it has been the same."""
        if value == self.value:
            self.still_s += seconds
        else:
            self.value, self.still_s, self.changes = value, 0.0, self.changes + 1
        return self.still_s
