"""TrOPD, plain on-policy distillation and AOPD: a reward for some tokens, a forward KL for others.

r = log q(x) - log p_old(x); -A log p(x) stands for the policy loss of A, with ratio, clip and mismatch weight.
Source: the unified objective of TrOPD; AOPD. Shapes: V vocabulary.
"""

from __future__ import annotations

import math

from torch import Tensor

from tropd_mcore.config.objectives.trust_region import (
    AopdObjective,
    OpdObjective,
    TropdAopdObjective,
    TropdSections,
)
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.divergences import forward_kl, parts_of
from tropd_mcore.conformance.oracle.policy import clipped_reward, policy_loss
from tropd_mcore.conformance.oracle.token import Token

LEARNS_FROM_PREFIXES = ("tropd", "tropd_aopd")


def opd(objective: OpdObjective, token: Token, decide: Decisions) -> Tensor:
    """-r log p(x) on every token that the student sampled."""
    reward = clipped_reward(token.log_ratio, objective.policy_gradient)
    return policy_loss(token, reward, objective.policy_gradient, decide)


def tropd(objective: TropdSections, token: Token, decide: Decisions) -> Tensor:
    """With trust t = P_trust(x) and FKL on the teacher's candidates, by outlier mode:

        fkl_direct   -t r log p(x) + weight (1 - t) FKL        fkl_scalar   -(t r - weight (1 - t) FKL) log p(x)
        clip         -(t r + weight (1 - t) tau) log p(x)      mask         -t r log p(x)

    `mask` and `clip` have t = [r > tau]. Tokens of a teacher's prefix have the guidance loss instead.
    """
    keys, outlier = objective.policy_gradient, objective.outlier
    divergence = forward_kl(parts_of(token, token.teacher_candidates, outlier.norm))
    if not token.sampled_by_student:
        return _guidance(objective, token, divergence)
    if outlier.mode in ("mask", "clip"):
        trust = float(decide.above("trust", token.log_ratio, outlier.clip_tau))
    else:
        trust = _trust(objective, token, decide)
    trusted = trust * clipped_reward(token.log_ratio, keys)
    share = outlier.weight * (1.0 - trust)
    if outlier.mode == "fkl_direct":
        return policy_loss(token, trusted, keys, decide) + share * divergence
    if outlier.mode == "fkl_scalar":
        return policy_loss(token, trusted - share * float(divergence.detach()), keys, decide)
    if outlier.mode == "clip":
        return policy_loss(token, trusted + share * outlier.clip_tau, keys, decide)
    return policy_loss(token, trusted, keys, decide)


def aopd(objective: AopdObjective, token: Token, decide: Decisions) -> Tensor:
    """FKL if q(x) - p_old(x) <= threshold, else -r log p(x)."""
    if _teacher_gives_no_more(token, objective.threshold, decide):
        return forward_kl(parts_of(token, token.teacher_candidates, objective.norm))
    reward = clipped_reward(token.log_ratio, objective.policy_gradient)
    return policy_loss(token, reward, objective.policy_gradient, decide)


def tropd_aopd(objective: TropdAopdObjective, token: Token, decide: Decisions) -> Tensor:
    """TrOPD + aopd_weight [q(x) - p_old(x) <= threshold] FKL on the student's tokens."""
    loss = tropd(objective, token, decide)
    if token.sampled_by_student and _teacher_gives_no_more(token, objective.aopd_threshold, decide):
        parts = parts_of(token, token.teacher_candidates, objective.outlier.norm)
        return loss + objective.aopd_weight * forward_kl(parts)
    return loss


def _trust(objective: TropdSections, token: Token, decide: Decisions) -> float:
    mode = objective.trust.mode
    if mode == "bernoulli":
        return float(decide.above("trust", math.exp(token.log_ratio), token.trust_u))
    if mode == "soft":
        return min(math.exp(token.log_ratio), 1.0)
    if mode == "threshold":
        return float(decide.above("trust", token.log_ratio, objective.trust.threshold))
    assert mode == "none", mode
    return 1.0


def _guidance(objective: TropdSections, token: Token, divergence: Tensor) -> Tensor:
    """The loss of a teacher's token: beta times -log p, FKL, or r log p.

    nll: for x ~ q, the mean of -grad log p(x) is the gradient of KL(q || p).
    """
    guidance = objective.guidance
    if guidance.loss == "nll":
        return -guidance.beta * token.log_p
    if guidance.loss == "topk_fkl":
        return guidance.beta * divergence
    if guidance.loss == "scalar_adv":
        return guidance.beta * token.log_ratio * token.log_p
    assert guidance.loss == "none", guidance.loss
    return 0.0 * token.log_p


def _teacher_gives_no_more(token: Token, threshold: float, decide: Decisions) -> bool:
    q, p = math.exp(token.log_q), math.exp(token.old_log_p)
    return not decide.above("aopd gate", q - p, threshold, scale=max(q, p, abs(threshold)))
