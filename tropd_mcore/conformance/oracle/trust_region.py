"""TrOPD, plain on-policy distillation and AOPD: which token is taught by a reward, which by a forward KL.

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
    """The log-ratio as the reward of every token that the student sampled."""
    reward = clipped_reward(token.log_ratio, objective.policy_gradient)
    return policy_loss(token, reward, objective.policy_gradient, decide)


def tropd(objective: TropdSections, token: Token, decide: Decisions) -> Tensor:
    """Reward where trusted, forward KL (or what stands for it) where not; guidance on the teacher's tokens."""
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
    """A forward KL where q(x) - p(x) <= threshold, else the reward."""
    if _teacher_gives_no_more(token, objective.threshold, decide):
        return forward_kl(parts_of(token, token.teacher_candidates, objective.norm))
    reward = clipped_reward(token.log_ratio, objective.policy_gradient)
    return policy_loss(token, reward, objective.policy_gradient, decide)


def tropd_aopd(objective: TropdAopdObjective, token: Token, decide: Decisions) -> Tensor:
    """TrOPD, plus AOPD's forward KL where AOPD has it."""
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
    """The gradient of the forward KL by one sample of the teacher's is that of -log p."""
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
