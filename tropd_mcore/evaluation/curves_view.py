"""The curves of the report: one figure per chart, for one run or for several runs in the same chart.

The list of charts is in `chart_catalogue`. Invariants: a chart without a value is named but not drawn. In a comparison,
each run has one colour and each metric one dash on the whole page.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from tropd_mcore.evaluation.axes import LOGARITHMIC, format_value
from tropd_mcore.evaluation.chart_catalogue import (
    CHARTS,
    LEAST_SHARE,
    PHASE_PREFIX,
    WHOLE_STEP,
    Chart,
    Line,
    charts_by_teacher,
    phase_name,
)
from tropd_mcore.evaluation.charts import Dash, Hue, Series, bar_chart, legend_mark, line_chart, stacked_chart
from tropd_mcore.evaluation.definitions import DEFINITIONS
from tropd_mcore.evaluation.run_records import RunRecords
from tropd_mcore.evaluation.thinning import MOST_POINTS

RUN_HUES: tuple[Hue, ...] = ("run0", "run1", "run2", "run3", "run4", "run5")
LINE_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted", "mixed")
"""Dashes of a chart's metrics in a comparison, where the hue shows the run."""
MOST_PHASES = 6
"""Number of lines in the chart of phases: the phases that took the most time."""
_PHASE_LOOKS: tuple[tuple[Hue, Dash], ...] = (
    ("trusted", "solid"), ("outlier", "solid"), ("plain", "solid"),
    ("trusted", "dashed"), ("outlier", "dashed"), ("plain", "dotted"),
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """The time that a phase took in a run."""

    metric: str
    total_s: float
    share: float
    """Share of the time of all steps"""
    median_s: float
    """Median over the steps with this phase"""
    steps: int
    """Number of steps with this phase"""


def curves_section(runs: Sequence[RunRecords]) -> str:
    """Return the section with all curves of `runs`. The first run is the subject of the report."""
    if not any(run.metrics for run in runs):
        return '<section><h2>Curves</h2><p class="note">There is no metrics.jsonl, or no step in it.</p></section>'
    steps = sorted({step for run in runs for step in run.steps})
    of_teachers = charts_by_teacher(list(dict.fromkeys(name for run in runs for name in run.metric_names)))
    drawn = [(chart, _chart(runs, steps, chart)) for chart in (*CHARTS, *of_teachers)]
    missing = [chart.title.lower() for chart, html in drawn if not html]
    figures = "".join(
        [*(html for _, html in drawn), _time_chart(runs, steps), *(_time_bars(run, runs) for run in runs)]
    )
    whose = "in this run" if len(runs) == 1 else "in these runs"
    notes = [f"Not measured {whose}: {', '.join(missing)}."] if missing else []
    if len(steps) > MOST_POINTS:
        notes.append(
            f"Each chart draws about {MOST_POINTS} of the {len(steps)} steps: from each group of neighbouring steps, "
            "those with the smallest and the largest value of each line. No peak is lost."
        )
    if _borders(runs):
        notes.append("A vertical line is the first step of a training phase, with the phase's objective beside it.")
    note = f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
    return (
        f'<section><h2>Curves</h2>{DEFINITIONS}<p class="tools" hidden><label><input type="checkbox" id="smooth"> '
        "smooth: the mean of 9 neighbouring points; the step values stay faint behind it and under the pointer"
        "</label></p>"
        f'<div class="charts">{figures}</div>{note}</section>'
    )


def phases(run: RunRecords) -> list[Phase]:
    """Return the phases of a run that took at least LEAST_SHARE of some step, the longest first."""
    whole = run.series(WHOLE_STEP)
    total = sum(value for value in whole if value is not None)
    found = []
    for metric in run.metric_names:
        if not metric.startswith(PHASE_PREFIX) or metric == WHOLE_STEP:
            continue
        values = run.series(metric)
        shares = [
            value / step
            for value, step in zip(values, whole, strict=True)
            if value is not None and step is not None and step > 0
        ]
        known = [value for value in values if value is not None]
        if known and max(shares, default=1.0) >= LEAST_SHARE:
            share = sum(known) / total if total > 0 else 0.0
            found.append(Phase(metric, sum(known), share, statistics.median(known), len(known)))
    return sorted(found, key=lambda phase: -phase.total_s)


def _chart(runs: Sequence[RunRecords], steps: Sequence[int], chart: Chart) -> str:
    """The figure of one chart; empty if none of its metrics has a value. Stacked shares have a figure per run."""
    if chart.stacked:
        return "".join(_stacked(run, chart, named=len(runs) > 1) for run in runs)
    if chart.sparse:
        measured = {step for run in runs for line in chart.lines for step in _known_steps(run, line)}
        steps = [step for step in steps if step in measured]
    series = []
    for place, line in enumerate(chart.lines):
        for number, run in enumerate(runs):
            values = _values(run, steps, line)
            same = line.only_other and values == _values(run, steps, chart.lines[place - 1])
            if not same and any(value is not None for value in values):
                label, hue, dash = line.label, line.hue, line.dash
                if len(runs) > 1:
                    label, hue, dash = (
                        f"{run.name}: {line.label}",
                        RUN_HUES[number],
                        LINE_DASHES[place % len(LINE_DASHES)],
                    )
                series.append(Series(label, hue, values, dash))
    borders = _borders(runs)
    svg = line_chart(steps, series, description=f"{chart.title} over the steps", scale=chart.scale, borders=borders)
    return _figure(chart, svg, series)


def _borders(runs: Sequence[RunRecords]) -> dict[int, str]:
    """The first step of each training phase of a single run, with its name. Several runs have different ones."""
    return {phase.first: phase.name for phase in runs[0].training_phases[1:]} if len(runs) == 1 else {}


def _known_steps(run: RunRecords, line: Line) -> list[int]:
    return [step for step, value in zip(run.steps, run.series(line.metric), strict=True) if value is not None]


def _stacked(run: RunRecords, chart: Chart, *, named: bool) -> str:
    series = [Series(line.label, line.hue, _values(run, run.steps, line)) for line in chart.lines]
    if named:
        chart = replace(chart, title=f"{chart.title}: {run.name}")
    description = f"{chart.title} over the steps"
    return _figure(chart, stacked_chart(run.steps, series, description=description, borders=_borders([run])), series)


def _figure(chart: Chart, svg: str, series: Sequence[Series]) -> str:
    if not svg:
        return ""
    legend = "".join(
        f"<li>{legend_mark(line.hue, line.dash)}{escape(line.label)} "
        f'<b title="the last value">{format_value(line.known[-1], chart.scale.form)}</b></li>'
        for line in series
        if line.known
    )
    return (
        f'<figure><figcaption><h3>{escape(chart.title)} <span class="unit">{escape(chart.unit)}</span></h3>'
        f'<ul class="lines">{legend}</ul></figcaption>{svg}<p class="reading">{escape(chart.reading)}</p></figure>'
    )


def _values(run: RunRecords, steps: Sequence[int], line: Line) -> list[float | None]:
    """One metric of a run at each of `steps`."""
    found = dict(zip(run.steps, run.series(line.metric), strict=True))
    values = [found.get(step) for step in steps]
    return [None if value is None else 1.0 - value for value in values] if line.complement else values


def _time_chart(runs: Sequence[RunRecords], steps: Sequence[int]) -> str:
    """Seconds of the longest phases, or of the whole step if runs are compared."""
    if len(runs) > 1:
        whole = (Line("whole step", WHOLE_STEP),)
        return _chart(
            runs, steps, Chart("Seconds per step", "s, logarithmic", "All phases together.", whole, LOGARITHMIC)
        )
    found = phases(runs[0])[:MOST_PHASES]
    lines = tuple(
        Line(phase_name(phase.metric), phase.metric, *look) for phase, look in zip(found, _PHASE_LOOKS, strict=False)
    )
    reading = "The phases that took the most time. A phase that only some steps have, such as a checkpoint, is a point."
    return _chart(runs, steps, Chart("Seconds by phase", "s, logarithmic", reading, lines, LOGARITHMIC))


def _time_bars(run: RunRecords, runs: Sequence[RunRecords]) -> str:
    """Bars with the shares of the phases in the time of one run."""
    found = phases(run)
    total = sum(value for value in run.series(WHOLE_STEP) if value is not None)
    if not found or total <= 0:
        return ""
    rest = total - sum(phase.total_s for phase in found)
    longest = max(phase.share for phase in found)
    rows = [
        (phase_name(phase.metric), phase.share / longest, f"{phase.share:.1%} · {_median(phase, len(run.steps))}")
        for phase in found
    ]
    if rest / total >= LEAST_SHARE:
        rows.append(("not in a phase", min(1.0, rest / total / longest), f"{rest / total:.1%}"))
    title = f"Where the time went{f': {run.name}' if len(runs) > 1 else ''}"
    reading = (
        f"Shares of {_duration(total)}, the time of {len(run.steps)} logged steps, and the median over the steps with "
        "the phase. Phases below 1 % of every step are only in the table of all metrics."
    )
    return (
        f'<figure><figcaption><h3>{escape(title)} <span class="unit">share of the time</span></h3></figcaption>'
        f'{bar_chart(rows, description=title)}<p class="reading">{escape(reading)}</p></figure>'
    )


def _median(phase: Phase, steps: int) -> str:
    return f"{_duration(phase.median_s)}{'' if phase.steps == steps else f' in {phase.steps} steps'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
