"""From an advantage to a loss: the score-function form, its importance ratio, PPO's clip.

This module does not choose the advantage (`objectives`). Invariant: advantage and mismatch weight are constants;
gradients flow through log p(x) only.

Shapes: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.objectives.catalogue import PolicyGradient
from tropd_mcore.objectives.parts.mismatch import LOG_RATIO_LIMIT, mismatch_weight


@dataclass(frozen=True)
class PolicyLoss:
    """One entry per token in each field; only the first is differentiable."""

    loss_T: Tensor
    """surrogate, nats"""
    ratio_T: Tensor
    """w; 1 if no ratio is used"""
    clipped_T: Tensor
    """1 if a clip makes the gradient 0, else 0"""
    advantage_T: Tensor
    """A times the mismatch weight"""


def policy_loss(
    student_logp_T: Tensor,
    advantage_T: Tensor,
    *,
    old_logp_T: Tensor,
    rollout_logp_T: Tensor,
    policy: PolicyGradient,
    anchor_logp_T: Tensor | None = None,
) -> PolicyLoss:
    """Return the loss whose gradient is that of minus the expected advantage, for tokens sampled before the update.

    With the mismatch weight c (of p_old to the sampler's p) and w = p / p_old:

        none         -c A log p
        importance   -c A w
        ppo_clip     max(-w c A, -clip(w, 1 - clip_low, 1 + clip_high) c A), and if A < 0 at most -dual_clip c A

    At p = p_old all three have the same gradient, -c A grad log p. `anchor_logp_T` replaces log p_old in w, but not in
    c. Every operation is elementwise, so tensors may have any shape.
    Source: PPO (Schulman et al.); dual clip (Ye et al.).
    """
    engine_T = engine_weight(old_logp_T, rollout_logp_T, policy)
    # `where`, because a weight of 0 must drop the token even if its reward is infinite.
    advantage_T = torch.where(engine_T > 0, engine_T * advantage_T.detach(), 0.0)
    one_T, never_T = torch.ones_like(advantage_T), torch.zeros_like(advantage_T)
    if policy.ratio == "none":
        return PolicyLoss(-advantage_T * student_logp_T, one_T, never_T, advantage_T)
    anchor_logp_T = (old_logp_T if anchor_logp_T is None else anchor_logp_T).detach()
    ratio_T = (student_logp_T - anchor_logp_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if policy.ratio == "importance":
        return PolicyLoss(-ratio_T * advantage_T, ratio_T.detach(), never_T, advantage_T)
    assert policy.ratio == "ppo_clip", f"unknown ratio {policy.ratio!r}"
    loss_T, clipped_T = _clipped_surrogate(ratio_T, advantage_T, policy)
    return PolicyLoss(loss_T, ratio_T.detach(), clipped_T.to(advantage_T.dtype), advantage_T)


def engine_weight(old_logp_T: Tensor, rollout_logp_T: Tensor, policy: PolicyGradient) -> Tensor:
    """`mismatch_weight` with the constants of `policy`."""
    return mismatch_weight(
        old_logp_T,
        rollout_logp_T,
        mode=policy.mismatch,
        tis_cap=policy.tis_cap,
        icepop_low=policy.icepop_low,
        icepop_high=policy.icepop_high,
        mask_below=policy.mask_below,
    )


def _clipped_surrogate(ratio_T: Tensor, advantage_T: Tensor, policy: PolicyGradient) -> tuple[Tensor, Tensor]:
    """PPO's surrogate with the dual clip, [T], and bool [T]: whether one of the two clips holds it constant."""
    # PPO: -min(w A, clip(w) A) = max(free, held). Dual clip: for A < 0, where free grows without bound in w, at most
    # -dual_clip A. The gradient is 0 wherever a bound is taken instead of `free`.
    free_T = -ratio_T * advantage_T
    held_T = -ratio_T.clamp(1.0 - policy.clip_low, 1.0 + policy.clip_high) * advantage_T
    loss_T = torch.maximum(free_T, held_T)
    clipped_T = held_T.detach() > free_T.detach()
    if policy.dual_clip is not None:
        bound_T = -policy.dual_clip * advantage_T
        beyond_T = (advantage_T < 0) & (loss_T.detach() > bound_T)
        loss_T = torch.where(beyond_T, bound_T, loss_T)
        clipped_T = clipped_T | beyond_T
    return loss_T, clipped_T


def clipped_reward(log_ratio_T: Tensor, bound: float | None) -> Tensor:
    """The log-ratio clamped to [-bound, bound] nats; unchanged if the bound is None."""
    return log_ratio_T if bound is None else log_ratio_T.clamp(-bound, bound)
