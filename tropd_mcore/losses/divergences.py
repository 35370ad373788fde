"""Divergences between teacher q and student p on the teacher's top-k tokens.

Pure functions of log-probs that are taken over the full vocabulary. Not for parallelism: the log-probs are replicated.

Shapes: T tokens, K teacher top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGP_FLOOR = -50.0
"""Least teacher log-prob (nats), against -inf: e^-50 = 2e-22 times any finite log-prob is 0 in float32."""


def topk_forward_kl(student_topk_logp_TK: Tensor, teacher_topk_logp_TK: Tensor, *, norm: str) -> Tensor:
    """Forward KL(q || p) of each token on the teacher's top-k A, nats, [T]; differentiable in the student only.

    With m = sum_A q and c = sum_A p:

        truncated        sum_A q log(q / p): no normalisation; below 0 where c > m is possible, and never clamped,
                         because a clamp has no gradient. d/dz_v = m p_v - q_v [v in A]
        tail             truncated + (1 - m) log((1 - m) / (1 - c)): the rest of the vocabulary as one bucket, >= 0.
                         d/dz_v = p_v - q_v in A, p_v (1 - (1 - m) / (1 - c)) outside
        renorm           both renormalised on A. d/dz_v = p_v / c - q_v / m in A, 0 outside
        teacher_renorm   q / m against p. d/dz_v = p_v - q_v / m [v in A]

    A teacher log-prob of -inf means no such entry: it adds nothing to the sum, nor to m or c.
    Source: TrOPD, FKL_k (truncated); the others normalise the same sum.
    """
    absent_TK = teacher_topk_logp_TK == float("-inf")
    student_TK = student_topk_logp_TK.masked_fill(absent_TK, LOGP_FLOOR)
    teacher_TK = teacher_topk_logp_TK.detach().clamp_min(LOGP_FLOOR)
    if norm == "truncated":
        return _sum_q_log_ratio(teacher_TK, student_TK, absent_TK)
    if norm == "tail":
        log_q_tail_T, log_p_tail_T = _log_tail_mass(teacher_TK), _log_tail_mass(student_TK)
        tail_T = log_q_tail_T.exp() * (log_q_tail_T - log_p_tail_T)
        return _sum_q_log_ratio(teacher_TK, student_TK, absent_TK) + tail_T
    if norm == "renorm":
        return _sum_q_log_ratio(teacher_TK.log_softmax(dim=1), student_TK.log_softmax(dim=1), absent_TK)
    assert norm == "teacher_renorm", f"unknown norm {norm!r}"
    return _sum_q_log_ratio(teacher_TK.log_softmax(dim=1), student_TK, absent_TK)


def _sum_q_log_ratio(logq_TK: Tensor, logp_TK: Tensor, absent_TK: Tensor) -> Tensor:
    return (logq_TK.exp() * (logq_TK - logp_TK)).masked_fill(absent_TK, 0.0).sum(dim=1)


def _log_tail_mass(logp_TK: Tensor) -> Tensor:
    """log(1 - sum_A p), [T]; the mass of A is kept one rounding step below 1, where the log would be -inf."""
    log_mass_T = logp_TK.logsumexp(dim=1).clamp_max(-torch.finfo(logp_TK.dtype).eps)
    return (-torch.expm1(log_mass_T)).log()
