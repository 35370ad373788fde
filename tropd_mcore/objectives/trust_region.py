"""TrOPD, plain on-policy distillation and asymmetric OPD as losses over tokens.

The functions take the per-token numbers of one micro-batch, the same on every rank. They handle neither logits nor
parallelism. Throughout, p is the student, q the teacher, x the sampled token, r = log q(x) - log p(x) the log-ratio of
the student before the update, and FKL the forward KL(q || p) on the teacher's top-k.

Every objective here has the form

    loss of a token = - w A log p(x) + c FKL

with a constant *advantage* A and a constant *divergence weight* c. Gradients flow through log p and FKL only. For a
token sampled by the student, differentiating the one-sample estimate r itself would lose the teacher, since the
expectation of grad log p is 0. With r as the advantage, the expected gradient is that of the reverse KL. Only student
tokens have the ratio w of `policy_loss`; a teacher's token was not sampled from p.

                                     A             c
    student token, trusted           r             0
    student token, outlier
        fkl_direct                   0             weight
        fkl_scalar                   -weight FKL   0
        mask                         0             0
        clip                         weight tau    0
    teacher (prefix) token
        nll                          beta          0
        topk_fkl                     0             beta
        scalar_adv                   -beta r       0
        none                         0             0

    aopd, gate open                  r             0
    aopd, gate closed                0             1
    tropd_aopd                       TrOPD's       TrOPD's, + aopd_weight where AOPD's gate is closed

AOPD's gate is closed where q(x) - p(x) <= threshold. The mismatch weight is in A only.

Invariant: no mean, no host sync; a token outside both masks has no influence, whatever its numbers are.

Shapes: T tokens, K teacher top-k. All log-probs are natural and over the full vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised, log_ratio, make_columns
from tropd_mcore.objectives.parts.divergences import topk_forward_kl
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient, clipped_reward, policy_loss
from tropd_mcore.objectives.parts.trust import trust_gate
from tropd_mcore.objectives.sampled import TokenTerms, sampled_token_loss


def tropd(
    inputs: TokenInputs,
    *,
    trust_mode: str,
    trust_threshold: float,
    outlier_mode: str,
    outlier_weight: float,
    outlier_norm: str,
    clip_tau: float,
    beta: float,
    prefix_loss: str,
    policy: PolicyGradient,
) -> TokenLosses:
    """Trust-region on-policy distillation.

    A student token is trusted with weight t in [0, 1] (`trust_gate`) and an outlier with weight 1 - t. Outlier modes
    `mask` and `clip` use t = [r > clip_tau] instead; `clip` thus floors the reward at clip_tau. The advantage of a
    student token is also multiplied by `mismatch_weight`; FKL as a direct loss is not. advantage_clip = c clamps r to
    [-c, c] nats in the advantage, never in the gate. Gate and r use the student before the first update, FKL uses the
    current student.

    Keywords: the keys of the configuration sections objective.trust, .outlier, .guidance and .policy_gradient.
    Source: TrOPD, the unified objective J^TrOPD; fkl_scalar and scalar_adv: the form reported of the authors' code.
    """
    # With t the trust of a student token, for outlier mode fkl_direct, no ratio and no mismatch weight:
    #     student token   - t r log p(x) + weight (1 - t) FKL        teacher token (nll)   - beta log p(x)
    # The other modes put their own A and c into the same form; see the table of the module.
    inputs = blank_unsupervised(inputs)
    log_ratio_T = log_ratio(inputs)
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=outlier_norm)

    # The gate, then A and c of every token, first as if all were the student's, then as if all were the teacher's.
    if outlier_mode in ("mask", "clip"):
        trust_mode, trust_threshold = "threshold", clip_tau
    trust_T = trust_gate(log_ratio_T, mode=trust_mode, trust_u_T=inputs.trust_u_T, threshold=trust_threshold)
    reward_T = clipped_reward(log_ratio_T, policy.advantage_clip)
    student_terms = _student_terms(outlier_mode, trust_T, reward_T, outlier_weight * (1.0 - trust_T), fkl_T, clip_tau)
    teacher_terms = _prefix_terms(prefix_loss, beta, log_ratio_T, fkl_T)

    # The surrogate. Ratio, clip and mismatch weight apply to student tokens only.
    on_T, off_T = inputs.student_mask_T, inputs.prefix_mask_T
    sampled = policy_loss(
        inputs.student_logp_T,
        torch.where(on_T, student_terms.advantage_T, 0.0),
        old_logp_T=inputs.old_logp_T,
        rollout_logp_T=inputs.rollout_logp_T,
        policy=policy,
    )
    surrogate_T = _by_origin(
        on_T,
        sampled.loss_T + student_terms.fkl_weight_T * fkl_T,
        off_T,
        -teacher_terms.advantage_T * inputs.student_logp_T + teacher_terms.fkl_weight_T * fkl_T,
    )
    columns = make_columns(
        inputs,
        trusted_T=trust_T,
        log_ratio_T=log_ratio_T,
        divergence_T=fkl_T,
        advantage_T=_by_origin(on_T, sampled.advantage_T, off_T, teacher_terms.advantage_T),
        ratio_T=sampled.ratio_T,
        clipped_T=sampled.clipped_T,
        loss_T=_by_origin(on_T, student_terms.value_T, off_T, teacher_terms.value_T),
    )
    return TokenLosses(inputs.weight_T * surrogate_T, on_T | off_T, columns)


def opd(
    inputs: TokenInputs,
    *,
    policy: PolicyGradient,
) -> TokenLosses:
    """Plain on-policy distillation, the one-sample estimate of the reverse KL: TrOPD that trusts every token.

    Source: Thinking Machines Lab, "On-Policy Distillation"; TrOPD, the K1 form of J^KD.
    """
    return tropd(
        inputs,
        trust_mode="none",
        trust_threshold=0.0,
        outlier_mode="fkl_direct",
        outlier_weight=0.0,
        outlier_norm="truncated",
        clip_tau=0.0,
        beta=0.0,
        prefix_loss="none",
        policy=policy,
    )


def aopd(inputs: TokenInputs, *, threshold: float, norm: str, policy: PolicyGradient) -> TokenLosses:
    """Asymmetric OPD: FKL instead of the reward where q(x) - p(x) <= threshold.

    threshold = -1 is OPD, threshold = 1 FKL on every token. Source: AOPD, arXiv 2605.06387 (0).
    """
    inputs = blank_unsupervised(inputs)
    closed_T = _aopd_gate(inputs, threshold)
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=norm)
    divergence_term_T = torch.where(closed_T, fkl_T, 0.0)
    reward_T = torch.where(closed_T, 0.0, clipped_reward(log_ratio(inputs), policy.advantage_clip))
    terms = TokenTerms(
        reward_T,
        value_T=divergence_term_T - reward_T,
        trusted_T=(~closed_T).to(fkl_T.dtype),
        divergence_term_T=divergence_term_T,
        divergence_T=fkl_T,
    )
    return sampled_token_loss(inputs, terms, policy=policy)


def tropd_aopd(
    inputs: TokenInputs,
    *,
    aopd_threshold: float,
    aopd_weight: float,
    trust_mode: str,
    trust_threshold: float,
    outlier_mode: str,
    outlier_weight: float,
    outlier_norm: str,
    clip_tau: float,
    beta: float,
    prefix_loss: str,
    policy: PolicyGradient,
) -> TokenLosses:
    """TrOPD plus aopd_weight x FKL on the student's tokens with a closed gate.

    Those tokens keep their TrOPD loss, trusted or outlier. At threshold 0 they are the ones with r <= 0; those with
    r > 0 have the same reward in both methods. Source: TrOPD, one sentence of its comparison; the reading is ours.
    """
    output = tropd(
        inputs,
        trust_mode=trust_mode,
        trust_threshold=trust_threshold,
        outlier_mode=outlier_mode,
        outlier_weight=outlier_weight,
        outlier_norm=outlier_norm,
        clip_tau=clip_tau,
        beta=beta,
        prefix_loss=prefix_loss,
        policy=policy,
    )
    inputs = blank_unsupervised(inputs)
    closed_T = _aopd_gate(inputs, aopd_threshold) & inputs.student_mask_T
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=outlier_norm)
    added_T = aopd_weight * torch.where(closed_T, fkl_T, 0.0)
    return replace(
        output,
        loss_T=output.loss_T + inputs.weight_T * added_T,
        columns={**output.columns, "loss": output.columns["loss"] + added_T.detach()},
    )


def _aopd_gate(inputs: TokenInputs, threshold: float) -> Tensor:
    """bool [T]: q(x) - p(x) <= threshold, p before the update."""
    return inputs.teacher_logp_T.exp() - inputs.old_logp_T.exp() <= threshold


@dataclass(frozen=True)
class _Terms:
    """A, c and the logged value of every token, as if all tokens had one origin, [T]."""

    advantage_T: Tensor
    fkl_weight_T: Tensor
    value_T: Tensor


def _student_terms(
    outlier_mode: str, trust_T: Tensor, reward_T: Tensor, outlier_T: Tensor, fkl_T: Tensor, clip_tau: float
) -> _Terms:
    """Tokens that the student sampled: the log-ratio times the trust, and the outlier's term for the rest."""
    zero_T = torch.zeros_like(trust_T)
    trusted_T = torch.where(trust_T > 0, trust_T * reward_T, zero_T)  # a distrusted reward may be -inf
    if outlier_mode == "fkl_direct":
        return _Terms(trusted_T, outlier_T, outlier_T * fkl_T - trusted_T)
    if outlier_mode == "fkl_scalar":
        advantage_T = trusted_T - outlier_T * fkl_T
    elif outlier_mode == "clip":
        advantage_T = trusted_T + outlier_T * clip_tau
    else:
        assert outlier_mode == "mask", f"unknown outlier mode {outlier_mode!r}"
        advantage_T = trusted_T
    return _Terms(advantage_T, zero_T, -advantage_T)


