"""Axes of charts: positions and texts of the ticks, and the position of a value between the two ends.

This module does not draw (see `charts`). Invariants: two ticks never have the same text, because the number of decimals
follows from the tick spacing. An axis never leaves the possible range of its quantity (a share: 0 % to 100 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Form = Literal["number", "share"]
"""Whether values are written as numbers or as percentages of 1."""

TARGET_TICKS = 5
OVERSHOOT = 0.1
"""Fraction of the tick spacing by which values may exceed the outermost ticks."""
MOST_DECADES = 7
"""Largest number of ticks on a logarithmic axis. Above it, only every second, third ... power of ten has a tick."""
LAST_APART = 0.6
"""The last step gets a tick if it is farther than this fraction of the tick spacing from the tick before."""
FLAT_MARGIN = 0.1
"""If all values are the same, the axis extends by this fraction of the value on both sides."""


@dataclass(frozen=True)
class Scale:
    """How a chart shows its values, and the possible range of the quantity."""

    form: Form = "number"
    logarithmic: bool = False
    low: float | None = None
    """Smallest possible value; None = no limit"""
    high: float | None = None
    """Largest possible value; None = no limit"""


SHARE = Scale("share", low=0.0, high=1.0)
"""A part of a whole."""
POSITIVE = Scale(low=0.0)
"""Lengths, counts, distances."""
ANY = Scale()
LOGARITHMIC = Scale(logarithmic=True)


@dataclass(frozen=True)
class Axis:
    """A vertical axis: its ends and its ticks, in values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    scale: Scale

    @staticmethod
    def over(values: Sequence[float], scale: Scale) -> Axis:
        """Return the axis of `values`. They must be finite, and positive if the scale is logarithmic."""
        low, high = min(values), max(values)
        if scale.logarithmic:
            ticks = _decades(low, high)
            return Axis(min(low, ticks[0]), max(high, ticks[-1]), tuple(ticks), scale)
        if high - low < 1e-9 * max(abs(low), abs(high)) or high == low:
            low, high = _around(low, scale)
        ticks = even_ticks(low, high)
        possible = [tick for tick in ticks if _possible(tick, scale)]
        ticks = possible if len(possible) > 1 else ticks
        return Axis(min(low, ticks[0]), max(high, ticks[-1]), tuple(ticks), scale)

    def place(self, value: float) -> float:
        """Return the position of `value`: 0 at the low end, 1 at the high end."""
        if self.scale.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def text(self, tick: float) -> str:
        """Return the text at a tick."""
        if self.scale.logarithmic:
            return f"{tick:g}"
        return tick_text(tick, self.ticks[1] - self.ticks[0], self.scale.form)


def tick_text(tick: float, spacing: float, form: Form) -> str:
    """Return the text of a tick, with as many decimals as multiples of `spacing` need."""
    unit, factor = ("%", 100) if form == "share" else ("", 1)
    # Decimal of the shortest text: 0.025 is 0.025 and not 0.025000000000000001.
    shown, step = Decimal(repr(round(tick * factor, 12))), Decimal(repr(float(f"{spacing * factor:.6g}")))
    exponent = step.normalize().as_tuple().exponent
    decimals = max(0, -exponent) if isinstance(exponent, int) else 0
    text = f"{shown:.{decimals}f}" if decimals <= 6 and abs(shown) < 100_000 else _scientific(tick * factor, step)
    return f"{text.replace('-0', '0') if not float(text) else text}{unit}"


def even_ticks(low: float, high: float, target: int = TARGET_TICKS) -> list[float]:
    """Return about `target` multiples of 1, 2, 2.5 or 5 times a power of ten, around [low, high] with low < high."""
    rough = (high - low) / target
    magnitude = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / spacing + OVERSHOOT), math.ceil(high / spacing - OVERSHOOT)
    return [float(f"{index * spacing:.12g}") for index in range(first, last + 1)]


def step_ticks(first: int, last: int) -> list[int]:
    """Return integer ticks in [first, last] for the axis of steps. The last step is a tick if there is room."""
    if first == last:
        return [first]
    ticks = sorted({round(tick) for tick in even_ticks(first, last) if first <= tick <= last and tick == round(tick)})
    if not ticks:
        return [first, last]
    spacing = ticks[1] - ticks[0] if len(ticks) > 1 else last - first
    return [*ticks, last] if last - ticks[-1] > LAST_APART * spacing else ticks


def format_value(value: float, form: Form = "number") -> str:
    """Return a number with three significant digits (integers in full), or a share as a percentage."""
    if form == "share":
        return _percent(value)
    if value == round(value) and abs(value) < 1e5:
        return f"{value:.0f}"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def _percent(value: float) -> str:
    """A percentage with one decimal, or more if it would otherwise show a wrong 0 % or 100 %."""
    for decimals in (1, 2, 3):
        text = f"{100 * value:.{decimals}f}%"
        if float(text[:-1]) not in (0.0, 100.0) or value in (0.0, 1.0):
            return text
    return f"{100 * value:.2g}%"


def _decades(low: float, high: float) -> list[float]:
    """At least two powers of ten that enclose [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = math.ceil((last - first) / MOST_DECADES)
    last = first + every * math.ceil((last - first) / every)
    return [10.0**exponent for exponent in range(first, last + 1, every)]


def _around(value: float, scale: Scale) -> tuple[float, float]:
    """The ends of an axis for a single value, within the possible range."""
    if scale.low is not None and scale.high is not None:
        return scale.low, scale.high
    if value == 0:
        return (0.0, 1.0) if scale.low == 0 else (-1.0, 1.0)
    margin = FLAT_MARGIN * abs(value)
    return value - margin, value + margin


def _possible(tick: float, scale: Scale) -> bool:
    return (scale.low is None or tick >= scale.low) and (scale.high is None or tick <= scale.high)


def _scientific(tick: float, step: Decimal) -> str:
    """Scientific notation with enough digits to tell neighbouring ticks apart."""
    if tick == 0:
        return "0"
    digits = math.floor(math.log10(abs(tick))) - step.adjusted() + len(step.normalize().as_tuple().digits) - 1
    return f"{tick:.{max(0, digits)}e}"
