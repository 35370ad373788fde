"""TrOPD and plain on-policy distillation as losses over tokens.

For one micro-batch of per-token numbers that are the same on every rank; not for logits, and it knows nothing of
parallelism. Throughout, p is the student, q the teacher, x the token that was sampled, r = log q(x) - log p(x) the
log-ratio (its sign is written once, in `tropd`), FKL the forward KL(q || p) on the teacher's top-k.

Every objective here has the form

    loss of a token = - A log p(x) + c FKL

with a constant *advantage* A and a constant *divergence weight* c; gradients flow through log p and FKL only. Where a
token was sampled by the student, differentiating the one-sample estimate r itself would lose the teacher (the
expectation of grad log p is 0); as an advantage, its expected gradient is that of the reverse KL.

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

Invariant: no mean, no host sync; a token outside both masks has no influence, whatever its numbers are.

Shapes: T tokens, K teacher top-k. All log-probs are natural and over the full vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropd_mcore.losses.divergences import topk_forward_kl
from tropd_mcore.losses.importance import mismatch_weight
from tropd_mcore.losses.trust import trust_gate

ABSENT = float("-inf")
"""Teacher log-prob of a top-k entry that does not count."""


@dataclass(frozen=True)
class TokenInputs:
    """What an objective may look at, one entry a token; gradients flow through the first two only."""

    student_logp_T: Tensor
    """log p(x)"""
    student_topk_logp_TK: Tensor
    """log p of the teacher's top-k tokens"""
    student_entropy_T: Tensor
    """entropy of p, nats"""
    teacher_logp_T: Tensor
    """log q(x)"""
    teacher_topk_logp_TK: Tensor
    """log q of the teacher's top-k tokens, not renormalised"""
    behav_logp_T: Tensor
    """log p(x) as the rollout engine saw it"""
    trust_u_T: Tensor
    """uniform in [0, 1) of the Bernoulli gate"""
    on_mask_T: Tensor
    """bool, x was sampled by the student (and the teacher scored it)"""
    off_mask_T: Tensor
    """bool, x belongs to a teacher prefix that counts here (and the teacher scored it)"""
    weight_T: Tensor
    """factor of the token's loss (1 for the token mean)"""


@dataclass(frozen=True)
class ObjectiveOutput:
    """Sum and count of one micro-batch; the caller divides by the count of the whole global batch."""

    loss_sum: Tensor
    """scalar, differentiable: sum over tokens of weight x surrogate loss"""
    token_count: Tensor
    """scalar int64: tokens in either mask"""
    columns: dict[str, Tensor]
    """[T] each, detached: trusted (weight of the gate), log_ratio, divergence (FKL, nats; NaN outside both masks),
    advantage (A), loss (the objective's value in nats, not the surrogate, not weighted), teacher_mass and student_mass
    (of the teacher's top-k; 0 outside both masks)"""


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
    mismatch: str,
    tis_cap: float,
    icepop_low: float,
    icepop_high: float,
    mask_below: float,
    advantage_clip: float | None,
) -> ObjectiveOutput:
    """Trust-region on-policy distillation.

    A student token is trusted with weight t in [0, 1] (`trust_gate`) and an outlier with weight 1 - t. Outlier modes
    `mask` and `clip` take t = [r > clip_tau] instead; `clip` thereby floors the reward at clip_tau. The advantage of a
    student token also carries the weight of `mismatch_weight`; FKL as a direct loss does not. advantage_clip = c clamps
    r to [-c, c] nats in the advantage, never in the gate.

    Keywords: the keys of the configuration sections objective.trust, .outlier, .guidance and .policy_gradient.
    Source: TrOPD, the unified objective J^TrOPD; fkl_scalar and scalar_adv: the form reported of the authors' code.
    """
    inputs = _without_uncounted(inputs)
    log_ratio_T = (inputs.teacher_logp_T - inputs.student_logp_T).detach()
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=outlier_norm)

    if outlier_mode in ("mask", "clip"):
        trust_mode, trust_threshold = "threshold", clip_tau
    trust_T = trust_gate(log_ratio_T, mode=trust_mode, trust_u_T=inputs.trust_u_T, threshold=trust_threshold)
    engine_T = mismatch_weight(
        inputs.student_logp_T,
        inputs.behav_logp_T,
        mode=mismatch,
        tis_cap=tis_cap,
        icepop_low=icepop_low,
        icepop_high=icepop_high,
        mask_below=mask_below,
    )
    reward_T = log_ratio_T if advantage_clip is None else log_ratio_T.clamp(-advantage_clip, advantage_clip)
    student_terms = _student_terms(outlier_mode, trust_T, reward_T, outlier_weight * (1.0 - trust_T), fkl_T, clip_tau)
    teacher_terms = _prefix_terms(prefix_loss, beta, log_ratio_T, fkl_T)

    on_T, off_T = inputs.on_mask_T, inputs.off_mask_T
    advantage_T = _by_origin(on_T, engine_T * student_terms.advantage_T, off_T, teacher_terms.advantage_T)
    fkl_weight_T = _by_origin(on_T, student_terms.fkl_weight_T, off_T, teacher_terms.fkl_weight_T)
    surrogate_T = -advantage_T * inputs.student_logp_T + fkl_weight_T * fkl_T
    absent_TK = inputs.teacher_topk_logp_TK == ABSENT
    columns = {
        "trusted": torch.where(on_T, trust_T, 0.0),
        "log_ratio": log_ratio_T,
        "divergence": torch.where(on_T | off_T, fkl_T.detach(), float("nan")),
        "advantage": advantage_T,
        "loss": _by_origin(on_T, student_terms.value_T, off_T, teacher_terms.value_T),
        "teacher_mass": inputs.teacher_topk_logp_TK.detach().exp().sum(dim=1),
        "student_mass": inputs.student_topk_logp_TK.detach().exp().masked_fill(absent_TK, 0.0).sum(dim=1),
    }
    return ObjectiveOutput((inputs.weight_T * surrogate_T).sum(), (on_T | off_T).sum(), columns)


