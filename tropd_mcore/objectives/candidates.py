"""Objectives with a policy gradient on several candidates per state instead of the sampled token alone.

p is the student, q the teacher, v a candidate; log-probs are over the whole vocabulary.

Shapes: T tokens, K teacher top-k, L student top-k, J = L + K candidate slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised, log_ratio, make_columns
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient, clipped_reward, policy_loss
from tropd_mcore.sentinels import ABSENT


def rethinking(inputs: TokenInputs, *, support: str, policy: PolicyGradient) -> TokenLosses:
    """Policy gradient on every candidate v of the state: A_v = -w_v (log p_v - log q_v), summed over the candidates.

    w_v is the student's probability renormalised on the support, A_v a constant, both of the student before the update.
    support: top-k of the `student`, of the `teacher`, their `intersection`, `union` or `xor` (in one of the two only).
    Without a candidate the loss is 0. Each candidate has its own ratio and clip. Candidates are enumerated, not
    sampled, so there is no mismatch weight. On the whole vocabulary the gradient is that of KL(p || q).

    The columns have sums over the candidates: A_v, w_v ratio_v and w_v clipped_v. Source: Rethinking OPD.
    """
    # L = -sum_v w_v (log q_v - log p_old,v) log p_v, or with p_v / p_old,v in place of log p_v (`policy_loss`). On the
    # whole vocabulary w = p_old, and at p = p_old the gradient is sum_v p_v (log p_v - log q_v) grad log p_v.
    inputs = blank_unsupervised(inputs)
    candidates = _candidates(inputs, support)
    present_TJ = candidates.present_TJ & inputs.student_mask_T[:, None]
    old_TJ = candidates.old_TJ.masked_fill(~present_TJ, 0.0)
    mass_TJ = old_TJ.exp().masked_fill(~present_TJ, 0.0)
    weight_TJ = mass_TJ / mass_TJ.sum(dim=1, keepdim=True).clamp_min(torch.finfo(mass_TJ.dtype).tiny)
    gap_TJ = (candidates.teacher_TJ - old_TJ).masked_fill(~present_TJ, 0.0)
    surrogate = policy_loss(
        candidates.student_TJ.masked_fill(~present_TJ, 0.0),
        weight_TJ * clipped_reward(gap_TJ, policy.advantage_clip),
        old_logp_T=old_TJ,
        rollout_logp_T=old_TJ,
        policy=policy,
    )
    advantage_T = surrogate.advantage_T.sum(dim=1)
    columns = make_columns(
        inputs,
        trusted_T=torch.ones_like(advantage_T),
        log_ratio_T=log_ratio(inputs),
        divergence_T=-(weight_TJ * gap_TJ).sum(dim=1),
        advantage_T=advantage_T,
        ratio_T=(weight_TJ * surrogate.ratio_T).sum(dim=1),
        clipped_T=(weight_TJ * surrogate.clipped_T).sum(dim=1),
        loss_T=-advantage_T,
    )
    counted_T = inputs.student_mask_T | inputs.prefix_mask_T
    return TokenLosses(inputs.weight_T * surrogate.loss_T.sum(dim=1), counted_T, columns)


@dataclass(frozen=True)
class _Candidates:
    """Slots [T, J] of the student's and then of the teacher's candidates; only `student_TJ` is differentiable."""

    student_TJ: Tensor
    old_TJ: Tensor
    teacher_TJ: Tensor
    present_TJ: Tensor
    """bool, the slot is in the support; a token that both have is in the student's slot only"""


def _candidates(inputs: TokenInputs, support: str) -> _Candidates:
    """The slots of the support.

    The log-prob before the update of a candidate that only the teacher has is not kept. The current one is used, so its
    ratio is 1. With one update per rollout batch, which `config.objective_checks` requires, the two are equal.
    """
    own_TL = inputs.teacher_own_logp_TL != ABSENT
    teacher_TK = inputs.teacher_topk_logp_TK != ABSENT
    same_TLK = (inputs.own_ids_TL[:, :, None] == inputs.topk_ids_TK[:, None, :]) & teacher_TK[:, None, :]
    shared_TL = own_TL & same_TLK.any(dim=2)
    teacher_only_TK = teacher_TK & ~(same_TLK & own_TL[:, :, None]).any(dim=1)
    none_TK = torch.zeros_like(teacher_TK)
    present_TL, present_TK = {
        "student": (own_TL, none_TK),
        "teacher": (shared_TL, teacher_only_TK),
        "intersection": (shared_TL, none_TK),
        "union": (own_TL, teacher_only_TK),
        "xor": (own_TL & ~shared_TL, teacher_only_TK),
    }[support]
    return _Candidates(
        student_TJ=torch.cat([inputs.student_own_logp_TL, inputs.student_topk_logp_TK], dim=1),
        old_TJ=torch.cat([inputs.old_own_logp_TL, inputs.student_topk_logp_TK], dim=1).detach(),
        teacher_TJ=torch.cat([inputs.teacher_own_logp_TL, inputs.teacher_topk_logp_TK], dim=1),
        present_TJ=torch.cat([present_TL, present_TK], dim=1),
    )
