"""Student tokens by their distance to the teacher: how many are in each bin, and how much of the loss's force.

This module does not measure the distance or the force of a token (`library.loss`, `kernel.force`). Invariants: bins do
not overlap, and each share is of the tokens that have a value. Without a teacher's top-k there is no distance, and
every share is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tropd_mcore.monitor.record import StepRecord


@dataclass(frozen=True)
class Bin:
    """The distances in [low, high); the last bin also has 1."""

    low: float
    high: float

    @property
    def name(self) -> str:
        """The bounds in percent, as metrics write them."""
        return f"{100 * self.low:.0f}_{100 * self.high:.0f}"

    @property
    def words(self) -> str:
        """The bounds, for a description."""
        if self.low == 0.0:
            return f"below {self.high:g}"
        return f"of {self.low:g} and more" if self.high == 1.0 else f"from {self.low:g} to {self.high:g}"

    def share_of_tokens(self, record: StepRecord) -> float:
        """The share of the student tokens that are in this bin."""
        student = record.student
        distance = student["tv"]
        return student.mean(np.where(np.isnan(distance), np.nan, self._holds(distance)))

    def share_of_force(self, record: StepRecord) -> float:
        """The share of the sum of forces that the tokens of this bin have; NaN if no token has a force."""
        student = record.student
        distance, force = student["tv"], np.where(np.isnan(student["tv"]), np.nan, student["force"])
        total = np.nansum(force)
        return float(np.nansum(force[self._holds(distance)]) / total) if total > 0 else math.nan

    def _holds(self, distance: np.ndarray) -> np.ndarray:
        return (distance >= self.low) & ((distance < self.high) | (self.high == 1.0))


EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
BINS = tuple(Bin(low, high) for low, high in pairwise(EDGES))
