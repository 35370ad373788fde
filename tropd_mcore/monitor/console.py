"""One aligned line a step for the person who watches.

Not a record (see `jsonl`). Invariant: every line has the width of the header, whatever the numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

HEADER_EVERY = 20
"""Lines between two repetitions of the header."""


@dataclass(frozen=True)
class Column:
    """One number of the line: heading, metric, format (width included), and the factor it is shown with."""

    title: str
    metric: str
    format: str
    factor: float = 1.0


COLUMNS = (
    Column("loss", "loss/objective", "9.4f"),
    Column("trust%", "trust/fraction", "6.1f", 100.0),
    Column("TV", "trust/tv", "6.4f"),
    Column("mean r", "log_ratio/mean", "8.4f"),
    Column("|g|", "optimizer/grad_norm", "9.3g"),
    Column("H_S", "entropy/student", "6.3f"),
    Column("H_T", "entropy/teacher", "6.3f"),
    Column("prefix", "guidance/prefix_length", "7.1f"),
    Column("length", "rollout/length_mean", "7.1f"),
    Column("acc", "verifier/accuracy", "5.3f"),
    Column("tok/s", "throughput/tokens_per_second", "8.1f"),
    Column("s/step", "time/step", "7.2f"),
)


class Console:
    """Writes to `stream`; a value that is not known is shown as `-`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines = 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the line of one step, with the header before the first and every 20th."""
        if self._lines % HEADER_EVERY == 0:
            self._print("  ".join([f"{'step':>6}", *(f"{column.title:>{_width(column)}}" for column in COLUMNS)]))
        self._print("  ".join([f"{step:>6}", *(_cell(column, metrics.get(column.metric)) for column in COLUMNS)]))
        self._lines += 1

    def close(self) -> None:
        """Nothing to close: the stream is the caller's."""

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _width(column: Column) -> int:
    return max(int(column.format.partition(".")[0]), len(column.title))


def _cell(column: Column, value: float | None) -> str:
    width = _width(column)
    if value is None or not math.isfinite(value):
        return f"{'-' if value is None or math.isnan(value) else str(value):>{width}}"
    text = f"{value * column.factor:{column.format}}".strip()
    return f"{text if len(text) <= width else f'{value * column.factor:.{max(width - 7, 0)}e}':>{width}}"
