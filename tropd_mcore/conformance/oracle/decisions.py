"""The comparisons that an objective decides by, and how close they were.

A loss in float32 may decide differently where two numbers are closer than its rounding. The cases are made so that none
are; that is checked rather than assumed.
"""

from __future__ import annotations


class Decisions:
    """Compares, and remembers the closest comparison and how often each came out true."""

    def __init__(self) -> None:
        self.margin = float("inf")
        """Least |a - b| of all comparisons, relative to their scales"""
        self.taken: dict[str, list[int]] = {}
        """name -> [times false, times true]"""

    def above(self, name: str, left: float, right: float, *, scale: float = 1.0) -> bool:
        """Return left > right. `scale` is the size of the numbers that these were made from."""
        self.margin = min(self.margin, abs(left - right) / scale)
        answer = left > right
        self.taken.setdefault(name, [0, 0])[answer] += 1
        return answer
