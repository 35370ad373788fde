"""The top of the report: tiles with one number each, and a summary in sentences.

This module does not make curves. Invariants: a tile says what it compares. Two windows of steps are compared only if
the student continued teacher prefixes of the same length in both, because every number of a rollout depends on that
length. A sentence states only what was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tropd_mcore.evaluation.evaluation_view import before_and_after, difference
from tropd_mcore.evaluation.run_records import RunRecords

WINDOW = 10
"""The first and the last tenth of the steps are compared."""
SAME_TOKENS = 1.0
SAME_SHARE = 0.1
"""Two prefix lengths count as equal if they differ by at most one token, or by a tenth of the longer one."""
MANY_CUT = 0.05
"""The summary mentions cut responses if their share is at least this."""


@dataclass(frozen=True)
class Tile:
    """One number with its title and note."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Windows:
    """The steps that tiles are about, as slices of the logged steps."""

    last: slice
    first: slice | None
    """None if no earlier steps had prefixes of the same length"""
    prefix: float | None
    """Mean prefix length (tokens) in the last window; None if it was not logged"""
    start_prefix: float | None
    """Mean prefix length (tokens) in the first tenth of the steps"""


_TILES = (
    ("Trusted tokens", "trust/fraction", "{:.1%}"),
    ("Mean log-ratio", "log_ratio/mean", "{:+.3f}"),
    ("Right rollouts", "verifier/accuracy", "{:.1%}"),
)
"""(title, metric, format)"""


def tiles(run: RunRecords) -> list[Tile]:
    """Return the tiles of a run, held-out accuracy first."""
    found = [_accuracy_tile(run)]
    if run.metrics:
        windows = comparable_windows(run)
        found += [_window_tile(run, windows, *tile) for tile in _TILES]
        found.append(_speed_tile(run))
    return [tile for tile in found if tile is not None]


