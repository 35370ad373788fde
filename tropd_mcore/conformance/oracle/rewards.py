"""The objectives that teach by a reward: of the sampled token, or of several candidates."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tropd_mcore.config.advantage_objectives import (
    EntropyOpdObjective,
    ExopdObjective,
    IwOpdObjective,
    KdrlObjective,
    PowerOpdObjective,
    ReopoldObjective,
    RethinkingObjective,
    RladObjective,
    TopdObjective,
    VopdObjective,
)
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.policy import clipped_surrogate, mismatch_weight, policy_loss, surrogate
from tropd_mcore.conformance.oracle.token import Candidate, Token


def reopold(objective: ReopoldObjective, token: Token, decide: Decisions) -> Tensor:
    """The log-ratio, not below the floor, where the phase trains (statistic 1). Source: REOPOLD eq. 4 and 7."""
    floored = token.log_ratio if decide.above("floor", token.log_ratio, objective.floor) else objective.floor
    return policy_loss(token, token.statistic * floored, objective.policy_gradient, decide)


def entropy_opd(objective: EntropyOpdObjective, token: Token, decide: Decisions) -> Tensor:
    """The log-ratio of the selected tokens (statistic 1)."""
    return policy_loss(token, token.statistic * token.log_ratio, objective.policy_gradient, decide)


def exopd(objective: ExopdObjective, token: Token, decide: Decisions) -> Tensor:
    """scale (log q - log ref) - (log p - log ref). Source: G-OPD."""
    reward = objective.scale * (token.log_q - token.reference_log_p) - (token.old_log_p - token.reference_log_p)
    return policy_loss(token, reward, objective.policy_gradient, decide)


def topd(objective: TopdObjective, token: Token, decide: Decisions) -> Tensor:
    """The reward that `statistics` makes of log(alpha rho + 1 - alpha)."""
    return policy_loss(token, token.statistic, objective.policy_gradient, decide)


def vopd(objective: VopdObjective, token: Token, decide: Decisions) -> Tensor:
    """r + KL(p || q) on the student's candidates, renormalised; p is that of r."""
    old = {candidate.vocabulary_id: _known(candidate.old_log_p) for candidate in token.own_candidates}
    student_mass = sum(math.exp(log_p) for log_p in old.values())
    teacher_mass = sum(math.exp(candidate.log_q) for candidate in token.own_candidates)
    baseline = 0.0
    for candidate in token.own_candidates:
        log_p = old[candidate.vocabulary_id] - math.log(student_mass)
        baseline += math.exp(log_p) * (log_p - candidate.log_q + math.log(teacher_mass))
    return policy_loss(token, token.log_ratio + baseline, objective.policy_gradient, decide)


def iw_opd(objective: IwOpdObjective, token: Token, decide: Decisions) -> Tensor:
    """log q - log p of the sampler, times a weight that falls along the sample (the statistic). Source: IW-OPD."""
    reward = token.log_q - token.behav_log_p
    return policy_loss(token, token.statistic * reward, objective.policy_gradient, decide)


def power_opd(objective: PowerOpdObjective, token: Token, decide: Decisions) -> Tensor:
    """q^a - p^a."""
    reward = math.exp(token.log_q) ** objective.power - math.exp(token.old_log_p) ** objective.power
    return policy_loss(token, reward, objective.policy_gradient, decide)


def kdrl(objective: KdrlObjective, token: Token, decide: Decisions, progress: float) -> Tensor:
    """The verifier's advantage (the statistic), and beta (log q - log p)^2 / 2."""
    beta = objective.beta_start + (objective.beta_end - objective.beta_start) * progress
    penalty = 0.5 * (token.log_q - token.log_p) ** 2
    return policy_loss(token, token.statistic, objective.policy_gradient, decide) + beta * penalty


def rlad(objective: RladObjective, token: Token, decide: Decisions) -> Tensor:
    """The verifier's advantage with the ratio p / (p_old^a q^(1 - a)), clipped; a KL to the reference by one sample."""
    keys = objective.policy_gradient
    anchor = objective.anchor * token.old_log_p + (1.0 - objective.anchor) * token.log_q
    advantage = token.statistic * mismatch_weight(token, keys, decide)
    loss = clipped_surrogate((token.log_p - anchor).exp(), advantage, keys, decide)
    if objective.reference_weight > 0:
        difference = token.reference_log_p - token.log_p
        loss = loss + objective.reference_weight * (difference.exp() - 1.0 - difference)
    return loss


def rethinking(objective: RethinkingObjective, token: Token, decide: Decisions) -> Tensor:
    """The reward log q - log p of each candidate, weighted by p renormalised on them, as a policy gradient on each."""
    chosen = _support(objective.support, token)
    if not chosen:
        return 0.0 * token.log_p
    old = {
        candidate.vocabulary_id: candidate.old_log_p
        if candidate.old_log_p is not None
        else float(token.log_p_V[candidate.vocabulary_id].detach())
        for candidate in chosen
    }
    mass = sum(math.exp(log_p) for log_p in old.values())
    terms = []
    for candidate in chosen:
        old_log_p = old[candidate.vocabulary_id]
        weight = math.exp(old_log_p) / mass
        advantage = weight * (candidate.log_q - old_log_p)
        log_p = token.log_p_V[candidate.vocabulary_id]
        terms.append(surrogate(log_p, old_log_p, advantage, objective.policy_gradient, decide))
    return torch.stack(terms).sum() * mismatch_weight(token, objective.policy_gradient, decide)


def _known(old_log_p: float | None) -> float:
    assert old_log_p is not None, "the student's own candidates come with their log-probs"
    return old_log_p


def _support(which: str, token: Token) -> list[Candidate]:
    """The candidates, each once; what the student knew of an entry is kept where the teacher proposes it as well."""
    own = {candidate.vocabulary_id: candidate for candidate in token.own_candidates}
    teacher = {
        candidate.vocabulary_id: replace(candidate, old_log_p=own[candidate.vocabulary_id].old_log_p)
        if candidate.vocabulary_id in own
        else candidate
        for candidate in token.teacher_candidates
    }
    ids = {
        "student": set(own),
        "teacher": set(teacher),
        "intersection": set(own) & set(teacher),
        "union": set(own) | set(teacher),
        "xor": set(own) ^ set(teacher),
    }[which]
    return [teacher.get(vocabulary_id) or own[vocabulary_id] for vocabulary_id in sorted(ids)]
