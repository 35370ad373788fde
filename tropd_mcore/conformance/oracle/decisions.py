"""The comparisons on which an objective's decisions depend, and how close they were.

If two numbers are closer than the rounding of float32, a float32 loss may decide differently. The cases avoid this, and
the recorded margin lets that be checked.
"""

from __future__ import annotations


class Decisions:
    """Compares, and records the closest comparison and how often each one was true."""

    def __init__(self) -> None:
        self.margin = float("inf")
        """Least |a - b| of all comparisons, relative to their scales"""
        self.taken: dict[str, list[int]] = {}
        """name -> [times false, times true]"""

    def above(self, name: str, left: float, right: float, *, scale: float = 1.0) -> bool:
        """Return left > right. `scale` is the size of the numbers from which the two were computed."""
        self.margin = min(self.margin, abs(left - right) / scale)
        answer = left > right
        self.taken.setdefault(name, [0, 0])[answer] += 1
        return answer
