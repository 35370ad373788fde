"""One aligned line per step for the person who watches.

This is no record (see `jsonl`). Invariant: every line has the width of the header, whatever the numbers are, and at
most 100 columns for a run of up to 99,999 steps (9,999 if it has up to ten phases).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

HEADER_EVERY = 20
"""Number of lines after which the header is repeated."""
RECENT_STEPS = 10
"""Number of latest steps whose mean duration predicts the remaining time."""

_DIM, _BOLD, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Column:
    """One number of the line: heading, metric, format (with width), and the factor that it is multiplied by for
    display."""

    title: str
    metric: str
    format: str
    factor: float = 1.0


COLUMNS = (
    Column("loss", "loss/objective", "7.4f"),
    Column("trust", "trust/fraction", "5.1f", 100.0),
    Column("mean r", "log_ratio/mean", "7.4f"),
    Column("|g|", "optimizer/grad_norm", "7.3g"),
    Column("H_S", "entropy/student", "5.3f"),
    Column("prefix", "guidance/prefix_length", "6.0f"),
    Column("length", "rollout/length_mean", "6.0f"),
    Column("acc", "verifier/accuracy", "5.3f"),
    Column("tok/s", "throughput/tokens_per_second", "6.0f"),
    Column("s/step", "time/step", "6.1f"),
)
SHARES = ("roll", ("time/rollout",)), ("tch", ("time/teacher",)), ("trn", ("time/forward_backward", "time/optimizer"))
"""Title and phases of each share of the step's seconds, in percent."""
LEFT_WIDTH = 5


class Console:
    """Writes to `stream`. An unknown value is shown as `-`.

    `steps` is the number of steps of the run. `last_step` is the step before which this launch ends. `phases` are the
    names of the run's phases; each line then begins with the phase's place, and a line of its own tells which phase
    begins. `now` returns seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        steps: int,
        last_step: int | None = None,
        phases: Sequence[str] = (),
        colour: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._steps = steps
        self._last_step = steps if last_step is None else last_step
        self._phases = phases
        self._phase: int | None = None
        last_place = f"{len(phases) - 1}:" if phases else ""
        self._width = max(len(f"{last_place}{steps}/{steps}"), len("step"))
        self._colour = colour
        self._now = now
        self._last = now()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._lines = 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the line of one step, with the header before the first and every 20th."""
        now, waited = self._now(), metrics.get("time/server", 0.0)
        self._recent.append(max(now - self._last - waited, 0.0))  # a server starts once, not at every step
        self._last = now
        place = self._place(step, metrics)
        if self._lines % HEADER_EVERY == 0:
            titles = [f"{column.title:>{_width(column)}}" for column in COLUMNS]
            shares = [title for title, _ in SHARES]
            self._print(_DIM, " ".join([f"{'step':>{self._width}}", *titles, *shares, f"{'left':>{LEFT_WIDTH}}"]))
        cells = [_cell(column, metrics.get(column.metric)) for column in COLUMNS]
        number = f"{place}{step}/{self._steps}"
        ends = [_shares(metrics), f"{self._left(step):>{LEFT_WIDTH}}"]
        self._print(_BOLD, f"{number:>{self._width}}", f" {' '.join([*cells, *ends])}")
        self._lines += 1

    def close(self) -> None:
        """Nothing to close: the stream is the caller's."""

    def _place(self, step: int, metrics: Mapping[str, float]) -> str:
        """The phase of a step, for its line; if it has just begun, also writes the line that tells so."""
        index = metrics.get("phase/index", math.nan)
        if not self._phases or math.isnan(index):
            return ""
        if int(index) != self._phase:
            self._phase = int(index)
            name, last = self._phases[self._phase], len(self._phases) - 1
            self._print(_DIM, f"-- phase {self._phase} (the last is {last}): {name}, from step {step} --")
        return f"{self._phase}:"

    def _left(self, step: int) -> str:
        """The remaining time of this launch, at the speed of the latest steps."""
        per_step = sum(self._recent) / len(self._recent)
        return clock(per_step * max(self._last_step - step - 1, 0))

    def _print(self, style: str, styled: str, plain: str = "") -> None:
        text = f"{style}{styled}{_RESET}" if self._colour else styled
        self._stream.write(f"{text}{plain}\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """Return a duration in at most five characters: 45s, 12m, 3h05, 4d07h, 123d."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h" if hours < 240 else f"{min(hours // 24, 9999)}d"


def _width(column: Column) -> int:
    return max(int(column.format.partition(".")[0]), len(column.title))


def _cell(column: Column, value: float | None) -> str:
    width = _width(column)
    if value is None or not math.isfinite(value):
        return f"{'-' if value is None or math.isnan(value) else str(value):>{width}}"
    digits, kind = int(column.format[:-1].partition(".")[2]), column.format[-1]
    shown = value * column.factor
    ways = [f"{shown:.{fewer}{kind}}" for fewer in range(digits, -1, -1)] + [f"{shown:.0e}"]
    return _fitting(ways, width)


def _fitting(ways: Sequence[str], width: int) -> str:
    """The first text that fits into `width` columns; `#` signs if none fits."""
    return f"{next((text for text in ways if len(text) <= width), '#' * width):>{width}}"


def _shares(metrics: Mapping[str, float]) -> str:
    """Share of each part in the step's seconds, in percent, under its title."""
    whole = metrics.get("time/step", 0.0)
    cells = []
    for title, phases in SHARES:
        seconds = sum(metrics.get(phase, 0.0) for phase in phases)
        share = f"{100 * seconds / whole:.0f}" if whole > 0 and math.isfinite(whole) else "-"
        cells.append(_fitting([share], len(title)))
    return " ".join(cells)
