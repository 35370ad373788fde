"""What one step leaves behind for the metrics, and the parts of it that metrics are taken over.

Not for metrics themselves (see `catalogue`). Invariant: a record describes the whole step over all ranks; it exists on
rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tropd_mcore.config.objectives.base import PolicyGradientConfig
from tropd_mcore.types import OptimizerReport, Rollout, TokenTable

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GateState:
    """What the comparison of sampler and trainer has found up to a step (`train.gates`)."""

    p99_bound: float
    """Nats; the bound on the 99th percentile of |sampler - trainer|."""
    off_in_a_row: int
    """Steps in a row, up to this one, whose mean, 99th percentile or share was above its bound."""
    warnings: int
    """Steps of the launch whose maximum was above its bound."""


@dataclass(frozen=True)
class StepRecord:
    """One step as it happened. `table` has the rows of all ranks; `rollouts` are indexed by its `sample_index`."""

    table: TokenTable
    rollouts: Sequence[Rollout]
    updates: Sequence[OptimizerReport]
    """One for each part of the batch and epoch, in order; without an optimizer step where no token counted."""
    alpha: float
    """Guided fraction of the teacher responses, in [0, 1]."""
    timings: Mapping[str, float]
    """Seconds by phase; `step` is the whole step."""
    accuracy: float | None = None
    """Fraction of the judged samples whose answer is right; None where nothing was judged."""
    unfinished: float | None = None
    """Fraction of the judged samples that had no answer because they were cut or still thinking; None likewise."""
    masked_rollouts: int = 0
    """Samples that the rollout server gave no usable answer for, when the step was sampled."""
    special_ids: frozenset[int] = frozenset()
    """Ids of the tokenizer's special tokens."""
    policy_gradient: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    sampler_gate: GateState | None = None
    """None where gates.sampler_logprob is off."""

    @property
    def made(self) -> list[OptimizerReport]:
        """The optimizer steps."""
        return [update for update in self.updates if update.made]

    @cached_property
    def student(self) -> Region:
        """Tokens the student sampled and the teacher scored, each with weight 1, as the first epoch saw them."""
        return self._region("on", epochs=1)

    @cached_property
    def updated(self) -> Region:
        """The same tokens once for each update that looked at them."""
        return self._region("on", epochs=None)

    @cached_property
    def prefix(self) -> Region:
        """Teacher-prefix tokens that carry a loss, each with weight 1, as the first epoch saw them."""
        return self._region("off", epochs=1)

    @cached_property
    def trusted(self) -> Region:
        """Student tokens weighted by trust (0 or 1; in between for the soft gate)."""
        return self.student.weighted(self.student["trusted"])

    @cached_property
    def outlier(self) -> Region:
        """Student tokens weighted by distrust."""
        return self.student.weighted(1.0 - self.student["trusted"])

    @cached_property
    def special(self) -> Region:
        """Student tokens that are special tokens of the vocabulary."""
        lengths = [len(rollout.token_ids) for rollout in self.rollouts]
        first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = np.concatenate([rollout.token_ids for rollout in self.rollouts]) if lengths else np.zeros(0, np.int32)
        rows = first[self.student["sample_index"].astype(np.int64)] + self.student["token_index"].astype(np.int64)
        return self.student.weighted(np.isin(ids[rows], list(self.special_ids)).astype(np.float64))

    def _region(self, mask: str, *, epochs: int | None) -> Region:
        """Rows of `mask` in the first `epochs` epochs, or in all."""
        columns = self.table.columns
        if mask not in columns:
            return Region(columns, np.zeros(0, dtype=np.int64), np.zeros(0))
        chosen = columns[mask].astype(bool)
        if epochs is not None:
            chosen = chosen & (columns["epoch"].astype(np.int64) < epochs)
        rows = np.flatnonzero(chosen)
        return Region(columns, rows, np.ones(len(rows)))


@dataclass(frozen=True)
class Region:
    """Rows of the table with a weight each. All statistics leave out rows of weight 0 and values that are NaN."""

    columns: Mapping[str, npt.NDArray[np.generic]]
    """The whole table."""
    rows: npt.NDArray[np.int64]
    weights: Values
    _read: dict[str, Values] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Values:
        """One column as float64; NaN throughout where the step has no such column."""
        if name not in self._read:
            known = name in self.columns
            self._read[name] = (
                self.columns[name][self.rows].astype(np.float64) if known else np.full(len(self.rows), np.nan)
            )
        return self._read[name]

    @property
    def size(self) -> float:
        """Sum of the weights."""
        return float(self.weights.sum())

    def weighted(self, weights: Values) -> Region:
        """The rows whose weight is not 0."""
        kept = weights > 0
        return Region(self.columns, self.rows[kept], weights[kept])

    def mean(self, values: Values) -> float:
        """Weighted mean; NaN where nothing is left."""
        known = ~np.isnan(values)
        total = self.weights[known].sum()
        return float(values[known] @ self.weights[known] / total) if total > 0 else float("nan")

    def quantile(self, values: Values, fraction: float) -> float:
        """Quantile over rows (weights not counted); NaN where nothing is left. 0 is the minimum, 1 the maximum."""
        known = values[~np.isnan(values)]
        if not len(known):
            return float("nan")
        if fraction in (0.0, 1.0):
            return float(known.min() if fraction == 0.0 else known.max())
        return float(np.quantile(known, fraction))
