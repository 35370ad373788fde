"""Chooses the rollouts of a step that the report shows first: some by a fixed random draw, and one with many outliers.

This module does not render them (see `rollout_view`). Invariants: the draw does not depend on a rollout's content. The
same run gives the same choice. A rollout chosen for its content has a label that says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from tropd_mcore.evaluation.run_records import StepTokens

DRAWN = 2
"""Number of rollouts drawn per step."""


@dataclass(frozen=True)
class Choice:
    """The rollouts of one step, by index into its rollouts."""

    drawn: list[int]
    """Shown; chosen without regard to their content"""
    richest: int | None
    """Shown: the rollout with the most outlier tokens; None if it was drawn anyway or has none"""
    others: list[int]
    """Folded: the other rollouts with token values"""
    plain: list[int]
    """Rollouts without token values"""


def choose(tokens: StepTokens, drawn: int = DRAWN) -> Choice:
    """Return the choice for a step. Every rollout is in exactly one of its lists."""
    kept = tokens.kept
    lot = _draw(tokens, kept, drawn)
    counts = outliers(tokens)
    best = max(kept, key=lambda sample: counts[sample], default=None)
    richest = best if best is not None and counts[best] > 0 and best not in lot else None
    shown = {*lot, richest}
    return Choice(
        drawn=lot,
        richest=richest,
        others=[sample for sample in kept if sample not in shown],
        plain=[sample for sample in range(len(tokens.rollouts)) if sample not in set(kept)],
    )


def outliers(tokens: StepTokens) -> dict[int, float]:
    """Return {sample: number of tokens that were not trusted} for the samples with token values."""
    table = tokens.table
    on = table["on"].astype(bool)
    kept, sample_of_row = np.unique(table["sample_index"], return_inverse=True)
    weights = 1.0 - table["trusted"][on].astype(float)
    counts = np.bincount(sample_of_row[on], weights=weights, minlength=len(kept))
    return {int(sample): float(count) for sample, count in zip(kept, counts, strict=True)}


def _draw(tokens: StepTokens, kept: list[int], count: int) -> list[int]:
    """The first `count` of `kept` in pseudo-random order, from different prompts as far as possible."""
    ordered = sorted(kept, key=lambda sample: _lot(tokens, sample))
    first_of = {tokens.rollouts[sample].prompt_id: sample for sample in reversed(ordered)}
    firsts = [sample for sample in ordered if sample in first_of.values()]
    return [*firsts, *(sample for sample in ordered if sample not in firsts)][:count]


def _lot(tokens: StepTokens, sample: int) -> bytes:
    """A pseudo-random key that depends only on the step and the sample id."""
    return hashlib.sha256(f"{tokens.step}/{tokens.rollouts[sample].sample_id}".encode()).digest()
