"""Chooses which steps of a long run are drawn: few enough for a page, without losing an extreme value or a gap.

Nothing is averaged: every drawn point is the value of one step. Invariants: in each group of neighbouring steps, the
smallest and the largest value of every line and the first step of a gap are drawn. So are the first and the last step.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_POINTS = 800
"""Approximate number of drawn steps per chart. All steps of a shorter run are drawn."""

Values = Sequence[float | None]


def drawn_steps(count: int, lines: Sequence[Values], most: int = MOST_POINTS) -> list[int]:
    """Return the indices in 0 .. count-1 that are drawn, ascending. If `count` is at most `most`, these are all."""
    if count <= most:
        return list(range(count))
    groups = max(1, most // max(2, 2 * len(lines)))
    kept = {0, count - 1}
    for group in range(groups):
        indices = range(group * count // groups, (group + 1) * count // groups)
        for line in lines:
            kept |= _extremes(line, indices)
    return sorted(kept)


def group_size(count: int, lines: int, most: int = MOST_POINTS) -> int:
    """Return the size of a group of neighbouring steps; 1 if every step is drawn."""
    return 1 if count <= most else -(-count // max(1, most // max(2, 2 * lines)))


def _extremes(line: Values, indices: range) -> set[int]:
    known = [index for index in indices if line[index] is not None]
    if not known:
        return set()
    kept = {min(known, key=lambda index: line[index] or 0.0), max(known, key=lambda index: line[index] or 0.0)}
    gap = next((index for index in indices if line[index] is None), None)
    return kept if gap is None else kept | {gap}
