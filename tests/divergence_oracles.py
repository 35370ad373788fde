"""Oracles of the divergences between teacher and student: float64 NumPy, one token at a time, from the equations.

This module is slow and only for tests. Invariant: it imports nothing from the package under test. A gradient is the
analytic formula over the full vocabulary, not automatic differentiation.

Names: p and q full distributions of student and teacher, A the candidates, P and Q their mass on A. Kinds: `fkl`
KL(q || p), `rkl` KL(p || q), `jsd` beta KL(q || mix) + (1 - beta) KL(p || mix) with mix = beta q + (1 - beta) p.
"""

from __future__ import annotations

import math

import numpy as np

from tests.oracles import Array, forward_kl, forward_kl_gradient


def divergence(kind: str, log_q: Array, log_p: Array, ids: list[int], norm: str, beta: float = 0.5) -> float:
    """The divergence on the candidates; norms truncated, tail, renorm (fkl also teacher_renorm)."""
    if kind == "fkl":
        return forward_kl(log_q, log_p, ids, norm)
    total = 0.0
    for p, q in _events(log_q, log_p, ids, norm):
        if kind == "rkl":
            total += _x_log_x_over(p, q)
        else:
            mix = beta * q + (1 - beta) * p
            total += beta * _x_log_x_over(q, mix) + (1 - beta) * _x_log_x_over(p, mix)
    return total


def divergence_gradient(kind: str, log_q: Array, log_p: Array, ids: list[int], norm: str, beta: float = 0.5) -> Array:
    """Gradient [V] of `divergence` in the student's logits."""
    if kind == "fkl":
        return forward_kl_gradient(log_q, log_p, ids, norm)
    p, q = np.exp(log_p), np.exp(log_q)
    mass_p, mass_q = sum(p[v] for v in ids), sum(q[v] for v in ids)
    tail_p, tail_q = 1 - mass_p, 1 - mass_q
    value = divergence("rkl", log_q, log_p, ids, norm) if kind == "rkl" else 0.0
    if kind == "jsd":
        value = sum(_x_log_x_over(a, beta * b + (1 - beta) * a) for a, b in _events(log_q, log_p, ids, norm))
    gradient, support = np.zeros(len(p)), set(ids)
    for v in range(len(p)):
        inside = v in support
        if norm == "renorm":
            if inside:
                a, b = p[v] / mass_p, q[v] / mass_q
                gradient[v] = a * (_excess(kind, a, b, beta) - value)
        elif norm == "tail":
            excess = _excess(kind, p[v], q[v], beta) if inside else _excess(kind, tail_p, tail_q, beta)
            gradient[v] = p[v] * (excess - value)
        else:
            assert norm == "truncated"
            uncancelled = 1.0 if kind == "rkl" else 0.0
            here = _excess(kind, p[v], q[v], beta) + uncancelled if inside else 0.0
            gradient[v] = p[v] * (here - (value + uncancelled * mass_p))
    return gradient if kind == "rkl" else (1 - beta) * gradient


def exact(kind: str, log_q: Array, log_p: Array, beta: float = 0.5) -> float:
    """The divergence over the whole vocabulary."""
    return divergence(kind, log_q, log_p, list(range(len(log_p))), "renorm", beta)


def exact_gradient(kind: str, log_q: Array, log_p: Array, beta: float = 0.5) -> Array:
    """Gradient [V] of `exact` in the student's logits."""
    return divergence_gradient(kind, log_q, log_p, list(range(len(log_p))), "renorm", beta)


def _events(log_q: Array, log_p: Array, ids: list[int], norm: str) -> list[tuple[float, float]]:
    """(p, q) of each event into which the norm turns the candidates."""
    pairs = [(math.exp(log_p[v]), math.exp(log_q[v])) for v in ids]
    mass_p, mass_q = sum(p for p, _ in pairs), sum(q for _, q in pairs)
    if norm == "renorm":
        return [(p / mass_p, q / mass_q) for p, q in pairs]
    if norm == "tail":
        return [*pairs, (1 - mass_p, 1 - mass_q)]
    assert norm == "truncated"
    return pairs


def _x_log_x_over(x: float, y: float) -> float:
    return x * (math.log(x) - math.log(y)) if x > 0 else 0.0


def _excess(kind: str, p: float, q: float, beta: float) -> float:
    """log p - log q, or log p - log mix."""
    other = q if kind == "rkl" else beta * q + (1 - beta) * p
    return math.log(p) - math.log(other) if p > 0 else 0.0
