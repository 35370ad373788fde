"""Which rollouts of a step the report shows first: some drawn by a fixed rule, and one that is rich in outliers.

Not for how they look (see `rollout_view`). Invariants: the draw does not look at what a rollout says; the same run
gives the same choice; a rollout that was chosen for what it is carries a label that says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from tropd_mcore.evaluation.run_records import StepTokens

DRAWN = 2
"""Rollouts of a step that are drawn."""


@dataclass(frozen=True)
class Choice:
    """The rollouts of one step, by index into its rollouts."""

    drawn: list[int]
    """Shown, without regard to what they say"""
    richest: int | None
    """Shown: the one with the most outlier tokens, where it is not drawn and has any"""
    others: list[int]
    """With token values as well, folded"""
    plain: list[int]
    """Without token values"""


def choose(tokens: StepTokens, drawn: int = DRAWN) -> Choice:
    """Return which rollouts of a step are shown; all of them are in one of the lists."""
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
    """Return {sample: number of its tokens that were not trusted}, of the samples with token values."""
    table = tokens.table
    on = table["on"].astype(bool)
    kept, sample_of_row = np.unique(table["sample_index"], return_inverse=True)
    weights = 1.0 - table["trusted"][on].astype(float)
    counts = np.bincount(sample_of_row[on], weights=weights, minlength=len(kept))
    return {int(sample): float(count) for sample, count in zip(kept, counts, strict=True)}


def _draw(tokens: StepTokens, kept: list[int], count: int) -> list[int]:
    """The first `count` of `kept` in the order of their lots, of different prompts as long as there are such."""
    ordered = sorted(kept, key=lambda sample: _lot(tokens, sample))
    first_of = {tokens.rollouts[sample].prompt_id: sample for sample in reversed(ordered)}
    firsts = [sample for sample in ordered if sample in first_of.values()]
    return [*firsts, *(sample for sample in ordered if sample not in firsts)][:count]


def _lot(tokens: StepTokens, sample: int) -> bytes:
    """A number that nothing but step and name decide."""
    return hashlib.sha256(f"{tokens.step}/{tokens.rollouts[sample].sample_id}".encode()).digest()
