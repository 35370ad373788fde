"""What a loss over tokens hands to the kernel that made its log-probs, and what the kernel hands to its caller."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
    """The loss of each token of a micro-batch, or of a chunk of it, [T] each."""

    loss_T: Tensor
    """differentiable: weight x surrogate loss, nats; 0 where the token is not trained"""
    counted_T: Tensor
    """bool, tokens that count in the denominator"""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """detached; which ones there are is the loss function's (`objectives.inputs.make_columns`)"""

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
    """`TokenLosses.loss_T`, differentiable; None where the gradient was made of the sum alone"""
