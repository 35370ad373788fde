"""Growth of a quantity per step: a slope that is robust to outliers, with its confidence range.

This module does not measure (`soak_readings` does). Invariant: only the last part of a run is used, because caches
fill at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.faults.soak_readings import PROCESS_QUANTITIES, Folder, FolderSeries, ProcessTree, Series

LEAST_READINGS = 8
"""With fewer readings in the used part there is no slope."""
MOST_READINGS = 600
"""More readings are thinned, because the number of pairs grows quadratically."""
CONFIDENCE = 1.96
"""Standard deviations of the 95 % range."""
PLOT_POINTS = 40
"""Readings of each series that the result keeps, to show its shape."""


@dataclass(frozen=True)
class Growth:
    """A quantity over the last part of a run. Slopes are per step."""

    first: float
    last: float
    largest: float
    slope: float | None
    """Median of the slopes of all pairs of readings (Theil and Sen). None for too few readings."""
    low: float | None
    high: float | None
    """95 % range of the slope, for readings whose deviations are independent of each other (Sen 1968)."""


def growth(steps: Sequence[int], values: Sequence[float], first_step: int) -> Growth:
    """The growth of `values`, without those of steps before `first_step`."""
    where = np.array(steps, dtype=np.float64)
    found = np.array(values, dtype=np.float64)
    kept = where >= first_step
    where, found = where[kept], found[kept]
    if not len(found):
        return Growth(float("nan"), float("nan"), float("nan"), None, None, None)
    slope, low, high = theil_sen(where, found) if len(found) >= LEAST_READINGS else (None, None, None)
    return Growth(float(found[0]), float(found[-1]), float(found.max()), slope, low, high)


def theil_sen(
    where: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> tuple[float | None, float | None, float | None]:
    """(median slope of all pairs, its 95 % range). Nones if all readings are of one step."""
    if len(where) > MOST_READINGS:
        chosen = np.linspace(0, len(where) - 1, MOST_READINGS).round().astype(int)
        where, values = where[chosen], values[chosen]
    left, right = np.triu_indices(len(where), k=1)
    apart = where[right] - where[left]
    used = apart > 0
    slopes = np.sort((values[right] - values[left])[used] / apart[used])
    count = len(where)
    if not len(slopes):
        return None, None, None
    spread = CONFIDENCE * np.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = int(np.clip(round((len(slopes) - spread) / 2), 0, len(slopes) - 1))
    high = int(np.clip(round((len(slopes) + spread) / 2), 0, len(slopes) - 1))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def process_rows(tree: ProcessTree, first_step: int) -> list[dict[str, Any]]:
    """One entry for each process that ran long enough for a slope."""
    rows: list[dict[str, Any]] = []
    for series in sorted(tree.series.values(), key=lambda series: series.role):
        columns = list(zip(*series.values, strict=True))
        found = {
            name: asdict(growth(series.steps, values, first_step))
            for name, values in zip(PROCESS_QUANTITIES, columns, strict=True)
        }
        if found["anonymous"]["slope"] is not None:
            rows.append({"role": series.role, "growth": found, "readings": thinned(series)})
    return rows


def short_lived(tree: ProcessTree, first_step: int) -> dict[str, int]:
    """{role: processes that are in no row of `process_rows`}."""
    found: dict[str, int] = {}
    for series in tree.series.values():
        if growth(series.steps, [row[0] for row in series.values], first_step).slope is None:
            found[series.role] = found.get(series.role, 0) + 1
    return dict(sorted(found.items()))


def folder_rows(folder: Folder, first_step: int) -> dict[str, dict[str, object]]:
    """{part: growth of its bytes, of the blocks that they take, and of the number of its files}. "all" is the total."""
    return {name: folder_growth(series, first_step) for name, series in folder.parts.items()}


def folder_growth(
    series: FolderSeries, first_step: int, names: Sequence[str] = ("bytes", "on_disk", "files")
) -> dict[str, object]:
    """The growth of each column of a series of three."""
    columns = zip(*series.values, strict=True)
    return {name: asdict(growth(series.steps, values, first_step)) for name, values in zip(names, columns, strict=True)}


def thinned(series: Series) -> dict[str, object]:
    """A few of the readings over the whole run, anonymous memory in KiB."""
    chosen = sorted({round(place) for place in np.linspace(0, len(series.steps) - 1, PLOT_POINTS).tolist()})
    return {
        "step": [series.steps[place] for place in chosen],
        "anonymous_kib": [int(series.values[place][0]) >> 10 for place in chosen],
    }
