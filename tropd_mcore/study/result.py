"""The file of one cell: what was run, on what, and what came out; complete enough for the page and for a repetition.

Invariants: nothing in it is computed twice: the run directory and the evaluation are copied, not interpreted. A file
is complete or absent. Numbers of curves have five significant digits and at most `POINTS` points per curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.evaluate import EvaluationResult
from tropd_mcore.evaluation.run_records import RunRecords
from tropd_mcore.files import publish_text

POINTS = 120
"""A longer curve keeps every second, third, ... step, and the last."""
CURVES = (
    "loss/total",
    "log_ratio/mean",
    "optimizer/grad_norm",
    "entropy/student",
    "entropy/teacher",
    "trust/fraction",
    "trust/tv",
    "verifier/accuracy",
    "rollout/length_mean",
)
"""Metrics that are kept, beside those of `CURVE_PREFIXES`; those that a run does not write are left out."""
CURVE_PREFIXES = ("tv/", "force/", "held_out/", "phase/")


@dataclass(frozen=True)
class Accuracy:
    """An evaluation: right answers per prompt, so that results can be paired."""

    greedy: float
    sampled: float | None
    pass_at: dict[str, float]
    truncated: float
    """Share of the greedy answers that reached the longest length"""
    greedy_correct: str
    """One digit per prompt, in the file's order: 1 = right"""
    sampled_correct: list[int]
    """Per prompt: number of right sampled answers"""
    prompts_sha256: str


@dataclass(frozen=True)
class CellResult:
    """What a cell's file holds."""

    cell: str
    group: str
    pair: str
    objective: str
    variant: str
    seed: int
    settings: list[str]
    """Overrides of the recipe, key=value"""
    config: str
    commands: list[str]
    """What was run, in order; the study's command that repeats it comes last"""
    commit: str
    modified: bool
    """Whether the checkout had changes that are in no commit"""
    machine: dict[str, str]
    finished: str
    """Date, YYYY-MM-DD"""
    steps: int
    seconds: float
    """Wall time of training, start of the processes included"""
    counts: dict[str, int]
    """Tokens over all steps: `student` = trained as its own, `prefix` = of the teacher, `total` = with prompts"""
    accuracy: Accuracy
    hints: list[str] = field(default_factory=list)
    """Lines `hint: ...` of training and evaluation"""
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    """Metric -> values at `curve_steps`"""
    curve_steps: list[int] = field(default_factory=list)
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> median and 99th percentile over all steps"""

    def save(self, path: Path) -> None:
        """Write the file. Raises DataError if it cannot."""
        publish_text(path, json.dumps(asdict(self)) + "\n", key="results")


def load_result(path: Path) -> CellResult:
    """Read what `CellResult.save` wrote. Raises DataError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return CellResult(**{**values, "accuracy": Accuracy(**values["accuracy"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: expected the result of a study's run, found {type(error).__name__}: {error}"
        ) from error


def accuracy_of(evaluation: EvaluationResult) -> Accuracy:
    """Return what a cell keeps of an evaluation."""
    return Accuracy(
        greedy=evaluation.greedy.accuracy,
        sampled=evaluation.sampled.accuracy if evaluation.sampled else None,
        pass_at=evaluation.pass_at,
        truncated=evaluation.truncated,
        greedy_correct="".join(str(int(right)) for right in evaluation.greedy_correct),
        sampled_correct=evaluation.sampled_correct,
        prompts_sha256=evaluation.prompts_sha256,
    )


def counts_of(run: RunRecords) -> dict[str, int]:
    """Return the field `counts` of a run."""
    names = ("student", "prefix", "total")
    return {name: int(sum(value or 0 for value in run.series(f"tokens/{name}"))) for name in names}


def curves_of(run: RunRecords) -> dict[str, Any]:
    """Return the fields `steps`, `curves`, `curve_steps`, `quantiles` of a run."""
    names = [name for name in run.metric_names if name in CURVES or name.startswith(CURVE_PREFIXES)]
    every = max(1, math.ceil(len(run.steps) / POINTS))
    kept = sorted({*range(0, len(run.steps), every), len(run.steps) - 1}) if run.steps else []
    return {
        "steps": len(run.steps),
        "curve_steps": [run.steps[index] for index in kept],
        "curves": {name: [_short(run.series(name)[index]) for index in kept] for name in names},
        "quantiles": {
            name: [_quantile(run.series(name), 0.5), _quantile(run.series(name), 0.99)]
            for name in ("optimizer/grad_norm",)
            if name in names
        },
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _quantile(values: Iterable[float | None], share: float) -> float:
    known = sorted(value for value in values if value is not None)
    return float(f"{known[min(len(known) - 1, int(share * len(known)))]:.5g}") if known else math.nan
