"""Objectives that reward the sampled token with a function of the log-probs of student, teacher and others.

p is the student, q the teacher, x the sampled token, r = log q(x) - log p(x) of the student before the update. All use
`sampled_token_loss` without a differentiable term:

                 advantage A                                            trained
    reopold      max(r, floor)                                          all; r >= floor; the batch's most uncertain
    entropy_opd  r                                                      the batch's most uncertain
    exopd        scale (log q - log ref) - (log p - log ref)            all
    topd         log(alpha q/p + 1 - alpha), future mean, normalised    all
    vopd         r + KL(p || q) on the student's top tokens             all
    iw_opd       h (log q - log p_sampler), h the history weight        all
    power_opd    q^a - p^a                                              all

Numbers that depend on other tokens arrive as `selected_T`, `advantage_T` or `history_weight_T`
(`parts.batch_statistics`). `advantage_clip` = c clamps log-ratios to [-c, c]: r, the reward of `exopd`, and
log q - log p_sampler. It never clamps a baseline or a weight.

Shapes: T tokens, L student top-k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised, log_ratio
from tropd_mcore.objectives.parts.divergences import topk_reverse_kl
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient, clipped_reward
from tropd_mcore.objectives.sampled import TokenTerms, sampled_token_loss


def reopold(inputs: TokenInputs, *, floor: float, train: str, policy: PolicyGradient) -> TokenLosses:
    """Relaxed OPD: the log-ratio floored at `floor` nats, A = max(r, floor).

    train: `all` (one stage, Clip Outlier of TrOPD's tables), `above_floor` (phase I: tokens with r >= floor) or
    `selected` (phase II: tokens whose `selected_T` is not 0). The phases divide by the number of trained tokens.
    Source: REOPOLD eq. 4, 7 and 8.
    """
    inputs = blank_unsupervised(inputs)
    log_ratio_T = log_ratio(inputs)
    above_T = log_ratio_T >= floor
    trained_T = {"all": inputs.student_mask_T, "above_floor": above_T, "selected": inputs.selected_T != 0}[train]
    advantage_T = clipped_reward(log_ratio_T, policy.advantage_clip).clamp_min(floor)
    terms = TokenTerms(advantage_T, -advantage_T, trained_T=trained_T, trusted_T=above_T.to(advantage_T.dtype))
    return sampled_token_loss(inputs, terms, policy=policy, count_trained_only=train != "all")


def entropy_opd(inputs: TokenInputs, *, denominator: str, policy: PolicyGradient) -> TokenLosses:
    """OPD (A = r) on the tokens whose `selected_T` is not 0: those with the highest student entropy.

    denominator: `selected` (the trained tokens) or `all`. Source: TrOPD, Entropy OPD.
    """
    inputs = blank_unsupervised(inputs)
    advantage_T = clipped_reward(log_ratio(inputs), policy.advantage_clip)
    terms = TokenTerms(advantage_T, -advantage_T, trained_T=inputs.selected_T != 0)
    return sampled_token_loss(inputs, terms, policy=policy, count_trained_only=denominator == "selected")


def exopd(inputs: TokenInputs, *, scale: float, policy: PolicyGradient) -> TokenLosses:
    """G-OPD: A = scale (log q - log ref) - (log p - log ref). Scale 1 is OPD; above 1 it extrapolates past the teacher.

    Source: G-OPD / ExOPD.
    """
    inputs = blank_unsupervised(inputs)
    teacher_T = inputs.teacher_logp_T - inputs.reference_logp_T
    student_T = inputs.old_logp_T - inputs.reference_logp_T
    advantage_T = clipped_reward(scale * teacher_T - student_T, policy.advantage_clip)
    return sampled_token_loss(inputs, TokenTerms(advantage_T, -advantage_T), policy=policy)


def topd(inputs: TokenInputs, *, mixing: float, policy: PolicyGradient) -> TokenLosses:
    """TOP-D: `advantage_T` is the advantage. The value is minus the mixed log-ratio from which it was computed.

    Source: TOP-D.
    """
    inputs = blank_unsupervised(inputs)
    value_T = -mixed_log_ratio(log_ratio(inputs), mixing)
    return sampled_token_loss(inputs, TokenTerms(inputs.advantage_T, value_T), policy=policy)


def mixed_log_ratio(log_ratio_T: Tensor, mixing: float) -> Tensor:
    """log(alpha rho + 1 - alpha) with rho = e^r and alpha = `mixing`, nats; never below log(1 - alpha)."""
    rest_T = torch.full_like(log_ratio_T, math.log1p(-mixing))
    return torch.logaddexp(log_ratio_T + math.log(mixing), rest_T)


def vopd(inputs: TokenInputs, *, policy: PolicyGradient) -> TokenLosses:
    """OPD with a baseline per state: A = r + KL(p~ || q~), p~ and q~ renormalised on the student's top tokens.

    The baseline does not depend on x, so the expected gradient is that of OPD. The value is -r. Source: vOPD.
    """
    inputs = blank_unsupervised(inputs)
    log_ratio_T = log_ratio(inputs)
    baseline_T = topk_reverse_kl(inputs.old_own_logp_TL, inputs.teacher_own_logp_TL, norm="renorm")
    advantage_T = clipped_reward(log_ratio_T, policy.advantage_clip) + baseline_T
    return sampled_token_loss(inputs, TokenTerms(advantage_T, -log_ratio_T, divergence_T=baseline_T), policy=policy)


def iw_opd(inputs: TokenInputs, *, policy: PolicyGradient) -> TokenLosses:
    """OPD with more weight on early tokens: A = h (log q - log p_sampler), h >= 1 being `history_weight_T`.

    Source: IW-OPD.
    """
    inputs = blank_unsupervised(inputs)
    gap_T = clipped_reward(inputs.teacher_logp_T - inputs.rollout_logp_T, policy.advantage_clip)
    advantage_T = inputs.history_weight_T * gap_T
    return sampled_token_loss(inputs, TokenTerms(advantage_T, -advantage_T), policy=policy)


def power_opd(inputs: TokenInputs, *, power: float, policy: PolicyGradient) -> TokenLosses:
    """A = q^a - p^a with a = `power`, in [-1, 1]; A / a tends to r as a tends to 0. Source: PowerOPD."""
    inputs = blank_unsupervised(inputs)
    advantage_T = (power * inputs.teacher_logp_T).exp() - (power * inputs.old_logp_T).exp()
    return sampled_token_loss(inputs, TokenTerms(advantage_T, -advantage_T), policy=policy)
