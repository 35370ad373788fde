"""The evaluation section of the report: accuracies with intervals, and paired differences.

This module does not evaluate (see `evaluate`). Invariant: a difference is shown only together with its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.charts import Hue, Interval, interval_chart
from tropd_mcore.evaluation.evaluate import EvaluationResult, Score, compare
from tropd_mcore.evaluation.run_records import RunRecords

BEFORE = "student before"
"""Name of the student before training on the page."""
_READING = (
    "Filled: greedy answers. Hollow: sampled answers. Bars are 95 % intervals (greedy: Wilson; sampled: normal over "
    "prompts; differences: adjusted Wald for matched pairs)."
)


def evaluation_section(runs: Sequence[RunRecords]) -> str:
    """Return the section of `runs`. If nothing was evaluated, it shows the command to run."""
    parts = "".join(f"{_heading(run, runs)}{_evaluations(run)}" for run in runs)
    return f"<section><h2>Held-out accuracy</h2>{parts}</section>"


def _heading(run: RunRecords, runs: Sequence[RunRecords]) -> str:
    return f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""


def _evaluations(run: RunRecords) -> str:
    results = _ordered(run)
    if not results:
        call = "tropd eval CONFIG --prompts HELD_OUT.jsonl --out RUN/evaluation_after.json"
        return f'<p class="note">No evaluation in this run directory; <code>{call}</code> puts one here.</p>'
    chart = interval_chart(_intervals(run, results), description="Held-out accuracy with 95 % intervals")
    differences = "".join(f"<li>{line}</li>" for line in _differences(run, results))
    return (
        f'<div class="evaluation"><figure>{chart}<p class="reading">{_READING}</p></figure>'
        f"<div>{_table(run, results)}<ul>{differences}</ul></div></div>"
    )


def before_and_after(run: RunRecords) -> tuple[EvaluationResult, EvaluationResult] | None:
    """Return the results of the student before and after training; None if one of them is missing."""
    results, after = _ordered(run), trained(run)
    before = next((result for result in results if _role(run, result) == BEFORE), None)
    return None if before is None or after is None else (before, after)


def trained(run: RunRecords) -> EvaluationResult | None:
    """Return the result of the student after training; None if there is none."""
    return next((result for result in reversed(_ordered(run)) if _role(run, result) is None), None)


def difference(before: EvaluationResult, after: EvaluationResult) -> dict[str, float] | None:
    """Return `compare(before, after)`; None if the two cannot be compared."""
    try:
        return compare(before, after)
    except DataError:
        return None


def _role(run: RunRecords, result: EvaluationResult) -> str | None:
    """The model's role in the run's configuration; None if it is not in it, such as the export."""
    start = run.launch_folder or Path.cwd()
    for name, key in ((BEFORE, "student.path"), *run.teachers):
        path = run.settings.get(key)
        if isinstance(path, str) and (start / path).resolve() == (start / result.model).resolve():
            return name
    return None


def _name(run: RunRecords, result: EvaluationResult) -> str:
    return _role(run, result) or f"student after ({Path(result.model).name})"


def _hue(run: RunRecords, result: EvaluationResult) -> Hue:
    role = _role(run, result)
    return "trusted" if role is None else "plain" if role == BEFORE else "prefix"


def _ordered(run: RunRecords) -> list[EvaluationResult]:
    """The results in the order before, after, teachers."""
    order = {BEFORE: 0, None: 1}
    return sorted(run.evaluations, key=lambda result: (order.get(_role(run, result), 2), result.model))


def _intervals(run: RunRecords, results: list[EvaluationResult]) -> list[Interval]:
    rows = []
    for result in results:
        for score, hollow in ((result.greedy, False), (result.sampled, True)):
            if score is not None:
                label = f"{_name(run, result)}{', sampled' if hollow else ''}"
                rows.append(Interval(label, score.accuracy, score.low, score.high, _hue(run, result), hollow))
    return rows


def _differences(run: RunRecords, results: list[EvaluationResult]) -> list[str]:
    """One line per model that is compared with the first."""
    lines = []
    for result in results[1:]:
        pair = f"{escape(_name(run, result))} - {escape(_name(run, results[0]))}"
        try:
            change = compare(results[0], result)
        except DataError as error:
            lines.append(f"{pair}: not comparable ({escape(str(error))})")
            continue
        lines.append(
            f"{pair}: greedy <b>{100 * change['difference']:+.1f} points</b> "
            f"[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}], paired by prompt"
        )
    return lines


def _table(run: RunRecords, results: list[EvaluationResult]) -> str:
    rows = "".join(
        f"<tr><th>{escape(_name(run, result))}</th><td>{_score(result.greedy)}</td><td>{_score(result.sampled)}</td>"
        f"<td>{result.mean_length:.1f}</td><td>{result.truncated:.1%}</td>"
        f'<td title="SHA-256 of the weights"><code>{escape(result.weights_sha256[:10])}</code></td></tr>'
        for result in results
    )
    heads = "".join(f"<th>{head}</th>" for head in ("model", "greedy", "sampled", "tokens", "cut", "weights"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _score(score: Score | None) -> str:
    if score is None:
        return "not sampled"
    counts = f"{score.correct} of {score.total}<br>[{score.low:.1%}, {score.high:.1%}]"
    return f"{score.accuracy:.1%} <small>{counts}</small>"