def _prefix_terms(prefix_loss: str, beta: float, log_ratio_T: Tensor, fkl_T: Tensor) -> _Terms:
    """Tokens that the teacher sampled: their mean log-ratio estimates the forward KL, whose gradient is that of -log p.

    scalar_adv uses that estimate as an advantage instead; its gradient points away from the teacher.
    """
    zero_T = torch.zeros_like(log_ratio_T)
    beta_T = torch.full_like(log_ratio_T, beta)
    if prefix_loss == "nll":
        return _Terms(beta_T, zero_T, beta_T * log_ratio_T)
    if prefix_loss == "scalar_adv":
        return _Terms(-beta_T * log_ratio_T, zero_T, beta_T * log_ratio_T)
    if prefix_loss == "topk_fkl":
        return _Terms(zero_T, beta_T, beta_T * fkl_T)
    assert prefix_loss == "none", f"unknown prefix loss {prefix_loss!r}"
    return _Terms(zero_T, zero_T, zero_T)


def _by_origin(on_T: Tensor, student_T: Tensor, off_T: Tensor, teacher_T: Tensor) -> Tensor:
    """The student's value on student tokens, the teacher's on prefix tokens, 0 on all others."""
    return torch.where(on_T, student_T, torch.where(off_T, teacher_T, 0.0))
