"""Oracles of the losses: float64 NumPy, one token at a time, written from the equations.

This module is slow and only for tests. Invariant: it imports nothing from the package under test. A gradient is the
analytic formula over the full vocabulary, not automatic differentiation.

Names: z student logits, p and q full distributions of student and teacher, x the sampled token, A the teacher's top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def log_softmax(z: Array, temperature: float = 1.0) -> Array:
    """log p over the vocabulary for one token."""
    scaled = np.asarray(z, dtype=np.float64) / temperature
    top = scaled.max()
    return scaled - (top + math.log(np.exp(scaled - top).sum()))


def entropy(z: Array, temperature: float = 1.0) -> float:
    log_p = log_softmax(z, temperature)
    return float(-sum(math.exp(value) * value for value in log_p))


def support(logits: Array, ids: IntArray, temperature: float = 1.0) -> tuple[Array, Array]:
    """Log-probs [T, J] of the ids (0 where the id is -1) and entropy [T]."""
    log_probs = np.zeros(ids.shape)
    entropies = np.zeros(len(logits))
    for token, z in enumerate(logits):
        log_p = log_softmax(z, temperature)
        entropies[token] = entropy(z, temperature)
        for slot, vocabulary_id in enumerate(ids[token]):
            if vocabulary_id >= 0:
                log_probs[token, slot] = log_p[vocabulary_id]
    return log_probs, entropies


def support_gradient(
    logits: Array, ids: IntArray, grad_log_probs: Array, grad_entropy: Array, temperature: float = 1.0
) -> Array:
    """Gradient [T, V] in the logits of sum(grad_log_probs * log_probs) + sum(grad_entropy * entropy)."""
    gradient = np.zeros(logits.shape)
    for token, z in enumerate(logits):
        log_p = log_softmax(z, temperature)
        p = np.exp(log_p)
        for slot, vocabulary_id in enumerate(ids[token]):
            if vocabulary_id >= 0:
                gradient[token] -= grad_log_probs[token, slot] * p
                gradient[token, vocabulary_id] += grad_log_probs[token, slot]
        gradient[token] -= grad_entropy[token] * p * (log_p + entropy(z, temperature))
    return gradient / temperature


def top_ids(z: Array, k: int) -> list[int]:
    """The k best ids by (value descending, id ascending)."""
    return sorted(range(len(z)), key=lambda vocabulary_id: (-float(z[vocabulary_id]), vocabulary_id))[:k]


def forward_kl(log_q: Array, log_p: Array, ids: list[int], norm: str) -> float:
    """KL(q || p) on the ids, by the four normalisations."""
    m, c = sum(math.exp(log_q[v]) for v in ids), sum(math.exp(log_p[v]) for v in ids)
    truncated = sum(math.exp(log_q[v]) * (log_q[v] - log_p[v]) for v in ids)
    if norm == "truncated":
        return truncated
    if norm == "tail":
        return truncated + ((1 - m) * math.log((1 - m) / (1 - c)) if m < 1 else 0.0)
    if norm == "renorm":
        return sum(math.exp(log_q[v]) / m * (log_q[v] - math.log(m) - log_p[v] + math.log(c)) for v in ids)
    assert norm == "teacher_renorm"
    return sum(math.exp(log_q[v]) / m * (log_q[v] - math.log(m) - log_p[v]) for v in ids)


def forward_kl_gradient(log_q: Array, log_p: Array, ids: list[int], norm: str) -> Array:
    """Gradient [V] of `forward_kl` in the student's logits."""
    q, p = np.exp(log_q), np.exp(log_p)
    m, c = sum(q[v] for v in ids), sum(p[v] for v in ids)
    gradient = np.zeros(len(p))
    for v in range(len(p)):
        inside = v in ids
        if norm == "truncated":
            gradient[v] = m * p[v] - (q[v] if inside else 0.0)
        elif norm == "tail":
            gradient[v] = p[v] - (q[v] if inside else (1 - m) * p[v] / (1 - c))
        elif norm == "renorm":
            gradient[v] = p[v] / c - q[v] / m if inside else 0.0
        else:
            assert norm == "teacher_renorm"
            gradient[v] = p[v] - (q[v] / m if inside else 0.0)
    return gradient


@dataclass(frozen=True)
class Token:
    """One supervised token: the distributions at its position, and what was drawn there."""

    z: Array
    old_z: Array
    """the student's logits before the first update, from which x was drawn"""
    log_q: Array
    x: int
    u: float
    rollout_logp: float
    origin: str
    """`student`, `prefix`, or `none` (does not count)"""
    weight: float


@dataclass(frozen=True)
class TokenResult:
    surrogate: float
    gradient: Array
    """d surrogate / d z over the full vocabulary"""
    value: float
    advantage: float
    trusted: float
    log_ratio: float
    divergence: float
    ratio: float
    clipped: float


@dataclass(frozen=True)
class Policy:
    """The policy-gradient loss of one sampled token."""

    loss: float
    slope: float
    """d loss / d log p(x)"""
    ratio: float
    clipped: float


