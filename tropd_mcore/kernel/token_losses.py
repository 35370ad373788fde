"""The result of a loss over tokens: per token, as an objective returns it, and summed, as the kernel returns it.

Nothing is divided here. The mean is loss_sum / token_count over the whole batch, which only the caller knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
    """The loss of each token of a micro-batch or of one chunk of it, [T] each."""

    loss_T: Tensor
    """differentiable: weight x surrogate loss, nats; 0 if the token is not trained"""
    counted_T: Tensor
    """bool, tokens that count in the denominator"""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """detached; the loss function chooses the names (`objectives.inputs.make_columns`)"""

    @property
    def loss_sum(self) -> Tensor:
        """scalar"""
        return self.loss_T.sum()

    @property
    def token_count(self) -> Tensor:
        """scalar int64"""
        return self.counted_T.sum()


@dataclass(frozen=True)
class SummedLoss:
    """The loss of all tokens; the caller divides by the count of the whole batch."""

    loss_sum: Tensor
    """scalar, nats, differentiable"""
    token_count: Tensor
    """scalar int64"""
    columns: dict[str, Tensor]
    """[T] each, detached"""
    loss_T: Tensor | None = None
    """`TokenLosses.loss_T`, differentiable; None if only the gradient of the sum was computed"""
