"""Numbers that a token's loss takes from other tokens: of its sample, of its prompt's samples, of the whole batch.

They are computed once per step, before the first update, on the host, from all rows of all ranks. An objective sees the
result as `selected_T`, `advantage_T` or `history_weight_T` of `TokenInputs`. Invariants: pure functions in float64; the
result does not depend on the order of the rows; rows outside the on mask get 0 and are ignored; a degenerate group has
advantage 0, never NaN.

Shapes: T rows of the whole batch, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NO_SPREAD = 1e-6
"""Values with a standard deviation up to this are taken as equal: the rounding (nats) of float32 log-probs."""


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch in any order, with the prompt and reward of each sample."""

    sample_index_T: Integers
    """the sample of each row, in [0, S)"""
    token_index_T: Integers
    """position of the predicted token in its sample"""
    on_T: npt.NDArray[np.bool_]
    """sampled by the student, and scored by the teacher"""
    student_entropy_T: Floats
    """nats, before the update"""
    old_logp_T: Floats
    """log p(x) before the update"""
    rollout_logp_T: Floats
    """log p(x) as the rollout engine reported it"""
    teacher_logp_T: Floats
    """log q(x)"""
    prompt_index_S: Integers
    """samples of the same prompt have the same number"""
    reward_S: Floats
    """the verifier's verdict, 1 or 0; NaN if there is none"""


Statistic = Callable[[BatchRows], Floats]
"""One number per row, [T]."""


class Wanted(Protocol):
    """The name of a statistic of this module, and its constants (`config.objectives.base.BatchStatistic`)."""

    @property
    def name(self) -> str: ...

    @property
    def constants(self) -> Mapping[str, Any]: ...


class Wants(Protocol):
    """A section of the configuration that may want a statistic."""

    def statistic(self, progress: float) -> Wanted | None: ...


def statistic_of(objective: Wants, progress: float) -> Statistic | None:
    """Return the statistic that `objective` wants at `progress` = step / run.steps; None if it wants none."""
    wanted = objective.statistic(progress)
    return None if wanted is None else partial(globals()[wanted.name], **wanted.constants)


def most_uncertain(rows: BatchRows, *, fraction: float) -> Floats:
    """1 for the `fraction` of the on rows with the highest student entropy, else 0.

    Their number is `fraction` of the on rows, rounded, and at least 1. Ties are broken by (sample, token).
    Source: TrOPD, Entropy OPD; REOPOLD eq. 8.
    """
    selected_T = np.zeros(len(rows.on_T))
    on = _on_rows(rows)
    order = on[np.argsort(-rows.student_entropy_T[on], kind="stable")]
    selected_T[order[: max(1, round(fraction * len(on)))]] = 1.0
    return selected_T


def mixed_return(rows: BatchRows, *, mixing: float, future_mean: bool, normalise: bool) -> Floats:
    """TOP-D's advantage: the mixed log-ratio plus its mean over the later tokens, normalised over the group.

    With rho = q / p and m_t = log(alpha rho + 1 - alpha), alpha = `mixing`: R_t = m_t + mean of m_s over the later
    tokens s of the sample (0 after the last), if `future_mean`. `normalise` subtracts the mean and divides by the
    standard deviation of R over all tokens of the prompt's samples. Source: TOP-D.
    """
    log_ratio_T = _gap(rows, rows.old_logp_T)
    mixed_T = np.logaddexp(math.log(mixing) + log_ratio_T, math.log1p(-mixing))
    return_T = np.zeros(len(rows.on_T))
    on = _on_rows(rows)
    for sample in _groups(on, rows.sample_index_T):
        mixed = mixed_T[sample]
        return_T[sample] = mixed + _mean_of_later(mixed) if future_mean else mixed
    if normalise:
        for group in _groups(on, rows.prompt_index_S[rows.sample_index_T]):
            return_T[group] = _standardised(return_T[group])
    return return_T


def history_weight(rows: BatchRows, *, gamma: float) -> Floats:
    """IW-OPD's weight 1 + gamma (1 - sum over s < t of |A_s| / sum over s of |A_s|), A = log q - log p_sampler.

    The sums are over the on rows s of the token's sample. The weight falls from 1 + gamma at its first token towards 1.
    Source: IW-OPD.
    """
    weight_T = np.zeros(len(rows.on_T))
    magnitude_T = np.abs(_gap(rows, rows.rollout_logp_T))
    for sample in _groups(_on_rows(rows), rows.sample_index_T):
        magnitude = magnitude_T[sample]
        before = np.cumsum(magnitude) - magnitude
        total = magnitude.sum()
        weight_T[sample] = 1.0 + gamma * (1.0 - (before / total if total > 0 else 0.0))
    return weight_T


def group_advantage(rows: BatchRows) -> Floats:
    """GRPO's advantage of a row's sample: its reward minus the group's mean, over the group's standard deviation.

    The group is all samples of the prompt with a verdict; a sample without one has advantage 0. The standard deviation
    is that of the population. Source: GRPO (DeepSeekMath).
    """
    advantage_S = np.zeros(len(rows.reward_S))
    for group in _groups(np.flatnonzero(~np.isnan(rows.reward_S)), rows.prompt_index_S):
        advantage_S[group] = _standardised(rows.reward_S[group])
    return np.where(rows.on_T, advantage_S[rows.sample_index_T], 0.0)


def _gap(rows: BatchRows, student_logp_T: Floats) -> Floats:
    """log q(x) - log p(x) of the on rows, 0 elsewhere."""
    return np.subtract(rows.teacher_logp_T, student_logp_T, out=np.zeros(len(rows.on_T)), where=rows.on_T)


def _on_rows(rows: BatchRows) -> Integers:
    """Indices of the on rows by (sample, token), so that the order of sums does not depend on the order of the rows."""
    on = np.flatnonzero(rows.on_T)
    return on[np.lexsort((rows.token_index_T[on], rows.sample_index_T[on]))]


def _groups(indices: Integers, key: Integers) -> Iterator[Integers]:
    """Yield `indices` grouped by their key, each group in the order given; nothing if there are no indices."""
    if len(indices):
        ordered = indices[np.argsort(key[indices], kind="stable")]
        yield from np.split(ordered, np.flatnonzero(np.diff(key[ordered])) + 1)


def _mean_of_later(values: Floats) -> Floats:
    """For each entry the mean of all later entries; 0 for the last."""
    later = np.cumsum(values[::-1])[::-1] - values
    count = np.arange(len(values) - 1, -1, -1)
    return later / np.maximum(count, 1) * (count > 0)


def _standardised(values: Floats) -> Floats:
    """(values - mean) / standard deviation; zeros if all values are equal, as for a single value."""
    centred = values - values.mean()
    spread = math.sqrt(float(np.mean(centred**2)))
    if spread <= NO_SPREAD:
        return np.zeros_like(values)
    return centred / spread
