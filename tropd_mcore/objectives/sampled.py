"""The common form of objectives that reward the sampled token: an advantage and an optional differentiable term.

    loss of a token = - w A log p(x) + D        on the tokens that are trained, else 0

This module does not choose A and D (`rewards`, `verified`). Invariant: a token that is not trained has no influence.

Shapes: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, log_ratio, make_columns
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient, policy_loss


@dataclass(frozen=True)
class TokenTerms:
    """The terms that an objective computes for the tokens that the student sampled, [T] each."""

    advantage_T: Tensor
    """A, without the mismatch weight"""
    value_T: Tensor
    """the objective's value, nats, for logging"""
    trained_T: Tensor | None = None
    """bool, the tokens that are trained; None = all that the student sampled"""
    trusted_T: Tensor | None = None
    """weight with which the token's own log-ratio counts; None = 1 where trained"""
    divergence_term_T: Tensor | None = None
    """D, nats, the only term with a gradient; None = 0"""
    divergence_T: Tensor | None = None
    """the divergence to log, nats; None if there is none"""
    anchor_logp_T: Tensor | None = None
    """log of the denominator of w; None = log p_old(x)"""


def sampled_token_loss(
    inputs: TokenInputs, terms: TokenTerms, *, policy: PolicyGradient, count_trained_only: bool = False
) -> TokenLosses:
    """Return the loss of each token. `inputs` must have passed `blank_unsupervised`.

    The denominator counts all tokens in either mask, or with `count_trained_only` only the trained ones.
    """
    on_T = inputs.student_mask_T
    trained_T = on_T if terms.trained_T is None else on_T & terms.trained_T
    sampled = policy_loss(
        inputs.student_logp_T,
        torch.where(trained_T, terms.advantage_T, 0.0),
        old_logp_T=inputs.old_logp_T,
        rollout_logp_T=inputs.rollout_logp_T,
        policy=policy,
        anchor_logp_T=terms.anchor_logp_T,
    )
    surrogate_T = sampled.loss_T if terms.divergence_term_T is None else sampled.loss_T + terms.divergence_term_T
    surrogate_T = torch.where(trained_T, surrogate_T, 0.0)
    gate_T = trained_T.to(surrogate_T.dtype)
    columns = make_columns(
        inputs,
        trusted_T=gate_T if terms.trusted_T is None else gate_T * terms.trusted_T,
        log_ratio_T=log_ratio(inputs),
        divergence_T=gate_T * torch.nan if terms.divergence_T is None else terms.divergence_T,
        advantage_T=sampled.advantage_T,
        ratio_T=sampled.ratio_T,
        clipped_T=sampled.clipped_T,
        loss_T=torch.where(trained_T, terms.value_T, 0.0),
    )
    counted_T = trained_T if count_trained_only else on_T | inputs.prefix_mask_T
    return TokenLosses(inputs.weight_T * surrogate_T, counted_T, columns)
