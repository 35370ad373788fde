"""The objectives with a policy gradient on several candidates per state."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tropd_mcore.config.objectives.candidates import RethinkingObjective
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.policy import mismatch_weight, surrogate
from tropd_mcore.conformance.oracle.token import Candidate, Token


def rethinking(objective: RethinkingObjective, token: Token, decide: Decisions) -> Tensor:
    """L = -sum_v A_v log p_v over the support S, or with ratio and clip, A_v = w_v (log q_v - log p_old,v).

    w_v = p_old,v / sum_S p_old; all times the mismatch weight, 1 if it is off. Source: Rethinking OPD.
    """
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


def _support(which: str, token: Token) -> list[Candidate]:
    """The candidates, each once. If student and teacher propose the same id, the student's old log-prob is kept."""
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
