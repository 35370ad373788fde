"""Tables of a study's page, in Markdown: one row per objective, means over seeds, differences paired by seed.

Invariants: a number with an interval has at least two seeds; its interval is Student's t at 95 %. Nothing is corrected
for the number of comparisons; the page says so. A missing number is an empty cell and never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from tropd_mcore.evaluation.statistics import t_half_width
from tropd_mcore.study.plan import BEFORE, Plan
from tropd_mcore.study.result import CellResult

RIGHT_ENOUGH = 0.8
"""Share of right rollouts whose first step is told; a mean of `WINDOW` steps"""
WINDOW = 5
EMPTY = "-"


@dataclass(frozen=True)
class Row:
    """The results of one objective (and variant) on one pair, one per seed, in the order of the seeds."""

    label: str
    objective: str
    results: tuple[CellResult, ...]

    def of_seed(self, seed: int) -> CellResult | None:
        return next((result for result in self.results if result.seed == seed), None)


def rows_of(plan: Plan, results: Sequence[CellResult], group: str, pair: str) -> list[Row]:
    """Return the rows of a table: the student before, then the objectives of the group, in the plan's order."""
    chosen = plan.groups[group]
    kinds = [(BEFORE, "", "before")]
    for objective in chosen.objectives:
        for variant in chosen.variants or ("",):
            label = plan.objectives[objective].label
            kinds.append((objective, variant, f"{label}, {variant}" if variant else label))
    rows = []
    for objective, variant, label in kinds:
        found = [
            result
            for result in results
            if (result.pair, result.objective, result.variant) == (pair, objective, variant)
            and result.seed in chosen.seeds
        ]
        if found:
            rows.append(Row(label, objective, tuple(sorted(found, key=lambda result: result.seed))))
    return rows


def accuracy_table(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table with accuracies and the differences to the reference."""
    reference = next((row for row in rows if row.objective == plan.reference), None)
    name = plan.objectives[plan.reference].label
    lines = [
        f"| objective | seeds | greedy % | sampled % | sampled, each seed | sampled minus {name} | pass@4 % | cut % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = " ".join(_percent(result.accuracy.sampled) for result in row.results)
        cells = [
            row.label,
            str(len(row.results)),
            _points([result.accuracy.greedy for result in row.results]),
            _points([result.accuracy.sampled for result in row.results]),
            each,
            _difference(row, reference),
            _points([result.accuracy.pass_at.get("4") for result in row.results]),
            _points([result.accuracy.truncated for result in row.results]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def course_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table with what was measured on the way, and what it cost."""
    lines = [
        "| objective | TV first, last | entropy last (teacher) | gradient norm median, p99 | "
        "rollouts 80 % right after | own tokens | teacher's tokens | s per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.objective == BEFORE:
            continue
        cells = [
            row.label,
            f"{_mean(row, _first('trust/tv'))}, {_mean(row, _last('trust/tv'))}",
            f"{_mean(row, _last('entropy/student'), 3)} ({_mean(row, _last('entropy/teacher'), 3)})",
            f"{_mean(row, _quantile(0))}, {_mean(row, _quantile(1))}",
            _reached(row),
            _count(row, "student"),
            _count(row, "prefix"),
            _mean(row, lambda result: result.seconds, 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def reached(result: CellResult) -> int | None:
    """Return the first step at which a mean of `WINDOW` steps of rollouts is right often enough; None if never."""
    values = result.curves.get("verifier/accuracy", [])
    for end in range(WINDOW, len(values) + 1):
        known = [value for value in values[end - WINDOW : end] if value is not None]
        if len(known) == WINDOW and mean(known) >= RIGHT_ENOUGH:
            return result.curve_steps[end - 1]
    return None


def _difference(row: Row, reference: Row | None) -> str:
    """The difference of the sampled accuracy to the reference's run of the same seed, in points."""
    if reference is None or row is reference or row.objective == BEFORE:
        return EMPTY
    differences = []
    for result in row.results:
        other = reference.of_seed(result.seed)
        if other is not None and other.accuracy.sampled is not None and result.accuracy.sampled is not None:
            differences.append(result.accuracy.sampled - other.accuracy.sampled)
    return _points(differences, signed=True)


def _points(values: Sequence[float | None], *, signed: bool = False) -> str:
    """A mean in percent with its interval."""
    known = [value for value in values if value is not None]
    if not known:
        return EMPTY
    text = f"{100 * mean(known):+.1f}" if signed else f"{100 * mean(known):.1f}"
    half = t_half_width(known)
    return text if math.isnan(half) else f"{text} ± {100 * half:.1f}"


def _percent(value: float | None) -> str:
    return EMPTY if value is None else f"{100 * value:.1f}"


Reading = Callable[[CellResult], float | None]


def _first(metric: str) -> Reading:
    return lambda result: next((value for value in result.curves.get(metric, []) if value is not None), None)


def _last(metric: str) -> Reading:
    """The mean of the last `WINDOW` values of a curve."""

    def read(result: CellResult) -> float | None:
        known = [value for value in result.curves.get(metric, [])[-WINDOW:] if value is not None]
        return mean(known) if known else None

    return read


def _quantile(number: int) -> Reading:
    def read(result: CellResult) -> float | None:
        found = result.quantiles.get("optimizer/grad_norm")
        return found[number] if found else None

    return read


def _mean(row: Row, read: Reading, digits: int = 2) -> str:
    known = [value for value in map(read, row.results) if value is not None and math.isfinite(value)]
    return f"{mean(known):.{digits}f}" if known else EMPTY


def _count(row: Row, name: str) -> str:
    known = [result.counts.get(name, 0) for result in row.results]
    return f"{mean(known) / 1000:.0f}k" if any(known) else EMPTY


def _reached(row: Row) -> str:
    """Steps after which the rollouts are right often enough, by seed; empty if parts of them are the teacher's."""
    if any(result.counts.get("prefix") or "verifier/accuracy" not in result.curves for result in row.results):
        return EMPTY
    found = [reached(result) for result in row.results]
    return ", ".join("never" if step is None else f"{step + 1} steps" for step in dict.fromkeys(found))
