"""Supervised fine-tuning: the negative log-likelihood of tokens that the teacher wrote.

This module does not choose the tokens: a response of the teacher is a rollout that is all prefix. On samples of the
teacher, -log p has the gradient of KL(teacher || student), whose teacher entropy is a constant. Invariant: no number of
the teacher is read.

Shapes: T tokens.
"""

from __future__ import annotations

import torch

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised, make_columns


def sft(inputs: TokenInputs) -> TokenLosses:
    """-log p(x) on every supervised token. Source: maximum likelihood; a baseline of TrOPD, arXiv 2606.01249."""
    inputs = blank_unsupervised(inputs)
    counted_T = inputs.student_mask_T | inputs.prefix_mask_T
    loss_T = torch.where(counted_T, -inputs.student_logp_T, 0.0)
    zeros_T, unknown_T = torch.zeros_like(loss_T), torch.full_like(loss_T, torch.nan)
    columns = make_columns(
        inputs,
        trusted_T=torch.ones_like(loss_T),
        log_ratio_T=unknown_T,
        divergence_T=unknown_T,
        advantage_T=zeros_T,
        ratio_T=torch.ones_like(loss_T),
        clipped_T=zeros_T,
        loss_T=loss_T,
    )
    return TokenLosses(loss_T * inputs.weight_T, counted_T, columns)