def comparable_windows(run: RunRecords) -> Windows:
    """Return the last tenth of the steps, and the earliest window of the same size with equally long prefixes."""
    count = len(run.steps)
    size = max(1, count // WINDOW)
    last = slice(count - size, count)
    lengths = run.series("guidance/prefix_length")
    mean, start = _mean(lengths[last]), _mean(lengths[:size])
    if count < 2 * size or count < 2:
        return Windows(last, None, mean, start)
    if mean is None:
        return Windows(last, slice(0, size) if not any(lengths) else None, mean, start)
    for begin in range(0, count - 2 * size + 1):
        other = _mean(lengths[begin : begin + size])
        if other is not None and abs(other - mean) <= max(SAME_TOKENS, SAME_SHARE * max(other, mean)):
            return Windows(last, slice(begin, begin + size), mean, start)
    return Windows(last, None, mean, start)


def sentences(run: RunRecords) -> list[str]:
    """Return the summary of the run as plain text, one fact per sentence."""
    return [*_progress(run), *_phases(run), _success(run), *_troubles(run)]


def _progress(run: RunRecords) -> list[str]:
    if not run.steps:
        return ["No step has been logged."]
    wanted = run.settings.get("run.steps")
    done = run.steps[-1] + 1
    if not isinstance(wanted, int):
        return [f"Steps {run.steps[0]} to {run.steps[-1]} are logged."]
    if done >= wanted:
        return [f"All {wanted} steps are done."]
    return [f"{done} of {wanted} steps are done. The run is still going, or it was stopped."]


def _phases(run: RunRecords) -> list[str]:
    """The training phases, and those that never began although all steps are done."""
    phases = run.training_phases
    if not phases:
        return []
    spans = (f"{phase.name} in steps {phase.first} to {phase.last}" for phase in phases)
    found = [f"Trained in phases: {', '.join(spans)}."]
    never, wanted = run.phase_names[phases[-1].index + 1 :], run.settings.get("run.steps")
    if never and isinstance(wanted, int) and run.steps[-1] + 1 >= wanted:
        found.append(
            f"Phase {phases[-1].index} ({phases[-1].name}) lasted until the steps were over, so no step was trained "
            f"with {', '.join(never)}."
        )
    return found


def _success(run: RunRecords) -> str:
    pair = before_and_after(run)
    if pair is None:
        return "Whether the student improved is unknown: there is no evaluation on held-out prompts before and after."
    before, after = (f"{result.greedy.accuracy:.1%}" for result in pair)
    change = difference(*pair)
    if change is None:
        return f"Held-out accuracy was {before}, then {after}. The two were measured differently and are not compared."
    low, high = 100 * change["low"], 100 * change["high"]
    interval = f"{100 * change['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
    word = "better" if low > 0 else "worse" if high < 0 else "neither better nor worse beyond chance"
    return f"The student is {word} than before on held-out prompts: {before} to {after} ({interval})."


def _troubles(run: RunRecords) -> list[str]:
    found = []
    last = slice(len(run.steps) - max(1, len(run.steps) // WINDOW), None)
    cut = _mean(run.series("rollout/truncated")[last])
    if cut is not None and cut >= MANY_CUT:
        found.append(f"{cut:.1%} of the responses in {_span(run, last)} were cut by the token budget.")
    for metric, words in (
        ("teacher/masked_samples", "samples were left out because the teacher gave no scores for them"),
        ("rollout/masked_samples", "samples were left out because the rollout server gave no usable answer"),
    ):
        total = sum(value for value in run.series(metric) if value is not None)
        if total:
            found.append(f"{total:,.0f} {words}.")
    off = sum(1 for value in run.series("gates/sampler_off") if value)
    if off:
        found.append(f"In {off} steps, sampler and trainer differed by more than the bounds of the gate.")
    return found


def _accuracy_tile(run: RunRecords) -> Tile | None:
    pair = before_and_after(run)
    if pair is None:
        return None
    before, after = pair
    prompts = "same prompts" if before.prompts_sha256 == after.prompts_sha256 else "other prompts"
    counts = f"{before.greedy.correct} of {before.greedy.total}, then {after.greedy.correct} of {after.greedy.total}"
    value = f"{before.greedy.accuracy:.1%} → {after.greedy.accuracy:.1%}"
    return Tile("Held-out accuracy", value, f"before and after training, greedy, no prefix, {prompts}: {counts}")


def _window_tile(run: RunRecords, windows: Windows, title: str, metric: str, form: str) -> Tile | None:
    series = run.series(metric)
    end = _mean(series[windows.last])
    if end is None:
        return None
    value, where = form.format(end), _span(run, windows.last)
    begin = _mean(series[windows.first]) if windows.first is not None else None
    if begin is not None and windows.first is not None:
        value = f"{form.format(begin)} → {value}"
        where = f"{_span(run, windows.first)} → {_span(run, windows.last)}"
    return Tile(title, value, where + _prefix_words(windows, compared=begin is not None))


def _prefix_words(windows: Windows, *, compared: bool) -> str:
    """The prefix length at which a tile's numbers were measured, as text."""
    if windows.prefix is None:
        return ""
    length = f"{windows.prefix:.1f}".removesuffix(".0")
    if compared:
        return f", prefixes of about {length} tokens in both"
    words = f", prefixes of {length} tokens"
    if windows.start_prefix is None or abs(windows.start_prefix - windows.prefix) <= SAME_TOKENS:
        return words
    start = f"{windows.start_prefix:.1f}".removesuffix(".0")
    return f"{words}; not comparable with the start ({start} tokens given)"


def _speed_tile(run: RunRecords) -> Tile | None:
    values = [value for value in run.series("throughput/tokens_per_second") if value is not None]
    if not values:
        return None
    note = f"median of {len(values)} steps" if len(values) > 1 else f"step {run.steps[0]}"
    return Tile("Tokens per second", f"{statistics.median(values):,.0f}", f"{note}, prompts and prefixes included")


def _span(run: RunRecords, part: slice) -> str:
    """The steps of a window as text."""
    steps = run.steps[part]
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
