"""Divergences between teacher q and student p on a set of candidates, as sums over parts.

With m and c the mass of q and p on the candidates, the parts are

    truncated        (p, q) of each candidate
    tail             the same, and the rest of the vocabulary as one part (1 - c, 1 - m)
    renorm           (p / c, q / m) of each candidate
    teacher_renorm   (p, q / m) of each candidate
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tropd_mcore.conformance.oracle.token import Candidate, Token

Part = tuple[Tensor, float]
"""(log p, log q)"""


def parts_of(token: Token, candidates: Iterable[Candidate], norm: str) -> list[Part]:
    """Return the parts of a candidate set. Each candidate counts once."""
    chosen = {candidate.vocabulary_id: candidate.log_q for candidate in candidates}
    pairs = [(token.log_p_V[vocabulary_id], log_q) for vocabulary_id, log_q in chosen.items()]
    student_mass = torch.stack([log_p.exp() for log_p, _ in pairs]).sum()
    teacher_mass = sum(math.exp(log_q) for _, log_q in pairs)
    if norm == "truncated":
        return pairs
    if norm == "tail":
        return [*pairs, ((1.0 - student_mass).log(), math.log(1.0 - teacher_mass))]
    if norm == "renorm":
        return [(log_p - student_mass.log(), log_q - math.log(teacher_mass)) for log_p, log_q in pairs]
    assert norm == "teacher_renorm", norm
    return [(log_p, log_q - math.log(teacher_mass)) for log_p, log_q in pairs]


def whole_vocabulary(token: Token) -> list[Part]:
    """Every vocabulary entry."""
    return list(zip(token.log_p_V.unbind(), token.log_q_V.tolist(), strict=True))


def forward_kl(parts: list[Part]) -> Tensor:
    """sum q log(q / p)."""
    return torch.stack([math.exp(log_q) * (log_q - log_p) for log_p, log_q in parts]).sum()


def reverse_kl(parts: list[Part]) -> Tensor:
    """sum p log(p / q)."""
    return torch.stack([log_p.exp() * (log_p - log_q) for log_p, log_q in parts]).sum()


def kl_of_teacher_to_mixture(parts: list[Part], teacher_weight: float) -> Tensor:
    """sum q log(q / m), m = teacher_weight q + (1 - teacher_weight) p."""
    return torch.stack(
        [math.exp(log_q) * (log_q - _log_mixture(log_p, log_q, teacher_weight)) for log_p, log_q in parts]
    ).sum()


def kl_of_student_to_mixture(parts: list[Part], teacher_weight: float) -> Tensor:
    """sum p log(p / m), m = teacher_weight q + (1 - teacher_weight) p."""
    return torch.stack(
        [log_p.exp() * (log_p - _log_mixture(log_p, log_q, teacher_weight)) for log_p, log_q in parts]
    ).sum()


def _log_mixture(log_p: Tensor, log_q: float, teacher_weight: float) -> Tensor:
    return (teacher_weight * math.exp(log_q) + (1.0 - teacher_weight) * log_p.exp()).log()
