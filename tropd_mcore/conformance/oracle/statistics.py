"""How a token's loss finds other tokens: of its sample, of its prompt's samples, of the whole batch.

The families compute the statistics themselves (`<kind>_statistic`). Only tokens that the student sampled take part,
with their numbers from before the update.
"""

from __future__ import annotations

import math

from tropd_mcore.conformance.batch import CaseBatch


def standard_score(value: float, population: list[float]) -> float:
    """(value - mean) / standard deviation of the population."""
    mean = sum(population) / len(population)
    return (value - mean) / math.sqrt(sum((other - mean) ** 2 for other in population) / len(population))


def log_ratio(batch: CaseBatch, row: int) -> float:
    """log q - log p before the update."""
    return float(batch.tokens.teacher_logp_T[row] - batch.tokens.old_logp_T[row])


def sampled_rows(batch: CaseBatch) -> list[int]:
    """The rows that the student sampled."""
    return [row for row, on in enumerate(batch.tokens.student_mask_T.tolist()) if on]


def same_sample(batch: CaseBatch, row: int, other: int) -> bool:
    """Whether two rows are of one sample."""
    return int(batch.tokens.sample_T[row]) == int(batch.tokens.sample_T[other])


def same_prompt(batch: CaseBatch, row: int, other: int) -> bool:
    """Whether two rows are of samples of one prompt."""
    group_S, sample_T = batch.group_S, batch.tokens.sample_T
    return int(group_S[sample_T[row]]) == int(group_S[sample_T[other]])


def zeros(batch: CaseBatch) -> list[float]:
    """0 for every row."""
    return [0.0] * len(batch.tokens.target_ids_T)
