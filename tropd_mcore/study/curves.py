"""Pictures of a study's page: the curves of a pair's objectives, as one SVG that is readable in light and dark.

The charts are those of `tropd report` (`evaluation.charts`); this module puts them beside each other, with a style of
their own. Invariant: a line is the mean over the seeds that have a value at the step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean
from typing import get_args

from tropd_mcore.evaluation.axes import ANY, POSITIVE, SHARE, Scale
from tropd_mcore.evaluation.charts import HEIGHT, WIDTH, Dash, Hue, Series, dash_of, line_chart
from tropd_mcore.study.plan import BEFORE
from tropd_mcore.study.tables import Row

HUES: tuple[Hue, ...] = ("run0", "run1", "run2", "run3", "run4", "run5")
_PLOT = re.compile(r' data-plot="[^"]*" tabindex="0"')
"""The values for the report's script, which a picture has no use for"""
COLUMNS = 2
TITLE_HEIGHT, LEGEND_ROW, MARGIN = 26, 22, 10


@dataclass(frozen=True)
class Panel:
    """One chart of a picture."""

    metric: str
    title: str
    scale: Scale


PANELS = (
    Panel("verifier/accuracy", "right rollouts (sampled, training prompts)", SHARE),
    Panel("trust/tv", "total variation to the teacher, on the student's own tokens", SHARE),
    Panel("held_out/forward_kl", "forward KL on held-out teacher responses, nats per token", POSITIVE),
    Panel("entropy/student", "entropy of the student, nats", ANY),
    Panel("optimizer/grad_norm", "gradient norm, before clipping", POSITIVE),
)

STYLE = """
text { font-family: system-ui, sans-serif; fill: #424a53; font-size: 11px }
.title { font-size: 13px; font-weight: 600; fill: #1f2328 }
.legend { font-size: 12px }
.grid { stroke: #d0d7de; stroke-width: 1 }
.line { fill: none; stroke: var(--hue); stroke-width: 1.8 }
.point { stroke: var(--hue); fill: var(--hue) }
.back { fill: #ffffff }
.run0 { --hue: #1f66b0 } .run1 { --hue: #c4520f } .run2 { --hue: #1d7a45 }
.run3 { --hue: #8a3ea8 } .run4 { --hue: #8a6d00 } .run5 { --hue: #22293a }
@media (prefers-color-scheme: dark) {
text { fill: #b1bac4 } .title { fill: #f0f6fc } .grid { stroke: #30363d } .back { fill: #0d1117 }
.run0 { --hue: #6eb1f5 } .run1 { --hue: #f2995c } .run2 { --hue: #6fce98 }
.run3 { --hue: #cf9be6 } .run4 { --hue: #d9bd4f } .run5 { --hue: #e3e6ed }
}
"""


def picture(rows: Sequence[Row], title: str) -> str:
    """Return the SVG of all panels that have values, with one legend; "" if none has."""
    trained = [row for row in rows if row.objective != BEFORE]
    charts = [(panel, chart) for panel in PANELS if (chart := _chart(trained, panel))]
    if not charts:
        return ""
    lines = -(-len(trained) // COLUMNS)
    height_of_row = TITLE_HEIGHT + HEIGHT
    legend = MARGIN + LEGEND_ROW * lines
    width = COLUMNS * WIDTH + 3 * MARGIN
    height = legend + height_of_row * -(-len(charts) // COLUMNS) + MARGIN
    parts = [f'<rect class="back" width="{width}" height="{height}" rx="8"/>']
    for number, row in enumerate(trained):
        x, y = MARGIN * 2 + (number % COLUMNS) * WIDTH, MARGIN + LEGEND_ROW * (number // COLUMNS) + 12
        hue, dash = _style(number)
        parts.append(f'<line class="line {hue}" x1="{x}" x2="{x + 30}" y1="{y - 4}" y2="{y - 4}"{dash_of(dash)}/>')
        parts.append(f'<text class="legend" x="{x + 38}" y="{y}">{escape(row.label)}</text>')
    for number, (panel, chart) in enumerate(charts):
        x = MARGIN + (number % COLUMNS) * (WIDTH + MARGIN)
        y = legend + height_of_row * (number // COLUMNS)
        parts.append(f'<text class="title" x="{x + 8}" y="{y + 18}">{escape(panel.title)}</text>')
        place = f'<svg x="{x}" y="{y + TITLE_HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(_PLOT.sub("", chart).replace("<svg ", place, 1))
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _chart(rows: Sequence[Row], panel: Panel) -> str:
    steps = sorted({step for row in rows for result in row.results for step in result.curve_steps})
    series = []
    for number, row in enumerate(rows):
        values = [_mean_at(row, panel.metric, step) for step in steps]
        if any(value is not None for value in values):
            hue, dash = _style(number)
            series.append(Series(row.label, hue, values, dash))
    return line_chart(steps, series, description=panel.title, scale=panel.scale) if series else ""


def _mean_at(row: Row, metric: str, step: int) -> float | None:
    found = []
    for result in row.results:
        if metric in result.curves and step in result.curve_steps:
            value = result.curves[metric][result.curve_steps.index(step)]
            if value is not None:
                found.append(value)
    return mean(found) if found else None


def _style(number: int) -> tuple[Hue, Dash]:
    """A hue and a dash that differ for the first 24 lines."""
    dashes: tuple[Dash, ...] = get_args(Dash)
    return HUES[number % len(HUES)], dashes[number // len(HUES) % len(dashes)]
