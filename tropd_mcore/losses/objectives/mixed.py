"""Objectives with both: a reward on the sampled token and a differentiable divergence from the teacher.

For one micro-batch of per-token numbers; not for logits. p is the student, q the teacher, x the sampled token,
r = log q(x) - log p(x) before the update, FKL the forward KL(q || p) on the teacher's top-k. Each is

    loss of a token = - w A log p(x) + c FKL        (or a half of the Jensen-Shannon divergence in place of FKL)

                          A                c
    eopd                  r                [H(q) > entropy_threshold]
    aopd, gate open       r                0
    aopd, gate closed     0                1
    tropd_aopd            TrOPD's          TrOPD's + aopd_weight where AOPD's gate is closed

AOPD's gate is closed where q(x) - p(x) <= threshold. The mismatch weight is in A only. Invariant: no mean, no host
sync; a token outside both masks has no influence, whatever its numbers are.

Shapes: T tokens, K teacher top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tropd_mcore.losses.divergences import log_mixture, topk_forward_kl
from tropd_mcore.losses.objectives.inputs import (
    ABSENT,
    ObjectiveOutput,
    TokenInputs,
    log_ratio,
    without_uncounted,
)
from tropd_mcore.losses.objectives.sampled import Reward, sampled_token_loss
from tropd_mcore.losses.policy_gradient import PolicyGradient, clipped_reward


def eopd(inputs: TokenInputs, *, entropy_threshold: float, norm: str, policy: PolicyGradient) -> ObjectiveOutput:
    """Entropy-aware OPD: the reward on every token, plus FKL where the teacher's entropy exceeds the threshold.

    FKL is added, it does not replace the reward. An entropy of NaN (a scorer that cannot give it) makes the loss NaN,
    which the trainer stops at. Source: EOPD, arXiv 2603.07079 (0.8 nats, top-16, truncated).
    """
    inputs = without_uncounted(inputs)
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=norm)
    reward_T = clipped_reward(log_ratio(inputs), policy.advantage_clip)
    entropy_T = inputs.teacher_entropy_T
    uncertain_T = torch.where(entropy_T.isnan(), torch.nan, (entropy_T > entropy_threshold).to(fkl_T.dtype))
    direct_T = uncertain_T * fkl_T
    reward = Reward(reward_T, value_T=direct_T - reward_T, direct_T=direct_T, divergence_T=fkl_T)
    return sampled_token_loss(inputs, reward, policy=policy)


def aopd(inputs: TokenInputs, *, threshold: float, norm: str, policy: PolicyGradient) -> ObjectiveOutput:
    """Asymmetric OPD: FKL instead of the reward where q(x) - p(x) <= threshold.

    threshold = -1 is OPD, threshold = 1 FKL on every token. Source: AOPD, arXiv 2605.06387 (0).
    """
    inputs = without_uncounted(inputs)
    closed_T = _aopd_gate(inputs, threshold)
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=norm)
    direct_T = torch.where(closed_T, fkl_T, 0.0)
    reward_T = torch.where(closed_T, 0.0, clipped_reward(log_ratio(inputs), policy.advantage_clip))
    reward = Reward(
        reward_T,
        value_T=direct_T - reward_T,
        trusted_T=(~closed_T).to(fkl_T.dtype),
        direct_T=direct_T,
        divergence_T=fkl_T,
    )
    return sampled_token_loss(inputs, reward, policy=policy)


def tropd_aopd(
    inputs: TokenInputs,
    *,
    tropd: Callable[[TokenInputs], ObjectiveOutput],
    aopd_threshold: float,
    aopd_weight: float,
    norm: str,
) -> ObjectiveOutput:
    """TrOPD, with all constants bound in `tropd`, plus aopd_weight x FKL on the student's tokens with a closed gate.

    Those tokens keep their TrOPD loss, trusted or outlier. At threshold 0 they are the ones with r <= 0; those with
    r > 0 have the same reward in both methods. Source: TrOPD, one sentence of its comparison; the reading is ours.
    """
    output = tropd(inputs)
    inputs = without_uncounted(inputs)
    closed_T = _aopd_gate(inputs, aopd_threshold) & inputs.on_mask_T
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=norm)
    added_T = aopd_weight * torch.where(closed_T, fkl_T, 0.0)
    return replace(
        output,
        loss_sum=output.loss_sum + (inputs.weight_T * added_T).sum(),
        columns={**output.columns, "loss": output.columns["loss"] + added_T.detach()},
    )


def jsd(inputs: TokenInputs, *, beta: float, policy: PolicyGradient) -> ObjectiveOutput:
    """TrOPD's baseline beta sum_A q log(q / mix) + (1 - beta) log(p(x) / mix(x)), mix = beta q + (1 - beta) p.

    The first half, on the teacher's top-k A, is differentiated through the mixture. The second estimates KL(p || mix)
    from one x ~ p; the gradient of that expectation has a part from the sampling and one from the mixture,

        E_x[(log(p / mix) + beta q / mix) grad log p],

    so its advantage is -(1 - beta) (log(p(x) / mix(x)) + beta (q(x) / mix(x) - 1)). The constant -beta has expectation
    0 and makes it 0 where p = q. With the whole vocabulary in A, the expected gradient is exactly that of the
    divergence. Source: TrOPD section 4 (values); the gradient is derived.
    """
    inputs = without_uncounted(inputs)
    teacher_half_T = beta * _forward_kl_to_mixture(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, beta)
    mixture_T = log_mixture(inputs.old_logp_T, inputs.teacher_logp_T, beta)
    student_half_T = (1.0 - beta) * (inputs.old_logp_T - mixture_T)
    from_mixture_T = (1.0 - beta) * beta * torch.expm1(inputs.teacher_logp_T - mixture_T)
    value_T = teacher_half_T + student_half_T
    reward = Reward(
        clipped_reward(-student_half_T - from_mixture_T, policy.advantage_clip),
        value_T=value_T,
        direct_T=teacher_half_T,
        divergence_T=value_T,
    )
    return sampled_token_loss(inputs, reward, policy=policy)


def _aopd_gate(inputs: TokenInputs, threshold: float) -> Tensor:
    """bool [T]: q(x) - p(x) <= threshold, p before the update."""
    return inputs.teacher_logp_T.exp() - inputs.old_logp_T.exp() <= threshold


def _forward_kl_to_mixture(student_TK: Tensor, teacher_TK: Tensor, beta: float) -> Tensor:
    """sum_A q log(q / (beta q + (1 - beta) p)), [T]; differentiable in the student."""
    absent_TK = teacher_TK == ABSENT
    teacher_TK = teacher_TK.detach().masked_fill(absent_TK, 0.0)
    log_ratio_TK = teacher_TK - log_mixture(student_TK, teacher_TK, beta)
    return (teacher_TK.exp() * log_ratio_TK).masked_fill(absent_TK, 0.0).sum(dim=1)
