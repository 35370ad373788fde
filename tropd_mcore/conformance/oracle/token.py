"""One token, with everything that an objective may use, over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tropd_mcore.conformance.batch import Tokens


@dataclass(frozen=True)
class Candidate:
    """A vocabulary entry that teacher or student proposes."""

    vocabulary_id: int
    log_q: float
    old_log_p: float | None
    """None if it was not kept"""


@dataclass(frozen=True)
class Token:
    """A token in one of the masks. Only log p is differentiable; everything else is constant."""

    log_p_V: Tensor
    log_q_V: Tensor
    """of the teacher's last layer, for divergences over the whole vocabulary"""
    x: int
    log_q: float
    """of x, as is everything below"""
    old_log_p: float
    rollout_log_p: float
    reference_log_p: float
    teacher_entropy: float
    trust_u: float
    sampled_by_student: bool
    teacher_candidates: tuple[Candidate, ...]
    own_candidates: tuple[Candidate, ...]
    statistic: float
    """the objective's batch statistic of the token; 1 if it has none"""
    progress: float
    """step / run.steps"""

    @property
    def log_p(self) -> Tensor:
        """log p(x), differentiable."""
        return self.log_p_V[self.x]

    @property
    def log_ratio(self) -> float:
        """r = log q(x) - log p_old(x)."""
        return self.log_q - self.old_log_p


def make_token(tokens: Tokens, row: int, log_p_V: Tensor, log_q_V: Tensor, statistic: float, progress: float) -> Token:
    """Return the token of row `row` of a case, without absent candidates."""
    topk = zip(tokens.topk_ids_TK[row].tolist(), tokens.teacher_topk_logp_TK[row].tolist(), strict=True)
    own = zip(
        tokens.own_ids_TL[row].tolist(),
        tokens.teacher_own_logp_TL[row].tolist(),
        tokens.old_own_logp_TL[row].tolist(),
        strict=True,
    )
    return Token(
        log_p_V=log_p_V,
        log_q_V=log_q_V,
        x=int(tokens.target_ids_T[row]),
        log_q=float(tokens.teacher_logp_T[row]),
        old_log_p=float(tokens.old_logp_T[row]),
        rollout_log_p=float(tokens.rollout_logp_T[row]),
        reference_log_p=float(tokens.reference_logp_T[row]),
        teacher_entropy=float(tokens.teacher_entropy_T[row]),
        trust_u=float(tokens.trust_u_T[row]),
        sampled_by_student=bool(tokens.student_mask_T[row]),
        teacher_candidates=tuple(Candidate(v, log_q, None) for v, log_q in topk if log_q > -math.inf),
        own_candidates=tuple(Candidate(v, log_q, old) for v, log_q, old in own if log_q > -math.inf),
        statistic=statistic,
        progress=progress,
    )
