"""Divergences between teacher q and student p on a few candidates of each token.

Pure functions of log-probs over the full vocabulary. The candidates A are the teacher's top-k or the student's own. The
log-probs are replicated over ranks, so parallelism plays no role here. Gradients flow through the student's log-probs
only.

The *norm* says how the rest of the vocabulary is treated. With m = sum_A q and c = sum_A p:

    truncated        it is left out
    tail             it is one more event, with probability 1 - m under q and 1 - c under p
    renorm           it is left out, and both sides are divided by their mass, m and c
    teacher_renorm   it is left out, and only the teacher is divided by m (forward KL only)

A teacher log-prob of -inf marks an absent candidate. It adds nothing to any sum, nor to m or c.

The derivatives below are in the scaled logits z_v, by dlog p_j/dz_v = [v = j] - p_v.

Shapes: T tokens, K candidates, E events (K, or K + 1 with a tail).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropd_mcore.kernel.full_vocabulary import log_mixture
from tropd_mcore.sentinels import LOGP_FLOOR


def topk_forward_kl(student_topk_logp_TK: Tensor, teacher_topk_logp_TK: Tensor, *, norm: str) -> Tensor:
    """Forward KL(q || p) of each token, nats, [T]; differentiable in the student only.

        truncated        sum_A q log(q / p): below 0 where c > m is possible, and never clamped, because a clamp has no
                         gradient. d/dz_v = m p_v - q_v [v in A]
        tail             truncated + (1 - m) log((1 - m) / (1 - c)) >= 0.
                         d/dz_v = p_v - q_v in A, p_v (1 - (1 - m) / (1 - c)) outside
        renorm           d/dz_v = p_v / c - q_v / m in A, 0 outside
        teacher_renorm   d/dz_v = p_v - q_v / m [v in A]

    Source: TrOPD, FKL_k (truncated); the others normalise the same sum.
    """
    return _forward_kl_entries(student_topk_logp_TK, teacher_topk_logp_TK, norm).sum(dim=1)


def entry_clipped_forward_kl(
    student_topk_logp_TK: Tensor, teacher_topk_logp_TK: Tensor, *, bound: float, norm: str
) -> tuple[Tensor, Tensor]:
    """sum over the events of min(q log(q / p), bound), nats, and the number of clipped events, [T] each.

    An event is clipped if its contribution is above the bound. Differentiable in the student only, and not through a
    clipped event. Contributions below 0, where p > q, are not bounded. With U the events that are not clipped and m_U
    the mass of q on them,

        truncated   d/dz_v = m_U p_v - q_v [v in U]
        tail        the same, and p_v (m_U - (1 - m) / (1 - c)) outside A if the tail is in U

    bound = infinity is `topk_forward_kl`. Source: OPSD, arXiv 2601.18734v3, on the whole vocabulary.
    """
    entry_TE = _forward_kl_entries(student_topk_logp_TK, teacher_topk_logp_TK, norm)
    clipped_TE = entry_TE.detach() > bound
    return entry_TE.masked_fill(clipped_TE, bound).sum(dim=1), clipped_TE.sum(dim=1).to(entry_TE.dtype)


def topk_reverse_kl(student_topk_logp_TK: Tensor, teacher_topk_logp_TK: Tensor, *, norm: str) -> Tensor:
    """Reverse KL(p || q) of each token, nats, [T]; differentiable in the student only.

    With L the value, d = log p - log q and p~ = p / c, q~ = q / m:

        truncated   sum_A p d. d/dz_v = p_v ((d_v + 1) [v in A] - (L + c)): the 1 does not cancel, so candidates lose
                    probability even where p = q, and the value falls below 0 (to -m / e) as c falls
        tail        truncated + (1 - c) d_tail >= 0, d_tail = log((1 - c) / (1 - m)).
                    d/dz_v = p_v (d_v - L), with d_tail outside A
        renorm      sum_A p~ log(p~ / q~) >= 0. d/dz_v = p~_v (log(p~_v / q~_v) - L) in A, 0 outside

    Source: GKD; Revisiting OPD, local support matching (renorm).
    """
    logp_TE, logq_TE, absent_TE = _events(student_topk_logp_TK, teacher_topk_logp_TK, norm)
    return _sum_over(logp_TE.exp() * (logp_TE - logq_TE), absent_TE)


def topk_jensen_shannon(
    student_topk_logp_TK: Tensor, teacher_topk_logp_TK: Tensor, *, beta: float, norm: str
) -> Tensor:
    """beta KL(q || mix) + (1 - beta) KL(p || mix), mix = beta q + (1 - beta) p, of each token, nats, [T].

    0 < beta < 1; differentiable in the student only. Over the events e of the norm, with p and q normalised by it, the
    derivative in log p_e is (1 - beta) p_e log(p_e / mix_e), because the other terms cancel. So unlike the reverse KL,
    truncated has no leftover constant: where p = q it is 0 with gradient 0. Source: GKD, eq. of JSD(beta).
    """
    assert 0.0 < beta < 1.0, f"expected 0 < beta < 1, found {beta}"
    logp_TE, logq_TE, absent_TE = _events(student_topk_logp_TK, teacher_topk_logp_TK, norm)
    mixture_TE = log_mixture(logp_TE, logq_TE, beta)
    teacher_TE = logq_TE.exp() * (logq_TE - mixture_TE)
    student_TE = logp_TE.exp() * (logp_TE - mixture_TE)
    return _sum_over(beta * teacher_TE + (1.0 - beta) * student_TE, absent_TE)


def clipped_reverse_kl(student_topk_logp_TK: Tensor, teacher_topk_logp_TK: Tensor, *, bound: float) -> Tensor:
    """sum_A p~ clamp(log(p~ / q~), -bound, bound) of each token, [T]; `renorm`, differentiable in the student only.

    The clamped log-ratio is a constant: d/dz_v = p~_v (clamp_v - value). If nothing is clamped, this is the gradient of
    the reverse KL. Differentiating through the clamp would add 1 to the unclamped candidates only, and so take
    probability from the candidates on which teacher and student agree.
    """
    logp_TE, logq_TE, absent_TE = _events(student_topk_logp_TK, teacher_topk_logp_TK, "renorm")
    log_ratio_TE = (logp_TE - logq_TE).detach().clamp(-bound, bound)
    return _sum_over(logp_TE.exp() * log_ratio_TE, absent_TE)


def candidate_tv(student_topk_logp_TK: Tensor, teacher_topk_logp_TK: Tensor) -> Tensor:
    """Total variation distance of the two on A and the rest as one more event, [T]; NaN without candidates.

    1/2 (sum_A |p - q| + |(1 - c) - (1 - m)|). A lower bound of the distance over the vocabulary, which is at most
    min(1 - c, 1 - m) larger.
    """
    absent_TK = teacher_topk_logp_TK == -math.inf
    p_TK, q_TK = (logp.exp().masked_fill(absent_TK, 0.0) for logp in (student_topk_logp_TK, teacher_topk_logp_TK))
    difference_TK = p_TK - q_TK
    tv_T = 0.5 * (difference_TK.abs().sum(dim=1) + difference_TK.sum(dim=1).abs())
    return tv_T.masked_fill(absent_TK.all(dim=1), math.nan)


def _forward_kl_entries(student_TK: Tensor, teacher_TK: Tensor, norm: str) -> Tensor:
    """q log(q / p) of each event, [T, E]; 0 if the event does not count."""
    logp_TE, logq_TE, absent_TE = _events(student_TK, teacher_TK, norm)
    return (logq_TE.exp() * (logq_TE - logp_TE)).masked_fill(absent_TE, 0.0)


def _events(student_TK: Tensor, teacher_TK: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, log q, does not count) of the events that `norm` makes of the candidates, [T, E] each."""
    # LOGP_FLOOR instead of -inf: the absent entries are masked at the end, and 0 * inf would be NaN before that.
    absent_TK = teacher_TK == -math.inf
    logp_TK = student_TK.masked_fill(absent_TK, LOGP_FLOOR)
    logq_TK = teacher_TK.detach().masked_fill(absent_TK, LOGP_FLOOR)
    if norm == "truncated":
        return logp_TK, logq_TK, absent_TK
    if norm == "tail":
        with_tail = [torch.cat([logp, _log_tail_mass(logp)[:, None]], dim=1) for logp in (logp_TK, logq_TK)]
        return with_tail[0], with_tail[1], torch.nn.functional.pad(absent_TK, (0, 1), value=False)
    if norm == "renorm":
        return logp_TK.log_softmax(dim=1), logq_TK.log_softmax(dim=1), absent_TK
    assert norm == "teacher_renorm", f"unknown norm {norm!r}"
    return logp_TK, logq_TK.log_softmax(dim=1), absent_TK


def _sum_over(value_TE: Tensor, absent_TE: Tensor) -> Tensor:
    return value_TE.masked_fill(absent_TE, 0.0).sum(dim=1)


def _log_tail_mass(logp_TK: Tensor) -> Tensor:
    """log(1 - sum_A p), [T]. The mass of A is kept one rounding step below 1, because at 1 the log would be -inf."""
    log_mass_T = logp_TK.logsumexp(dim=1).clamp_max(-torch.finfo(logp_TK.dtype).eps)
    return (-torch.expm1(log_mass_T)).log()
