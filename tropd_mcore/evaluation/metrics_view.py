"""The table of all metrics of a run: the meaning of each, and its first, last, smallest, largest and mean value.

This module does not make curves. Invariant: the table has every metric of every step, with or without a description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tropd_mcore.evaluation.axes import format_value
from tropd_mcore.evaluation.chart_catalogue import PHASE_PREFIX, WHOLE_STEP, phase_name
from tropd_mcore.evaluation.run_records import RunRecords


@dataclass(frozen=True)
class MetricNote:
    """The entry of one metric in the catalogue."""

    unit: str
    over: str
    """The items that it is computed over"""
    description: str


Notes = Mapping[str, MetricNote]


def metrics_section(runs: Sequence[RunRecords], notes: Notes) -> str:
    """Return the section with a folded table per run; empty if no step was logged."""
    tables = "".join(_table(run, notes, named=len(runs) > 1) for run in runs if run.metrics)
    return f"<section><h2>All metrics</h2>{tables}</section>" if tables else ""


def _table(run: RunRecords, notes: Notes, *, named: bool) -> str:
    rows = "".join(_row(run, name, notes) for name in run.metric_names)
    heads = "".join(
        f"<th>{head}</th>" for head in ("metric", "meaning", "unit", "first", "last", "min", "max", "mean", "steps")
    )
    title = f"{len(run.metric_names)} metrics over {len(run.steps)} steps{f' of {escape(run.name)}' if named else ''}"
    return (
        f'<details class="metrics"><summary>{title}</summary><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _row(run: RunRecords, name: str, notes: Notes) -> str:
    values = [value for value in run.series(name) if value is not None]
    note = _note(name, notes)
    numbers = [values[0], values[-1], min(values), max(values), sum(values) / len(values)] if values else [None] * 5
    cells = "".join(f"<td>{'&ndash;' if number is None else format_value(number)}</td>" for number in numbers)
    meaning = f"{escape(note.description)} <small>{escape(note.over)}</small>" if note else ""
    unit = escape(note.unit) if note and note.unit != "1" else ""
    return (
        f"<tr><th><code>{escape(name)}</code></th><td>{meaning}</td><td>{unit}</td>{cells}<td>{len(values)}</td></tr>"
    )


def _note(name: str, notes: Notes) -> MetricNote | None:
    if name == WHOLE_STEP:
        return MetricNote("s", "", "time of the whole step")
    if name.startswith(PHASE_PREFIX):
        return MetricNote("s", "", f"time of the phase: {phase_name(name)}")
    if (found := notes.get(name)) is not None or name.count("/") != 2:
        return found
    group, teacher, what = name.split("/")
    note = notes.get(f"{group}/NAME/{what}")
    return note and MetricNote(*(text.replace("NAME", teacher) for text in (note.unit, note.over, note.description)))
