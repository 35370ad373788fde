"""From the answers of the ranks to errors and a verdict.

    loss       largest |loss - truth| of any rank, relative to the sum over tokens of |weight x loss|
    gradient   largest |entry - truth| over all entries of the whole matrix, relative to the largest |truth|; the truth
               of a padding column is 0

Tolerances: 1e-12 in float64 and 1e-5 in float32, which covers only the arithmetic of a softmax over given numbers. In
bfloat16 it is 1e-5 beyond the cost of rounding each stored number once (2^-8 of it). Stored numbers, by gradient:

    dz           the entry itself
    dH = dz W    every dz in the sum; each tensor rank's part of dH, and each addition of such parts
    dW = dz.T H  every dz in the sum. We keep dW in float32. If Megatron's own layer computes it, also its part for each
                 micro-batch

Every entry has its own bound, so that a second rounding of a larger number shows.

Shapes: T tokens, V vocabulary, W columns of all ranks, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.conformance.batch import CaseBatch
from tropd_mcore.conformance.cells import Cell
from tropd_mcore.conformance.oracle.truth import Truth
from tropd_mcore.conformance.our_loss import Answer

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-5}
"""of the arithmetic, beyond the rounding of stored numbers"""
ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8}
"""of stored numbers, to nearest"""


@dataclass(frozen=True)
class Error:
    """One number of a cell against the truth."""

    value: float
    allowed: float
    beyond_rounding: float | None = None
    """gradients: `value` after subtracting each entry's allowance for rounding; None if nothing is rounded"""
    factor: float | None = None
    """gradients: the factor that brings the truth closest to the answer (least squares)"""
    cosine: float | None = None
    """gradients: cosine with the truth"""

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return (self.value if self.beyond_rounding is None else self.beyond_rounding) <= self.allowed


def judge(answers: list[Answer], truth: Truth, batch: CaseBatch, cell: Cell, *, truncates: bool) -> dict[str, Error]:
    """Return the errors by name: loss, count (ours), and logits or hidden and weight.

    truncates: stored numbers are rounded towards zero, which costs twice as much.
    """
    allowed, tensor, columns = TOLERANCE[cell.dtype], cell.divided.tensor, cell.divided.cuts[-1]
    rounding = ROUNDING[cell.dtype] * (2.0 if truncates else 1.0)
    replicas = [answers[start : start + tensor] for start in range(0, len(answers), tensor)]
    worst = max(_absolute(answer.loss - truth.loss) for answer in answers)
    errors = {"loss": Error(worst / truth.loss_scale, allowed)}
    if answers[0].token_count is not None:
        wrong = any(answer.token_count != truth.token_count for answer in answers)
        errors["count"] = Error(float(wrong), 0.0)
    dz_TV = truth.logits_TV.abs()
    if answers[0].logits_TW is not None:
        shards = [torch.cat([_present(answer.logits_TW) for answer in replica], dim=1) for replica in replicas]
        errors["logits"] = _worst(
            shards, _padded(truth.logits_TV, columns), _padded(rounding * dz_TV, columns), allowed
        )
    if answers[0].hidden_TD is not None:
        lost_TD = rounding * (tensor + 1) * dz_TV @ batch.student.weight_WD[: batch.vocab_size].double().abs()
        whole = [_present(answer.hidden_TD) for answer in answers]
        errors["hidden"] = _worst(whole, truth.hidden_TD, lost_TD, allowed)
    if answers[0].weight_WD is not None:
        roundings = 2 if cell.divided.megatron and cell.form == "logits" else 1
        lost_VD = rounding * roundings * dz_TV.T @ batch.student.hidden_TD.double().abs()
        shards = [torch.cat([_present(answer.weight_WD) for answer in replica]) for replica in replicas]
        errors["weight"] = _worst(shards, _padded(truth.weight_VD.T, columns).T, _padded(lost_VD.T, columns).T, allowed)
    return errors


def _worst(found: list[Tensor], truth: Tensor, lost: Tensor, allowed: float) -> Error:
    errors = [_gradient_error(gradient, truth, lost, allowed) for gradient in found]
    return max(errors, key=lambda error: (not error.ok, error.value))


def _gradient_error(found: Tensor, truth: Tensor, lost: Tensor, allowed: float) -> Error:
    """`lost` is each entry's allowance for rounding."""
    size, scale = float(truth.norm()), float(truth.abs().max())
    if scale == 0.0:
        return Error(_absolute(float(found.abs().max())), allowed)
    product, found_size = float((found * truth).sum()), float(found.norm())
    difference = (found - truth).abs()
    return Error(
        value=_absolute(float(difference.max()) / scale),
        allowed=allowed,
        beyond_rounding=_absolute(float((difference - lost).clamp_min(0.0).max()) / scale) if lost.any() else None,
        factor=product / size**2,
        cosine=product / (size * found_size) if found_size > 0 else 0.0,
    )


def _padded(truth_TV: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(truth_TV, (0, columns - truth_TV.shape[1]))


def _absolute(value: float) -> float:
    """|value|; infinite for NaN."""
    return math.inf if math.isnan(value) else abs(value)


def _present(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "all ranks of a cell return the same gradients"
    return gradient
