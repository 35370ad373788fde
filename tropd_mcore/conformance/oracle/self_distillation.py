"""The objectives whose teacher is the student itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropd_mcore.config.objectives.self_distillation import OpsdObjective, SdpoObjective
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.divergences import (
    Part,
    forward_kl,
    kl_of_student_to_mixture,
    kl_of_teacher_to_mixture,
    parts_of,
    reverse_kl,
)
from tropd_mcore.conformance.oracle.policy import mismatch_weight
from tropd_mcore.conformance.oracle.token import Token


def sdpo(objective: SdpoObjective, token: Token, decide: Decisions) -> Tensor:
    """min(p(x) / p_old(x), ratio_cap) c JSD_alpha on the student's candidates.

    The ratio and the mismatch weight c are constants. Source: SDPO.
    """
    parts = parts_of(token, token.own_candidates, objective.norm)
    ratio = math.exp(float(token.log_p.detach()) - token.old_log_p)
    factor = objective.ratio_cap if decide.above("ratio cap", ratio, objective.ratio_cap) else ratio
    factor *= mismatch_weight(token, objective.policy_gradient, decide)
    return factor * _generalised_jsd(parts, objective.alpha)


def opsd(objective: OpsdObjective, token: Token, decide: Decisions) -> Tensor:
    """sum min(q log(q / p), tau) over the student's candidates, with `tail` also the rest. A clipped entry is constant.

    Source: OPSD.
    """
    entries = []
    for log_p, log_q in parts_of(token, token.own_candidates, objective.norm):
        entry = math.exp(log_q) * (log_q - log_p)
        held = decide.above("entry clip", float(entry.detach()), objective.entry_clip)
        entries.append(objective.entry_clip + 0.0 * entry if held else entry)
    return torch.stack(entries).sum()


def _generalised_jsd(parts: list[Part], alpha: float) -> Tensor:
    """(1 - alpha) KL(p || m) + alpha KL(q || m), m = (1 - alpha) p + alpha q; KL(q || p) for 0, KL(p || q) for 1."""
    if alpha == 0.0:
        return forward_kl(parts)
    if alpha == 1.0:
        return reverse_kl(parts)
    return (1.0 - alpha) * kl_of_student_to_mixture(parts, alpha) + alpha * kl_of_teacher_to_mixture(parts, alpha)