def trust(log_ratio: float, mode: str, u: float, threshold: float) -> float:
    rho = math.exp(log_ratio)
    if mode == "bernoulli":
        return 1.0 if u < rho else 0.0
    if mode == "soft":
        return min(rho, 1.0)
    if mode == "threshold":
        return 1.0 if log_ratio > threshold else 0.0
    assert mode == "none"
    return 1.0


def engine_weight(logp: float, rollout_logp: float, settings: dict[str, Any]) -> float:
    """Weight for the mismatch of trainer and sampler."""
    trainer, sampler = math.exp(logp), math.exp(rollout_logp)
    mode = settings["mismatch"]
    if mode == "off":
        return 1.0
    if mode == "tis":
        return min(trainer / sampler, settings["tis_cap"])
    if mode == "icepop":
        return trainer / sampler if settings["icepop_low"] <= trainer / sampler <= settings["icepop_high"] else 0.0
    assert mode == "mask"
    return 0.0 if trainer - sampler < settings["mask_below"] else 1.0


def policy(advantage: float, logp: float, anchor_logp: float, settings: dict[str, Any]) -> Policy:
    """By cases. A > 0 clips a ratio above the band. A < 0 clips one below it or above the dual clip."""
    if settings["ratio"] == "none":
        return Policy(-advantage * logp, -advantage, 1.0, 0.0)
    w = math.exp(logp - anchor_logp)
    free = Policy(-advantage * w, -advantage * w, w, 0.0)
    if settings["ratio"] == "importance":
        return free
    assert settings["ratio"] == "ppo_clip"
    low, high, dual = 1.0 - settings["clip_low"], 1.0 + settings["clip_high"], settings["dual_clip"]
    if advantage > 0 and w > high:
        return Policy(-advantage * high, 0.0, w, 1.0)
    if advantage < 0 and w < low:
        return Policy(-advantage * low, 0.0, w, 1.0)
    if advantage < 0 and dual is not None and w > dual:
        return Policy(-advantage * dual, 0.0, w, 1.0)
    return free


def tropd_token(token: Token, k: int, settings: dict[str, Any]) -> TokenResult:
    """Loss and gradient of one token, by cases; `settings` has the keywords of the objective and of its policy."""
    vocabulary = len(token.z)
    log_p, old_log_p = log_softmax(token.z), log_softmax(token.old_z)
    p = np.exp(log_p)
    ids = top_ids(token.log_q, k)
    fkl = forward_kl(token.log_q, log_p, ids, settings["outlier_norm"])
    fkl_gradient = forward_kl_gradient(token.log_q, log_p, ids, settings["outlier_norm"])
    r = float(token.log_q[token.x] - old_log_p[token.x])
    log_p_gradient = np.array([(1.0 if v == token.x else 0.0) - p[v] for v in range(vocabulary)])

    if token.origin == "none":
        return TokenResult(0.0, np.zeros(vocabulary), 0.0, 0.0, 0.0, r, math.nan, 1.0, 0.0)
    if token.origin == "prefix":
        beta, loss = settings["beta"], settings["prefix_loss"]
        advantage = {"nll": beta, "scalar_adv": beta * (old_log_p[token.x] - token.log_q[token.x])}.get(loss, 0.0)
        divergence_weight = beta if loss == "topk_fkl" else 0.0
        value = {"nll": beta * r, "scalar_adv": beta * r, "topk_fkl": beta * fkl, "none": 0.0}[loss]
        trusted = 0.0
        sampled = Policy(-advantage * float(log_p[token.x]), -advantage, 1.0, 0.0)
    else:
        reward, clip = r, settings["advantage_clip"]
        if clip is not None:
            reward = max(-clip, min(clip, r))
        mode = settings["outlier_mode"]
        if mode in ("mask", "clip"):
            trusted = 1.0 if r > settings["clip_tau"] else 0.0
        else:
            trusted = trust(r, settings["trust_mode"], token.u, settings["trust_threshold"])
        outlier = (1.0 - trusted) * settings["outlier_weight"]
        advantage = trusted * reward
        divergence_weight = 0.0
        if mode == "fkl_direct":
            divergence_weight = outlier
        elif mode == "fkl_scalar":
            advantage -= outlier * fkl
        elif mode == "clip":
            advantage += outlier * settings["clip_tau"]
        value = -advantage + divergence_weight * fkl
        advantage *= engine_weight(float(old_log_p[token.x]), token.rollout_logp, settings)
        sampled = policy(advantage, float(log_p[token.x]), float(old_log_p[token.x]), settings)
    return TokenResult(
        surrogate=token.weight * (sampled.loss + divergence_weight * fkl),
        gradient=token.weight * (sampled.slope * log_p_gradient + divergence_weight * fkl_gradient),
        value=value,
        advantage=advantage,
        trusted=trusted,
        log_ratio=r,
        divergence=fkl,
        ratio=sampled.ratio,
        clipped=sampled.clipped,
    )