def opd(
    inputs: TokenInputs,
    *,
    mismatch: str,
    tis_cap: float,
    icepop_low: float,
    icepop_high: float,
    mask_below: float,
    advantage_clip: float | None,
) -> ObjectiveOutput:
    """Plain on-policy distillation, the reverse KL by its one-sample estimate: TrOPD that trusts every token.

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
        mismatch=mismatch,
        tis_cap=tis_cap,
        icepop_low=icepop_low,
        icepop_high=icepop_high,
        mask_below=mask_below,
        advantage_clip=advantage_clip,
    )


@dataclass(frozen=True)
class _Terms:
    """A, c and the logged value of every token, were all tokens of one origin; detached, [T]."""

    advantage_T: Tensor
    fkl_weight_T: Tensor
    value_T: Tensor


def _student_terms(
    outlier_mode: str, trust_T: Tensor, reward_T: Tensor, outlier_T: Tensor, fkl_T: Tensor, clip_tau: float
) -> _Terms:
    """Tokens that the student sampled: the log-ratio as far as they are trusted, the outlier's term for the rest."""
    zero_T = torch.zeros_like(trust_T)
    fkl_T = fkl_T.detach()
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

    scalar_adv takes that estimate as an advantage instead; its gradient points away from the teacher.
    """
    zero_T = torch.zeros_like(log_ratio_T)
    beta_T = torch.full_like(log_ratio_T, beta)
    if prefix_loss == "nll":
        return _Terms(beta_T, zero_T, beta_T * log_ratio_T)
    if prefix_loss == "scalar_adv":
        return _Terms(-beta_T * log_ratio_T, zero_T, beta_T * log_ratio_T)
    if prefix_loss == "topk_fkl":
        return _Terms(zero_T, beta_T, beta_T * fkl_T.detach())
    assert prefix_loss == "none", f"unknown prefix loss {prefix_loss!r}"
    return _Terms(zero_T, zero_T, zero_T)


def _by_origin(on_T: Tensor, student_T: Tensor, off_T: Tensor, teacher_T: Tensor) -> Tensor:
    """The student's value on student tokens, the teacher's on prefix tokens, 0 on all others."""
    return torch.where(on_T, student_T, torch.where(off_T, teacher_T, 0.0))


def _without_uncounted(inputs: TokenInputs) -> TokenInputs:
    """The same inputs with r = 0 and an absent top-k where a token is in neither mask.

    What the teacher left there may be NaN, and 0 * NaN would reach the sum and the gradient.
    """
    counted_T = inputs.on_mask_T | inputs.off_mask_T
    return replace(
        inputs,
        teacher_logp_T=torch.where(counted_T, inputs.teacher_logp_T, inputs.student_logp_T.detach()),
        teacher_topk_logp_TK=inputs.teacher_topk_logp_TK.masked_fill(~counted_T[:, None], ABSENT),
    )
