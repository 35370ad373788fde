"""Charts as SVG text: lines and stacked shares over steps, and points with intervals. The page's style sheet styles
them.

This module does not choose what is shown (see `curves_view`) and does not compute axes (see `axes`). Invariants: a
chart needs nothing from outside the page. Lines differ by dash as well as by colour, and stacked areas by their order.
A missing value leaves a gap and is never drawn. The values shown under the pointer (`data-plot`) are the drawn values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import Literal

from tropd_mcore.evaluation.axes import ANY, SHARE, Axis, Scale, step_ticks
from tropd_mcore.evaluation.thinning import drawn_steps

Hue = Literal[
    "trusted", "outlier", "prefix", "plain", "run0", "run1", "run2", "run3", "run4", "run5",
    "part0", "part1", "part2", "part3", "part4",
]  # fmt: skip
Dash = Literal["solid", "dashed", "dotted", "mixed"]
_DASHES: dict[str, str] = {"dashed": "7 4", "dotted": "1.5 4", "mixed": "8 4 1.5 4"}

WIDTH, HEIGHT = 460, 244
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 38
"""Margins of the plot area in the units of the view box."""
SINGLE_POINT_RADIUS = 2.6
"""Radius of the point that is drawn for a value between two missing ones, which has no line."""


@dataclass(frozen=True)
class Series:
    """One line. `values` has one entry per step; None = missing."""

    label: str
    hue: Hue
    values: Sequence[float | None]
    dash: Dash = "solid"

    @property
    def known(self) -> list[float]:
        """The finite values."""
        return [value for value in self.values if value is not None and math.isfinite(value)]


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart."""

    label: str
    value: float
    low: float
    high: float
    hue: Hue
    hollow: bool = False


def line_chart(
    steps: Sequence[int],
    series: Sequence[Series],
    *,
    description: str,
    scale: Scale = ANY,
    borders: Mapping[int, str] = MappingProxyType({}),
) -> str:
    """Return the SVG of lines over `steps`. A logarithmic scale omits values that are not positive.

    `borders` are steps that get a vertical line, each with the text beside it.
    """
    drawn = [
        Series(line.label, line.hue, [_usable(value, scale) for value in line.values], line.dash) for line in series
    ]
    values = [value for line in drawn for value in line.known]
    if not values:
        return ""
    kept = drawn_steps(len(steps), [line.values for line in drawn])
    shown_steps = [steps[index] for index in kept]
    shown = [Series(line.label, line.hue, [line.values[i] for i in kept], line.dash) for line in drawn]
    frame = _Frame(Axis.over(values, scale), steps[0], steps[-1])
    parts = frame.parts(borders)
    for line in shown:
        for run in _runs(shown_steps, line.values):
            parts.append(_polyline([frame.place(step, value) for step, value in run], line))
    return _svg(HEIGHT, description, parts, _plot(shown_steps, shown, scale, frame.ends))


def stacked_chart(
    steps: Sequence[int],
    series: Sequence[Series],
    *,
    description: str,
    borders: Mapping[int, str] = MappingProxyType({}),
) -> str:
    """Return the SVG of shares of one whole over `steps`, the first series at the bottom.

    A step at which one of the shares is missing is left out. `borders` are those of `line_chart`.
    """
    kept = drawn_steps(len(steps), [line.values for line in series])
    shown_steps = [steps[index] for index in kept]
    shown = [Series(line.label, line.hue, [line.values[i] for i in kept]) for line in series]
    whole = [None not in shares for shares in zip(*(line.values for line in shown), strict=True)]
    if not any(whole):
        return ""
    heights: list[list[float | None]] = [[0.0 if known else None for known in whole]]
    for line in shown:
        below = heights[-1]
        heights.append(
            [
                None if base is None or value is None else base + value
                for base, value in zip(below, line.values, strict=True)
            ]
        )
    top = max(value for value in heights[-1] if value is not None)
    frame = _Frame(Axis.over([0.0, max(top, 1.0)], SHARE), steps[0], steps[-1])
    areas = []
    for line, low, high in zip(shown, heights, heights[1:], strict=False):
        for begin, end in zip(_runs(shown_steps, low), _runs(shown_steps, high), strict=True):
            edge = [frame.place(*point) for point in end] + [frame.place(*point) for point in reversed(begin)]
            areas.append(_area(edge, line.hue))
    return _svg(HEIGHT, description, areas + frame.parts(borders), _plot(shown_steps, shown, SHARE, frame.ends))


