"""Objectives that match the teacher's distribution: a differentiable divergence from it, alone or with a reward.

They take the per-token numbers of one micro-batch, not logits. p is the student, q the teacher, x the sampled token,
r = log q(x) - log p(x) before the update. `gkd` and `lsm` are the divergence alone, without advantage and ratio; the
gradient flows through the candidates' log-probs. `eopd` uses the reward r and adds the forward KL where the teacher is
uncertain. `jsd` has one half of its divergence as a reward and differentiates the other half. Invariant: no mean, no
host sync; a token outside both masks has no influence.

Shapes: T tokens, K teacher top-k, E candidates (K, or K + 1 with the sampled token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.kernel.full_vocabulary import log_mixture
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised, log_ratio
from tropd_mcore.objectives.parts.divergences import (
    clipped_reverse_kl,
    topk_forward_kl,
    topk_jensen_shannon,
    topk_reverse_kl,
)
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient, clipped_reward
from tropd_mcore.objectives.sampled import TokenTerms, sampled_token_loss
from tropd_mcore.sentinels import ABSENT


def gkd(inputs: TokenInputs, *, divergence: str, beta: float, norm: str, full_vocabulary: bool) -> TokenLosses:
    """Generalised knowledge distillation: `fkl` KL(q || p), `rkl` KL(p || q) or `jsd` of `beta`, on every token.

    On the teacher's top-k under `norm`; with full_vocabulary, the kernel's exact value (`inputs.divergence_T`).
    Source: GKD, arXiv 2306.13649, all sequences sampled by the student (lambda = 1).
    """
    inputs = blank_unsupervised(inputs)
    if full_vocabulary:
        assert inputs.divergence_T is not None, "the kernel has not computed the divergence"
        divergence_T = inputs.divergence_T
    else:
        divergence_T = _on_topk(inputs, divergence, beta, norm)
    return _divergence_loss(inputs, divergence_T)


def lsm(inputs: TokenInputs, *, sampled_tail: bool, clip_log_ratio: float | None) -> TokenLosses:
    """Local support matching: KL(p~ || q~), both renormalised on the teacher's top-k.

    sampled_tail appends x if it is outside the top-k. clip_log_ratio = c clamps log(p~ / q~) to [-c, c] nats, as a
    constant (see `clipped_reverse_kl`). The probability that p has outside the candidates gets no gradient.
    Source: Revisiting OPD, arXiv 2603.25562 (top-32, no clamp).
    """
    inputs = blank_unsupervised(inputs)
    student_TE, teacher_TE = inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK
    if sampled_tail:
        # x as one more candidate. ABSENT if it is in the top-k already, so that it does not count twice.
        inside_T = (inputs.topk_ids_TK == inputs.target_ids_T[:, None]).any(dim=1)
        sampled_T = inputs.teacher_logp_T.masked_fill(inside_T, ABSENT)
        student_TE = torch.cat([student_TE, inputs.student_logp_T[:, None]], dim=1)
        teacher_TE = torch.cat([teacher_TE, sampled_T[:, None]], dim=1)
    if clip_log_ratio is None:
        divergence_T = topk_reverse_kl(student_TE, teacher_TE, norm="renorm")
    else:
        divergence_T = clipped_reverse_kl(student_TE, teacher_TE, bound=clip_log_ratio)
    return _divergence_loss(inputs, divergence_T)


def eopd(inputs: TokenInputs, *, entropy_threshold: float, norm: str, policy: PolicyGradient) -> TokenLosses:
    """Entropy-aware OPD: the reward on every token, plus FKL where the teacher's entropy exceeds the threshold.

    FKL is added to the reward and does not replace it. If the scorer gives no entropy (NaN), the loss is NaN and the
    trainer stops. Source: EOPD, arXiv 2603.07079 (0.8 nats, top-16, truncated).
    """
    inputs = blank_unsupervised(inputs)
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=norm)
    reward_T = clipped_reward(log_ratio(inputs), policy.advantage_clip)
    entropy_T = inputs.teacher_entropy_T
    uncertain_T = torch.where(entropy_T.isnan(), torch.nan, (entropy_T > entropy_threshold).to(fkl_T.dtype))
    divergence_term_T = uncertain_T * fkl_T
    terms = TokenTerms(
        reward_T, value_T=divergence_term_T - reward_T, divergence_term_T=divergence_term_T, divergence_T=fkl_T
    )
    return sampled_token_loss(inputs, terms, policy=policy)


def jsd(inputs: TokenInputs, *, beta: float, policy: PolicyGradient) -> TokenLosses:
    """TrOPD's baseline beta sum_A q log(q / mix) + (1 - beta) log(p(x) / mix(x)), mix = beta q + (1 - beta) p.

    The first half, on the teacher's top-k A, is differentiated through the mixture. The second half estimates
    KL(p || mix) from one x ~ p. The gradient of that expectation has a part from the sampling and one from the mixture,

        E_x[(log(p / mix) + beta q / mix) grad log p],

    so its advantage is -(1 - beta) (log(p(x) / mix(x)) + beta (q(x) / mix(x) - 1)). The constant -beta changes nothing
    in expectation and makes the advantage 0 where p = q. If A is the whole vocabulary, the expected gradient is exactly
    that of the divergence. Source: TrOPD section 4 (values); the gradient is derived.
    """
    inputs = blank_unsupervised(inputs)
    teacher_half_T = beta * _forward_kl_to_mixture(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, beta)
    mixture_T = log_mixture(inputs.old_logp_T, inputs.teacher_logp_T, beta)
    student_half_T = (1.0 - beta) * (inputs.old_logp_T - mixture_T)
    from_mixture_T = (1.0 - beta) * beta * torch.expm1(inputs.teacher_logp_T - mixture_T)
    value_T = teacher_half_T + student_half_T
    terms = TokenTerms(
        clipped_reward(-student_half_T - from_mixture_T, policy.advantage_clip),
        value_T=value_T,
        divergence_term_T=teacher_half_T,
        divergence_T=value_T,
    )
    return sampled_token_loss(inputs, terms, policy=policy)


def _on_topk(inputs: TokenInputs, divergence: str, beta: float, norm: str) -> Tensor:
    """The divergence of each token on the teacher's top-k, [T]."""
    student_TK, teacher_TK = inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK
    if divergence == "fkl":
        return topk_forward_kl(student_TK, teacher_TK, norm=norm)
    if divergence == "rkl":
        return topk_reverse_kl(student_TK, teacher_TK, norm=norm)
    assert divergence == "jsd", f"unknown divergence {divergence!r}"
    return topk_jensen_shannon(student_TK, teacher_TK, beta=beta, norm=norm)


def _divergence_loss(inputs: TokenInputs, divergence_T: Tensor) -> TokenLosses:
    """The divergence on the student's tokens as the loss, without an advantage."""
    nothing_T = torch.zeros_like(divergence_T)
    terms = TokenTerms(nothing_T, value_T=divergence_T, divergence_term_T=divergence_T, divergence_T=divergence_T)
    return sampled_token_loss(inputs, terms, policy=PolicyGradient())


def _forward_kl_to_mixture(student_TK: Tensor, teacher_TK: Tensor, beta: float) -> Tensor:
    """sum_A q log(q / (beta q + (1 - beta) p)), [T]; differentiable in the student."""
    absent_TK = teacher_TK == ABSENT
    teacher_TK = teacher_TK.detach().masked_fill(absent_TK, 0.0)
    log_ratio_TK = teacher_TK - log_mixture(student_TK, teacher_TK, beta)
    return (teacher_TK.exp() * log_ratio_TK).masked_fill(absent_TK, 0.0).sum(dim=1)
