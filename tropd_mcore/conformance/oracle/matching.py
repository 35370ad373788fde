"""The objectives that train by a divergence from the teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropd_mcore.config.objectives.matching import EopdObjective, GkdObjective, JsdObjective, LsmObjective
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.divergences import (
    forward_kl,
    kl_of_student_to_mixture,
    kl_of_teacher_to_mixture,
    parts_of,
    reverse_kl,
    whole_vocabulary,
)
from tropd_mcore.conformance.oracle.policy import clipped_reward, policy_loss
from tropd_mcore.conformance.oracle.token import Candidate, Token


def eopd(objective: EopdObjective, token: Token, decide: Decisions) -> Tensor:
    """-r log p(x) + [H(q) > threshold] sum_A q log(q / p), with r = log q(x) - log p_old(x). Source: EOPD."""
    reward = clipped_reward(token.log_ratio, objective.policy_gradient)
    loss = policy_loss(token, reward, objective.policy_gradient, decide)
    if decide.above("teacher entropy", token.teacher_entropy, objective.entropy_threshold):
        loss = loss + forward_kl(parts_of(token, token.teacher_candidates, objective.norm))
    return loss


def jsd(objective: JsdObjective, token: Token, decide: Decisions) -> Tensor:
    """beta sum_A q log(q / m) + (1 - beta) E_x[log(p(x) / m(x))], the expectation estimated by one x ~ p.

    The gradient of the expectation is E_x[g grad log p(x)]. g has a part from the sampling, log(p / m), and one from
    the mixture, 1 - (1 - beta) p / m = beta q / m. Subtracting beta from g changes nothing in the mean and makes it 0
    where p = q. Source: TrOPD, J_JSD.
    """
    beta = objective.beta
    teacher_half = kl_of_teacher_to_mixture(parts_of(token, token.teacher_candidates, "truncated"), beta)
    p, q = math.exp(token.old_log_p), math.exp(token.log_q)
    mixture = beta * q + (1.0 - beta) * p
    reward = -(1.0 - beta) * (math.log(p / mixture) + beta * q / mixture - beta)
    return beta * teacher_half + policy_loss(token, reward, objective.policy_gradient, decide)


def gkd(objective: GkdObjective, token: Token, decide: Decisions) -> Tensor:
    """KL(q || p), KL(p || q), or beta KL(q || m) + (1 - beta) KL(p || m). Source: GKD."""
    if objective.full_vocabulary:
        parts = whole_vocabulary(token)
    else:
        parts = parts_of(token, token.teacher_candidates, objective.norm)
    if objective.divergence == "fkl":
        return forward_kl(parts)
    if objective.divergence == "rkl":
        return reverse_kl(parts)
    assert objective.divergence == "jsd", objective.divergence
    return objective.beta * kl_of_teacher_to_mixture(parts, objective.beta) + (
        1.0 - objective.beta
    ) * kl_of_student_to_mixture(parts, objective.beta)


def lsm(objective: LsmObjective, token: Token, decide: Decisions) -> Tensor:
    """L = sum p~ log(p~ / q~), both renormalised on the teacher's candidates and, if configured, the sampled token.

    With a bound, the log-ratio is clamped to it and constant, so dL/dz = p~ (clamped - L). Without one,
    dL/dz = p~ (log-ratio - L). Source: Revisiting OPD.
    """
    candidates = list(token.teacher_candidates)
    if objective.sampled_tail and all(candidate.vocabulary_id != token.x for candidate in candidates):
        candidates.append(Candidate(token.x, token.log_q, token.old_log_p))
    parts = parts_of(token, candidates, "renorm")
    bound = objective.clip_log_ratio
    if bound is None:
        return reverse_kl(parts)
    held = [_held(float(log_p.detach()) - log_q, bound, decide) for log_p, log_q in parts]
    return torch.stack([log_p.exp() * log_ratio for (log_p, _), log_ratio in zip(parts, held, strict=True)]).sum()


def _held(log_ratio: float, bound: float, decide: Decisions) -> float:
    if decide.above("log-ratio high", log_ratio, bound):
        return bound
    return -bound if decide.above("log-ratio low", -bound, log_ratio) else log_ratio
