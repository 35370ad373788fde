"""The two building blocks of every loss, as objectives: the log-prob of the sampled token, and the entropy.

They test a vocabulary-parallel kernel without an objective's own formula, and are examples of a custom objective
(`objective.kind: custom`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, make_columns


def negative_log_prob(inputs: TokenInputs) -> TokenLosses:
    """-log p(x) on the tokens in either mask."""
    return _summed(inputs, -inputs.student_logp_T)


def negative_entropy(inputs: TokenInputs) -> TokenLosses:
    """sum_v p log p on the tokens in either mask."""
    return _summed(inputs, -inputs.student_entropy_T)


def _summed(inputs: TokenInputs, loss_T: Tensor) -> TokenLosses:
    counted_T = inputs.student_mask_T | inputs.prefix_mask_T
    loss_T = torch.where(counted_T, loss_T, 0.0)
    none_T = torch.zeros_like(loss_T)
    columns = make_columns(
        inputs,
        trusted_T=none_T,
        log_ratio_T=none_T,
        divergence_T=none_T,
        advantage_T=none_T,
        ratio_T=none_T,
        clipped_T=none_T,
        loss_T=loss_T,
    )
    return TokenLosses(inputs.weight_T * loss_T, counted_T, columns)