@dataclass(frozen=True)
class _Frame:
    """Axes of a chart over steps."""

    axis: Axis
    first: int
    last: int

    @property
    def ends(self) -> tuple[int, int]:
        """The steps at the left and the right edge."""
        return self.first, max(self.last, self.first + 1)

    def place(self, step: int, value: float) -> tuple[float, float]:
        """The point of a value in the view box."""
        first, last = self.ends
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - self.axis.place(value))

    def parts(self, borders: Mapping[int, str]) -> list[str]:
        """Grid lines and texts, then the borders."""
        parts = [_grid_line(self.place(self.first, tick)[1], self.axis.text(tick)) for tick in self.axis.ticks]
        for tick in step_ticks(self.first, self.last):
            x = self.place(tick, self.axis.low)[0]
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{tick}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">step</text>')
        return parts + [_border(self.place(step, self.axis.low)[0], text) for step, text in borders.items()]


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
        parts += _interval_row(row, 6 + row_height * (index + 0.5), x(row.value), (x(row.low), x(row.high)))
    return _svg(height, description, parts)


def bar_chart(rows: Sequence[tuple[str, float, str]], *, description: str) -> str:
    """Return the SVG of horizontal bars. A row is (label, length as a share of the longest possible bar, text)."""
    row_height, left, right = 24, 158, 112
    parts = []
    for index, (label, share, text) in enumerate(rows):
        top = 4 + row_height * index
        width = max(1.0, (WIDTH - left - right) * share)
        parts.append(f'<text class="row" x="0" y="{top + 15}">{escape(label)}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{top + 3}" width="{width:.1f}" height="16" rx="2"/>')
        parts.append(f'<text class="row soft" x="{left + width + 7:.1f}" y="{top + 15}">{escape(text)}</text>')
    return _svg(row_height * len(rows) + 8, description, parts)


def legend_mark(hue: Hue, dash: Dash) -> str:
    """Return a short sample of a line in the style of the charts."""
    line = f'<line class="line {hue}" x1="1" x2="27" y1="5" y2="5"{dash_of(dash)}/>'
    return f'<svg class="mark" viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">{line}</svg>'


def _interval_row(row: Interval, y: float, x: float, ends: tuple[float, float]) -> list[str]:
    low, high = ends
    fill = "hollow" if row.hollow else "filled"
    marks = [
        f'<line class="line {row.hue}" x1="{end:.1f}" x2="{end:.1f}" y1="{y - 5:.1f}" y2="{y + 5:.1f}"/>'
        for end in (low, high)
    ]
    return [
        f'<text class="row" x="0" y="{y + 4:.1f}">{escape(row.label)}</text>',
        f'<line class="line {row.hue}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
        *marks,
        f'<circle class="point {fill} {row.hue}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
    ]


def _plot(steps: Sequence[int], series: Sequence[Series], scale: Scale, ends: tuple[int, int]) -> str:
    """The data for the page's script, which shows values under the pointer, as JSON."""
    return json.dumps(
        {
            "steps": list(steps),
            "ends": ends,
            "form": scale.form,
            "lines": [
                {"label": line.label, "hue": line.hue, "values": [_rounded(value) for value in line.values]}
                for line in series
            ],
        },
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _usable(value: float | None, scale: Scale) -> float | None:
    if value is None or not math.isfinite(value) or (scale.logarithmic and value <= 0):
        return None
    return value


def _runs(steps: Sequence[int], values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Contiguous ranges without a missing value."""
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
    return f'<polyline class="line {line.hue}" points="{path}"{dash_of(line.dash)}/>'


def _area(edge: Sequence[tuple[float, float]], hue: Hue) -> str:
    """A filled area; a single step is a bar of the width of a point."""
    xs = {f"{x:.1f}" for x, _ in edge}
    if len(xs) == 1:
        (x, high), (_, low) = edge[0], edge[-1]
        edge = [(x - 2.5, high), (x + 2.5, high), (x + 2.5, low), (x - 2.5, low)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
    return f'<polygon class="area {hue}" points="{path}"/>'


def dash_of(dash: Dash) -> str:
    """Return the attributes of a line with this dash; empty for a solid one."""
    if dash == "solid":
        return ""
    return f' stroke-dasharray="{_DASHES[dash]}" stroke-linecap="{"round" if dash == "dotted" else "butt"}"'


def _grid_line(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _border(x: float, text: str) -> str:
    return (
        f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{x + 3:.1f}" y="{TOP + 9}">{escape(text)}</text>'
    )


def _svg(height: int, description: str, parts: Sequence[str], plot: str = "") -> str:
    data = f' data-plot="{escape(plot, quote=True)}" tabindex="0"' if plot else ""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(description, quote=True)}"{data}>{"".join(parts)}</svg>'
    )
