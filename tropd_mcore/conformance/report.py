"""The results as tables for people and as JSON for programs.

Invariant: a number in a table is the largest of its cells, and a miss is always marked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tropd_mcore.conformance.cells import DTYPES
from tropd_mcore.conformance.judge import Error
from tropd_mcore.conformance.matrix import Result

NUMBERS = ("loss", "hidden", "weight", "logits")
"""Columns of a table; `count` is shown among the misses only"""
LISTED_MISSES = 40
COLUMN = 8


def tables(results: list[Result]) -> str:
    """Return the whole report: for each subject the errors by objective and by configuration, then the misses."""
    blocks = []
    subjects = list(dict.fromkeys(result.cell.peer for result in results))
    for subject in subjects:
        mine = [result for result in results if result.cell.peer == subject]
        blocks.append(f"{subject or 'tropd_mcore'}: {_counts(mine)}")
        blocks.append("\n".join(_table("objective", mine, lambda result: result.cell.objective)))
        blocks.append("\n".join(_table("configuration", mine, lambda result: result.cell.configuration)))
        blocks.extend("\n".join(block) for block in (list(_misses(mine)), list(_not_run(mine))) if block)
    return "\n\n".join(blocks)


def as_json(results: list[Result], device: str) -> dict[str, Any]:
    """Return everything, one entry per cell; an error that is not finite is null."""
    return {
        "device": device,
        "totals": dict(Counter(result.status for result in results)),
        "cells": [
            {
                **vars(result.cell),
                "status": result.status,
                "reason": result.reason,
                "traceback": result.traceback,
                "errors": {
                    name: {key: _finite(value) for key, value in vars(error).items()}
                    for name, error in result.errors.items()
                },
            }
            for result in results
        ],
    }


def _counts(results: list[Result]) -> str:
    totals: Counter[str] = Counter(result.status for result in results)
    words = {"ok": "within tolerance", "miss": "missed", "-": "not claimed", "not run": "not run"}
    return ", ".join(f"{totals[status]} {text}" for status, text in words.items() if totals[status])


def _table(title: str, results: list[Result], row_of: Callable[[Result], str]) -> Iterator[str]:
    """Largest errors: one row per value of `row_of` with a claimed cell, one column per dtype and number."""
    columns = [
        (dtype, number)
        for dtype in DTYPES
        for number in NUMBERS
        if any(result.cell.dtype == dtype and number in result.errors for result in results)
    ]
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(row_of(result), []).append(result)
    rows = {name: mine for name, mine in rows.items() if any(result.status != "-" for result in mine)} or rows
    width = max(len(title), *(len(name) for name in rows))
    yield (
        " " * width
        + "".join(f"  {(dtype if number == NUMBERS[0] else ''):<{COLUMN}}" for dtype, number in columns).rstrip()
    )
    yield f"{title:<{width}}" + "".join(f"  {number:<{COLUMN}}" for _, number in columns).rstrip()
    for name, mine in rows.items():
        shown = (_shown([result for result in mine if result.cell.dtype == dtype], number) for dtype, number in columns)
        yield f"{name:<{width}}" + "".join(f"  {text:<{COLUMN}}" for text in shown).rstrip()


def _shown(results: list[Result], number: str) -> str:
    """The largest error, marked `!` if a cell misses; without errors a word such as `not run`."""
    errors = [result.errors[number] for result in results if number in result.errors]
    if any(result.status == "miss" and not result.errors for result in results):
        return "failed!"
    if errors:
        largest = max(error.value for error in errors)
        return f"{largest:.1e}{'' if all(error.ok for error in errors) else '!'}"
    return "not run" if any(result.status == "not run" for result in results) else "-"


def _misses(results: list[Result]) -> Iterator[str]:
    missed = [result for result in results if result.status == "miss"]
    for result in missed[:LISTED_MISSES]:
        what = "; ".join(_described(name, error) for name, error in result.errors.items() if not error.ok)
        cell = result.cell
        yield f"MISS  {cell.objective}  {cell.dtype}  {cell.configuration}: {what or result.reason}"
    if len(missed) > LISTED_MISSES:
        yield f"MISS  {len(missed) - LISTED_MISSES} more; all of them are in the JSON"


def _described(name: str, error: Error) -> str:
    if name == "count":
        return "wrong token count"
    beyond = "" if error.beyond_rounding is None else f", {error.beyond_rounding:.1e} beyond rounding,"
    text = f"{name} {error.value:.1e}{beyond} > {error.allowed:.0e}"
    if error.factor is None or error.cosine is None:
        return text
    return f"{text} ({error.factor:.3g} x the truth, cosine {error.cosine:.4f})"


def _not_run(results: list[Result]) -> Iterator[str]:
    reasons = Counter(result.reason for result in results if result.status == "not run")
    for reason, count in reasons.items():
        yield f"not run  {count} cells: {reason}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
