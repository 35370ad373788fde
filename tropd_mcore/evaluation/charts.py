"""Charts as SVG text: lines over steps, and points with intervals; styled by the page's style sheet.

Not for choosing what is shown (see `report`). Invariants: no chart needs anything from outside the page; series differ
by dash as well as by colour; a value that is missing leaves a gap and is never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Hue = Literal["trusted", "outlier", "prefix", "plain"]
Dash = Literal["solid", "dashed", "dotted"]
_DASHES: dict[str, str] = {"dashed": "7 4", "dotted": "1.5 4"}

WIDTH, HEIGHT = 460, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 30
"""Margins of the plot area in the units of the view box."""
TARGET_TICKS = 5
OVERSHOOT = 0.1
"""Part of a tick's spacing that values may lie outside the outermost ticks."""
SINGLE_POINT_RADIUS = 3
"""A value between two missing ones has no line and is drawn as a point of this radius."""


@dataclass(frozen=True)
class Series:
    """One line; `values` has an entry a step, None where there is none."""

    label: str
    hue: Hue
    values: Sequence[float | None]
    dash: Dash = "solid"


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart."""

    label: str
    value: float
    low: float
    high: float
    hue: Hue
    hollow: bool = False


def line_chart(steps: Sequence[int], series: Sequence[Series], *, description: str, logarithmic: bool = False) -> str:
    """Return the SVG of lines over `steps`; `logarithmic` leaves out values that are not positive."""
    drawn = [
        Series(line.label, line.hue, [_usable(value, logarithmic) for value in line.values], line.dash)
        for line in series
    ]
    values = [value for line in drawn for value in line.values if value is not None]
    if not values:
        return ""
    axis = _Axis.over(values, logarithmic=logarithmic)
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - axis.place(value))

    parts = [_grid_line(y(tick), axis.text(tick)) for tick in axis.ticks]
    for tick in _step_ticks(first, steps[-1]):
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick}</text>')
    for line in drawn:
        for run in _runs(steps, line.values):
            points = [(x(step), y(value)) for step, value in run]
            parts.append(_polyline(points, line))
    return _svg(HEIGHT, description, parts)


def interval_chart(rows: Sequence[Interval], *, description: str) -> str:
    """Return the SVG of proportions in [0, 1] with their intervals, one row each, from top to bottom."""
    row_height, left, height = 30, 204, 30 * len(rows) + 34

    def x(value: float) -> float:
        return left + (WIDTH - left - RIGHT - 12) * value

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 10}" text-anchor="middle">{tick:.0%}</text>')
    for index, row in enumerate(rows):
        y = 6 + row_height * (index + 0.5)
        fill = "hollow" if row.hollow else "filled"
        parts.append(f'<text class="row" x="0" y="{y + 4:.1f}">{escape(row.label)}</text>')
        parts.append(
            f'<line class="line {row.hue}" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts += [
            f'<line class="line {row.hue}" x1="{x(end):.1f}" x2="{x(end):.1f}" y1="{y - 5:.1f}" y2="{y + 5:.1f}"/>'
            for end in (row.low, row.high)
        ]
        parts.append(f'<circle class="point {fill} {row.hue}" cx="{x(row.value):.1f}" cy="{y:.1f}" r="5"/>')
    return _svg(height, description, parts)


def legend_mark(hue: Hue, dash: Dash) -> str:
    """Return a short piece of a line as it is drawn in a chart."""
    line = f'<line class="line {hue}" x1="1" x2="27" y1="5" y2="5"{_dash(dash)}/>'
    return f'<svg class="mark" viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">{line}</svg>'


def format_value(value: float) -> str:
    """Return a number with three significant digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


@dataclass(frozen=True)
class _Axis:
    """A vertical axis: its ends and its ticks, in values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool

    @staticmethod
    def over(values: Sequence[float], *, logarithmic: bool) -> _Axis:
        low, high = min(values), max(values)
        if logarithmic:
            exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [10.0**exponent for exponent in exponents]
            if len(ticks) == 1:
                ticks.append(10 * ticks[0])
        else:
            ticks = _even_ticks(low, high)
        return _Axis(min(low, ticks[0]), max(high, ticks[-1]), tuple(ticks), logarithmic)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def text(self, tick: float) -> str:
        if self.logarithmic:
            return f"{tick:g}"
        spacing = self.ticks[1] - self.ticks[0]
        decimals = max(0, -math.floor(math.log10(spacing) + 1e-9))
        return f"{tick:.{decimals}f}" if decimals <= 4 and abs(tick) < 1e5 else f"{tick:g}"


def _even_ticks(low: float, high: float) -> list[float]:
    """About TARGET_TICKS multiples of 1, 2, 2.5 or 5 times a power of ten, around [low, high]."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = 0.5 * abs(high) or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / TARGET_TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / spacing + OVERSHOOT), math.ceil(high / spacing - OVERSHOOT)
    return [round(index * spacing, 12) for index in range(first, last + 1)]


def _step_ticks(first: int, last: int) -> list[int]:
    """Whole numbers inside [first, last]."""
    if first == last:
        return [first]
    return sorted({round(tick) for tick in _even_ticks(first, last) if first <= tick <= last and tick == round(tick)})


def _usable(value: float | None, logarithmic: bool) -> float | None:
    if value is None or not math.isfinite(value) or (logarithmic and value <= 0):
        return None
    return value


def _runs(steps: Sequence[int], values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """The stretches without a missing value."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _polyline(points: Sequence[tuple[float, float]], line: Series) -> str:
    if len(points) == 1:
        (x, y), radius = points[0], SINGLE_POINT_RADIUS
        return f'<circle class="point filled {line.hue}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line {line.hue}" points="{path}"{_dash(line.dash)}/>'


def _dash(dash: Dash) -> str:
    if dash == "solid":
        return ""
    return f' stroke-dasharray="{_DASHES[dash]}" stroke-linecap="{"round" if dash == "dotted" else "butt"}"'


def _grid_line(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _svg(height: int, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
