"""What a loss over tokens hands to the kernel that made its log-probs: a sum, a count, and numbers per token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
    """Summed over the tokens of a micro-batch or of a chunk of it; the caller divides by the count of the whole batch.

    Sums and counts of chunks add up to those of the micro-batch, columns are joined.
    """

    loss_sum: Tensor
    """scalar, differentiable: sum over tokens of weight x surrogate loss"""
    token_count: Tensor
    """scalar int64: tokens that count in the denominator"""
    columns: dict[str, Tensor]
    """[T] each, detached; which ones there are is the loss function's (`objectives.inputs.make_columns`)"""
