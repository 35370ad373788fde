"""The inputs of an objective per token and the columns that it returns; the same on every rank.

This module handles neither logits nor parallelism. Throughout, p is the student, q the teacher, x the sampled token.
Log-probs are natural, over the full vocabulary, at the rollout temperature for p and at 1 for q.

Shapes: T tokens, K teacher top-k, L student top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropd_mcore.sentinels import ABSENT


@dataclass(frozen=True)
class TokenInputs:
    """One entry per token. Gradients flow only through the first five; all others are constants."""

    student_logp_T: Tensor
    """log p(x)"""
    student_topk_logp_TK: Tensor
    """log p of the teacher's top-k tokens"""
    student_own_logp_TL: Tensor
    """log p of the tokens that were the student's own top-k before the update; L = 0 if none are requested"""
    student_entropy_T: Tensor
    """entropy of p, nats"""
    divergence_T: Tensor | None
    """the divergence over the whole vocabulary, nats; None if the objective has none"""
    teacher_logp_T: Tensor
    """log q(x)"""
    teacher_topk_logp_TK: Tensor
    """log q of the teacher's top-k tokens, not renormalised; ABSENT marks an entry that does not count"""
    teacher_own_logp_TL: Tensor
    """log q of the student's own top-k tokens; ABSENT marks an entry that does not count"""
    teacher_entropy_T: Tensor
    """entropy of q over the whole vocabulary, nats; NaN if the scorer cannot give it"""
    topk_ids_TK: Tensor
    """int64, the teacher's top-k tokens; -1 where ABSENT"""
    own_ids_TL: Tensor
    """int64, the student's own top-k tokens"""
    target_ids_T: Tensor
    """int64, x"""
    reference_logp_T: Tensor
    """log-prob of x under the frozen reference model, at the student's temperature; NaN if the objective has none"""
    old_logp_T: Tensor
    """log p(x) before the first update on this rollout batch; with a single update, log p(x) itself, detached"""
    old_own_logp_TL: Tensor
    """log p of the student's own top-k tokens, also before the first update"""
    rollout_logp_T: Tensor
    """log p(x) as the rollout engine reported it"""
    selected_T: Tensor
    """not 0 if a comparison with other tokens selected the token (`parts.batch_statistics`); NaN = not given"""
    advantage_T: Tensor
    """an advantage computed from other tokens, in nats or from a verdict; NaN = not given"""
    history_weight_T: Tensor
    """a factor computed from the tokens before this one; NaN = not given"""
    trust_u_T: Tensor
    """uniform in [0, 1) of the Bernoulli gate"""
    student_mask_T: Tensor
    """bool, x was sampled by the student (and the teacher scored it)"""
    prefix_mask_T: Tensor
    """bool, x belongs to a teacher prefix that counts here (and the teacher scored it)"""
    weight_T: Tensor
    """factor of the token's loss (1 for the token mean)"""


def blank_unsupervised(inputs: TokenInputs) -> TokenInputs:
    """Return the same inputs with zeros and absent candidates for tokens in neither mask.

    These tokens may hold NaN, and 0 * NaN would reach the sum and the gradient.
    """
    counted_T = inputs.student_mask_T | inputs.prefix_mask_T

    def blank(number_T: Tensor) -> Tensor:
        return torch.where(counted_T, number_T, 0.0)

    return replace(
        inputs,
        student_logp_T=blank(inputs.student_logp_T),
        divergence_T=None if inputs.divergence_T is None else blank(inputs.divergence_T),
        teacher_logp_T=blank(inputs.teacher_logp_T),
        reference_logp_T=blank(inputs.reference_logp_T),
        teacher_entropy_T=blank(inputs.teacher_entropy_T),
        old_logp_T=blank(inputs.old_logp_T),
        rollout_logp_T=blank(inputs.rollout_logp_T),
        selected_T=blank(inputs.selected_T),
        advantage_T=blank(inputs.advantage_T),
        history_weight_T=blank(inputs.history_weight_T),
        weight_T=blank(inputs.weight_T),
        teacher_topk_logp_TK=inputs.teacher_topk_logp_TK.masked_fill(~counted_T[:, None], ABSENT),
        teacher_own_logp_TL=inputs.teacher_own_logp_TL.masked_fill(~counted_T[:, None], ABSENT),
    )


def log_ratio(inputs: TokenInputs) -> Tensor:
    """r = log q(x) - log p(x), nats, [T]: a constant, with p the student before the update."""
    return (inputs.teacher_logp_T - inputs.old_logp_T).detach()


def make_columns(
    inputs: TokenInputs,
    *,
    trusted_T: Tensor,
    log_ratio_T: Tensor,
    divergence_T: Tensor,
    advantage_T: Tensor,
    ratio_T: Tensor,
    clipped_T: Tensor,
    loss_T: Tensor,
) -> dict[str, Tensor]:
    """Return the columns of `TokenLosses`, [T] each, detached, and blank for tokens in neither mask.

    trusted (weight of the gate), log_ratio, divergence (nats; NaN outside both masks and if there is none), advantage
    (A), ratio (w), clipped (1 if PPO's clip makes the gradient 0), loss (the objective's value in nats, not the
    surrogate, not weighted), teacher_mass and student_mass (of the teacher's top-k; 0 outside both masks).
    """
    counted_T = inputs.student_mask_T | inputs.prefix_mask_T
    absent_TK = inputs.teacher_topk_logp_TK == ABSENT
    columns = {
        "trusted": torch.where(inputs.student_mask_T, trusted_T, 0.0),
        "log_ratio": log_ratio_T,
        "divergence": torch.where(counted_T, divergence_T, float("nan")),
        "advantage": torch.where(counted_T, advantage_T, 0.0),
        "ratio": torch.where(inputs.student_mask_T, ratio_T, 1.0),
        "clipped": torch.where(inputs.student_mask_T, clipped_T, 0.0),
        "loss": torch.where(counted_T, loss_T, 0.0),
        "teacher_mass": inputs.teacher_topk_logp_TK.exp().sum(dim=1),
        "student_mass": inputs.student_topk_logp_TK.exp().masked_fill(absent_TK, 0.0).sum(dim=1),
    }
    return {name: column.detach() for name, column in columns.items()}
