"""The data of one step from which metrics are computed, and the token sets that metrics are taken over.

This module does not compute metrics (see `catalogue`). Invariant: a record describes the whole step over all ranks. It
exists on rank 0 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tropd_mcore.config.objectives.base import PolicyGradientConfig
from tropd_mcore.types import HeldOutDistance, OptimizerReport, Rollout, TokenTable

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Described:
    """What a metric is. `over` names the tokens or samples that a mean, a fraction or a quantile is taken over."""

    name: str
    unit: str
    over: str
    description: str


@dataclass(frozen=True)
class GateState:
    """Result of the comparison of sampler and trainer up to a step (`train.gates`)."""

    p99_bound: float
    """Bound on the 99th percentile of |sampler - trainer log-prob|, in nats."""
    off_in_a_row: int
    """Number of consecutive steps, up to this one, whose mean, 99th percentile or share was above its bound."""
    warnings: int
    """Number of steps of the launch whose maximum was above its bound."""


@dataclass(frozen=True)
class StepRecord:
    """One step. `table` has the rows of all ranks. Its `sample_index` is an index into `rollouts`."""

    table: TokenTable
    rollouts: Sequence[Rollout]
    updates: Sequence[OptimizerReport]
    """One report for each mini-batch of each epoch, in order. If no token counted, it has no optimizer step."""
    alpha: float
    """Fraction of a teacher response that is used as prefix, in [0, 1]."""
    timings: Mapping[str, float]
    """Seconds per phase. `step` is the whole step."""
    accuracy: float | None = None
    """Fraction of the judged samples whose answer is correct; None if no sample was judged."""
    unfinished: float | None = None
    """Fraction of the judged samples without an answer, because they were cut or still thinking; None if no sample was
    judged."""
    masked_rollouts: int = 0
    """Number of samples for which the rollout server returned no usable result when the step was sampled."""
    special_ids: frozenset[int] = frozenset()
    """Ids of the tokenizer's special tokens."""
    policy_gradient: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    held_out: HeldOutDistance | None = None
    """None at steps without a measurement."""
    sampler_gate: GateState | None = None
    """None if gates.sampler_logprob is off."""
    phase: int | None = None
    """Place of the step's phase in objective.phases; None if the run has no phases."""
    teachers: tuple[str, ...] = ()
    """Names of the teachers; none in a run with one teacher."""

    @property
    def made(self) -> list[OptimizerReport]:
        """The optimizer steps that were made."""
        return [update for update in self.updates if update.made]

    @cached_property
    def student(self) -> Region:
        """Tokens that the student sampled and the teacher scored, each with weight 1, as the first epoch saw them."""
        return self._region("on", epochs=1)

    @cached_property
    def updated(self) -> Region:
        """The same tokens, once for each update that used them."""
        return self._region("on", epochs=None)

    @cached_property
    def prefix(self) -> Region:
        """Teacher-prefix tokens that carry a loss, each with weight 1, as the first epoch saw them."""
        return self._region("off", epochs=1)

    @cached_property
    def trusted(self) -> Region:
        """Student tokens weighted by trust: 0 or 1, or in between for the soft gate."""
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

    def of_teacher(self, rows: Region, name: str) -> Region:
        """Return those of `rows` whose sample has this teacher."""
        mine = np.array([rollout.teacher == name for rollout in self.rollouts], dtype=np.float64)
        return rows.weighted(mine[rows["sample_index"].astype(np.int64)])

    def _region(self, mask: str, *, epochs: int | None) -> Region:
        """Rows of `mask` in the first `epochs` epochs; in all epochs if `epochs` is None."""
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
    """Rows of the table, each with a weight. All statistics leave out rows of weight 0 and values that are NaN."""

    columns: Mapping[str, npt.NDArray[np.generic]]
    """The whole table."""
    rows: npt.NDArray[np.int64]
    weights: Values
    _read: dict[str, Values] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Values:
        """One column as float64; all NaN if the step has no such column."""
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
        """The same rows with these weights, without those of weight 0."""
        kept = weights > 0
        return Region(self.columns, self.rows[kept], weights[kept])

    def mean(self, values: Values) -> float:
        """Weighted mean; NaN if no value is left."""
        known = ~np.isnan(values)
        total = self.weights[known].sum()
        return float(values[known] @ self.weights[known] / total) if total > 0 else float("nan")

    def quantile(self, values: Values, fraction: float) -> float:
        """Quantile over rows, ignoring weights; NaN if no value is left. 0 is the minimum, 1 the maximum."""
        known = values[~np.isnan(values)]
        if not len(known):
            return float("nan")
        if fraction in (0.0, 1.0):
            return float(known.min() if fraction == 0.0 else known.max())
        return float(np.quantile(known, fraction))
