"""The form that all objectives share that reward the sampled token: an advantage, and perhaps a differentiable term.

    loss of a token = - w A log p(x) + D        on the tokens that are trained, else 0

Not for the choice of A and D (`rewards`, `verified`). Invariant: what is not trained has no influence.

Shapes: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.losses.objectives.inputs import ObjectiveOutput, TokenInputs, log_ratio, reported
from tropd_mcore.losses.policy_gradient import PolicyGradient, policy_loss


@dataclass(frozen=True)
class Reward:
    """What an objective makes of the tokens that the student sampled, [T] each; only `direct_T` is differentiable."""

    advantage_T: Tensor
    """A, without the mismatch weight"""
    value_T: Tensor
    """the objective's value, nats: what is logged"""
    trained_T: Tensor | None = None
    """bool, the tokens that are trained; None = all that the student sampled"""
    trusted_T: Tensor | None = None
    """weight with which the token's own log-ratio counts; None = 1 where trained"""
    direct_T: Tensor | None = None
    """D, nats; None = 0"""
    divergence_T: Tensor | None = None
    """the divergence to log, nats; None where there is none"""
    anchor_logp_T: Tensor | None = None
    """log of the denominator of w; None = log p_old(x)"""


def sampled_token_loss(
    inputs: TokenInputs, reward: Reward, *, policy: PolicyGradient, count_trained_only: bool = False
) -> ObjectiveOutput:
    """Sum of the loss over the tokens; `inputs` have passed `without_uncounted`.

    The denominator counts all tokens of both masks, or with `count_trained_only` those that are trained.
    """
    on_T = inputs.on_mask_T
    trained_T = on_T if reward.trained_T is None else on_T & reward.trained_T
    sampled = policy_loss(
        inputs.student_logp_T,
        torch.where(trained_T, reward.advantage_T, 0.0),
        old_logp_T=inputs.old_logp_T,
        behav_logp_T=inputs.behav_logp_T,
        policy=policy,
        anchor_logp_T=reward.anchor_logp_T,
    )
    surrogate_T = sampled.loss_T if reward.direct_T is None else sampled.loss_T + reward.direct_T
    surrogate_T = torch.where(trained_T, surrogate_T, 0.0)
    gate_T = trained_T.to(surrogate_T.dtype)
    columns = reported(
        inputs,
        trusted_T=gate_T if reward.trusted_T is None else gate_T * reward.trusted_T,
        log_ratio_T=log_ratio(inputs),
        divergence_T=gate_T * torch.nan if reward.divergence_T is None else reward.divergence_T,
        advantage_T=sampled.advantage_T,
        ratio_T=sampled.ratio_T,
        clipped_T=sampled.clipped_T,
        loss_T=torch.where(trained_T, reward.value_T, 0.0),
    )
    counted_T = trained_T if count_trained_only else on_T | inputs.off_mask_T
    return ObjectiveOutput((inputs.weight_T * surrogate_T).sum(), counted_T.sum(), columns)
