"""Objectives that are a differentiable divergence from the teacher on the student's tokens, and nothing else.

For one micro-batch of per-token numbers; not for logits. p is the student, q the teacher, x the sampled token. No
advantage and no ratio: the gradient goes through the candidates' log-probs. Invariant: no mean, no host sync; a token
outside both masks has no influence.

Shapes: T tokens, K teacher top-k, E candidates (K, or K + 1 with the sampled token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.losses.divergences import (
    clipped_reverse_kl,
    topk_forward_kl,
    topk_jensen_shannon,
    topk_reverse_kl,
)
from tropd_mcore.losses.objectives.inputs import ABSENT, ObjectiveOutput, TokenInputs, without_uncounted
from tropd_mcore.losses.objectives.sampled import Reward, sampled_token_loss
from tropd_mcore.losses.policy_gradient import PolicyGradient


def gkd(inputs: TokenInputs, *, divergence: str, beta: float, norm: str, full_vocabulary: bool) -> ObjectiveOutput:
    """Generalised knowledge distillation: `fkl` KL(q || p), `rkl` KL(p || q) or `jsd` of `beta`, on every token.

    On the teacher's top-k under `norm`; with full_vocabulary, what the kernel computed (`inputs.divergence_T`).
    Source: GKD, arXiv 2306.13649, all sequences sampled by the student (lambda = 1).
    """
    inputs = without_uncounted(inputs)
    if full_vocabulary:
        assert inputs.divergence_T is not None, "the kernel has not computed the divergence"
        divergence_T = inputs.divergence_T
    else:
        divergence_T = _on_topk(inputs, divergence, beta, norm)
    return _divergence_loss(inputs, divergence_T)


def lsm(inputs: TokenInputs, *, sampled_tail: bool, clip_log_ratio: float | None) -> ObjectiveOutput:
    """Local support matching: KL(p~ || q~), both renormalised on the teacher's top-k.

    sampled_tail appends x where it is outside; clip_log_ratio = c clamps log(p~ / q~) to [-c, c] nats, as a constant
    (see `clipped_reverse_kl`). What p has outside the candidates has no gradient.
    Source: Revisiting OPD, arXiv 2603.25562 (top-32, no clamp).
    """
    inputs = without_uncounted(inputs)
    student_TE, teacher_TE = inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK
    if sampled_tail:
        inside_T = (inputs.topk_ids_TK == inputs.target_ids_T[:, None]).any(dim=1)
        sampled_T = inputs.teacher_logp_T.masked_fill(inside_T, ABSENT)
        student_TE = torch.cat([student_TE, inputs.student_logp_T[:, None]], dim=1)
        teacher_TE = torch.cat([teacher_TE, sampled_T[:, None]], dim=1)
    if clip_log_ratio is None:
        divergence_T = topk_reverse_kl(student_TE, teacher_TE, norm="renorm")
    else:
        divergence_T = clipped_reverse_kl(student_TE, teacher_TE, bound=clip_log_ratio)
    return _divergence_loss(inputs, divergence_T)


def _on_topk(inputs: TokenInputs, divergence: str, beta: float, norm: str) -> Tensor:
    """The divergence of each token on the teacher's top-k, [T]."""
    student_TK, teacher_TK = inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK
    if divergence == "fkl":
        return topk_forward_kl(student_TK, teacher_TK, norm=norm)
    if divergence == "rkl":
        return topk_reverse_kl(student_TK, teacher_TK, norm=norm)
    assert divergence == "jsd", f"unknown divergence {divergence!r}"
    return topk_jensen_shannon(student_TK, teacher_TK, beta=beta, norm=norm)


def _divergence_loss(inputs: TokenInputs, divergence_T: Tensor) -> ObjectiveOutput:
    """The divergence on the student's tokens as the loss; no advantage."""
    nothing_T = torch.zeros_like(divergence_T)
    reward = Reward(nothing_T, value_T=divergence_T, direct_T=divergence_T, divergence_T=divergence_T)
    return sampled_token_loss(inputs, reward, policy=PolicyGradient())
