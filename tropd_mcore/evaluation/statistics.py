"""Intervals for accuracies: of one model, of samples that share prompts, of the difference between two models, and of a
mean over a few runs.

All are 95 % intervals, with the normal quantile 1.96, or Student's where a few runs are averaged. They are not meant
for training metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantile of Student's t by degrees of freedom; beyond the table, that of the normal distribution."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the score interval of a proportion. Source: Wilson 1927."""
    assert 0 <= correct <= total and total > 0
    share = correct / total
    centre = share + Z95**2 / (2 * total)
    spread = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    scale = 1 + Z95**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def clustered_interval(means: Sequence[float]) -> tuple[float, float]:
    """Return the normal interval of the mean of per-prompt accuracies. Samples of one prompt are not independent."""
    count = len(means)
    assert count > 0
    mean = sum(means) / count
    variance = sum((value - mean) ** 2 for value in means) / max(count - 1, 1)
    spread = Z95 * math.sqrt(variance / count)
    return max(0.0, mean - spread), min(1.0, mean + spread)


def pass_at(k: int, correct: Sequence[int], samples: int) -> float:
    """Return the mean probability that one of `k` answers, drawn from the `samples` of a prompt, is right.

    `correct` has the number of right answers per prompt. Equal to 1 - C(n - c, k) / C(n, k), which is unbiased. Source:
    Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    assert 1 <= k <= samples and len(correct) > 0
    missed = [math.comb(samples - right, k) / math.comb(samples, k) for right in correct]
    return 1.0 - sum(missed) / len(missed)


def paired_mean_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the normal interval of mean(after) - mean(before), whose values belong to the same prompts."""
    assert len(before) == len(after) > 0, f"{len(before)} and {len(after)} prompts; expected the same"
    differences = [new - old for old, new in zip(before, after, strict=True)]
    count, mean = len(differences), sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / max(count - 1, 1)
    spread = Z95 * math.sqrt(variance / count)
    return max(-1.0, mean - spread), min(1.0, mean + spread)


def paired_difference_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Return the interval of accuracy(after) - accuracy(before) on the same prompts.

    Adjusted Wald interval for matched pairs: half an observation is added to each cell. Source: Agresti and Min 2005.
    """
    assert len(before) == len(after) > 0, f"{len(before)} and {len(after)} judgements; expected the same prompts"
    gained = sum(new and not old for old, new in zip(before, after, strict=True)) + 0.5
    lost = sum(old and not new for old, new in zip(before, after, strict=True)) + 0.5
    total = len(before) + 2
    difference = (gained - lost) / total
    spread = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    return max(-1.0, difference - spread), min(1.0, difference + spread)


def t_half_width(values: Sequence[float]) -> float:
    """Return half the width of Student's interval of the mean of independent values; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return T95.get(len(values) - 1, Z95) * stdev(values) / math.sqrt(len(values))
