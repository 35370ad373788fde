"""Claims about the losses that are checked for the real modules and must fail for mutated ones.

Each claim runs on every rank of the default group, gets the modules to check, and raises AssertionError where it does
not hold. Expectations over the sampled token (and over the gate) are exact: one row a possible outcome, weighted by its
probability. The shard layout is uneven, with padding columns that hold large numbers.

Shapes: T rows, V vocabulary (8), K teacher top-k (3), W width of this rank's shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tropd_vector.json").read_text(encoding="utf-8"))
VOCABULARY = 8
SHARD_STARTS = {1: (0, 11), 2: (0, 5, 11), 3: (0, 2, 9, 11)}
"""Shard borders by world size: V = 8 is padded to 11, and the third of three ranks owns padding only."""
PADDING_LOGIT = 7.0
ALMOST_ONE = 1.0 - 1e-12
"""A uniform that rejects every token that can be rejected."""
TOLERANCE = 1.5e-6
"""The golden vectors have 6 decimals."""

SETTINGS: dict[str, Any] = {
    "trust_mode": "bernoulli",
    "trust_threshold": GOLDEN["clip_tau"],
    "outlier_mode": "fkl_direct",
    "outlier_weight": 1.0,
    "outlier_norm": "truncated",
    "clip_tau": GOLDEN["clip_tau"],
    "beta": 1.0,
    "prefix_loss": "nll",
    "mismatch": "off",
    "tis_cap": 2.0,
    "icepop_low": 0.5,
    "icepop_high": 5.0,
    "mask_below": -0.2,
    "advantage_clip": None,
}
"""Keywords of the objective; a claim overrides what it is about."""


@dataclass(frozen=True)
class Losses:
    """The modules under test: the real ones, or a mutant in place of one of them."""

    support: ModuleType
    objectives: ModuleType
    divergences: ModuleType
    trust: ModuleType


Claim = Callable[[Losses], None]


@dataclass(frozen=True)
class Outcomes:
    """Rows of an exact expectation: which token is drawn, the gate's uniform, and the probability of both."""

    x: list[int]
    u: list[float]
    probability: list[float]
    origin: str = "student"


def student_draws() -> Outcomes:
    """x ~ p, for gates that draw nothing."""
    p = np.exp(_log_softmax(GOLDEN["student_logits"]))
    return Outcomes(list(range(VOCABULARY)), [0.5] * VOCABULARY, p.tolist())


def student_draws_and_gate() -> Outcomes:
    """x ~ p and u ~ U[0, 1): each x once accepted (u = 0) and once rejected, if it can be."""
    log_p, log_q = _log_softmax(GOLDEN["student_logits"]), _log_softmax(GOLDEN["teacher_logits"])
    p, accept = np.exp(log_p), np.minimum(np.exp(log_q - log_p), 1.0)
    every = list(range(VOCABULARY))
    return Outcomes(
        every + every, [0.0] * VOCABULARY + [ALMOST_ONE] * VOCABULARY, [*(p * accept), *(p * (1.0 - accept))]
    )


def teacher_draws() -> Outcomes:
    """x ~ q: prefix tokens."""
    q = np.exp(_log_softmax(GOLDEN["teacher_logits"]))
    return Outcomes(list(range(VOCABULARY)), [0.5] * VOCABULARY, q.tolist(), origin="prefix")


def golden_result(losses: Losses, outcomes: Outcomes, **changed: Any) -> tuple[Any, Tensor]:
    """ObjectiveOutput over the outcomes, and the expected gradient [V] in the student's logits, from all ranks."""
    rows = len(outcomes.x)
    logits_TW, shard = this_shard(losses, torch.tensor([GOLDEN["student_logits"]] * rows, dtype=torch.float64))
    logits_TW.requires_grad_(True)
    x_T, topk_ids = torch.tensor(outcomes.x), GOLDEN["teacher_topk_ids"]
    ids_TJ = torch.cat([x_T[:, None], torch.tensor([topk_ids] * rows)], dim=1)
    logp_TJ, entropy_T = losses.support.support_log_probs(
        logits_TW, ids_TJ, shard=shard, group=dist.group.WORLD, chunk_tokens=3
    )
    log_q_V = torch.from_numpy(_log_softmax(GOLDEN["teacher_logits"]))
    is_student = torch.full((rows,), outcomes.origin == "student")
    inputs = losses.objectives.TokenInputs(
        student_logp_T=logp_TJ[:, 0],
        student_topk_logp_TK=logp_TJ[:, 1:],
        student_entropy_T=entropy_T,
        teacher_logp_T=log_q_V[x_T],
        teacher_topk_logp_TK=log_q_V[topk_ids].expand(rows, -1),
        behav_logp_T=logp_TJ[:, 0].detach(),
        trust_u_T=torch.tensor(outcomes.u, dtype=torch.float64),
        on_mask_T=is_student,
        off_mask_T=~is_student,
        weight_T=torch.tensor(outcomes.probability, dtype=torch.float64),
    )
    output = losses.objectives.tropd(inputs, **{**SETTINGS, **changed})
    output.loss_sum.backward()
    assert logits_TW.grad is not None
    return output, whole_vocabulary(logits_TW.grad, shard).sum(dim=0)


def this_shard(losses: Losses, logits_TV: Tensor) -> tuple[Tensor, Any]:
    """This rank's columns of the logits, padding included, and the VocabShard."""
    borders = SHARD_STARTS[dist.get_world_size()]
    start, stop = borders[dist.get_rank()], borders[dist.get_rank() + 1]
    padding = torch.full((logits_TV.shape[0], borders[-1] - VOCABULARY), PADDING_LOGIT, dtype=logits_TV.dtype)
    shard = losses.support.VocabShard(start, stop, VOCABULARY)
    return torch.cat([logits_TV, padding], dim=1)[:, start:stop].clone(), shard


def whole_vocabulary(gradient_TW: Tensor, shard: Any) -> Tensor:
    """All ranks' gradients side by side, [T, V]; those of the padding must be 0."""
    padded = SHARD_STARTS[dist.get_world_size()][-1]
    gradient = torch.zeros(gradient_TW.shape[0], padded, dtype=gradient_TW.dtype)
    gradient[:, shard.start : shard.stop] = gradient_TW
    dist.all_reduce(gradient)
    assert torch.equal(gradient[:, VOCABULARY:], torch.zeros_like(gradient[:, VOCABULARY:])), "padding has a gradient"
    return gradient[:, :VOCABULARY]


def _log_softmax(logits: list[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    z = np.array(logits)
    return z - np.log(np.exp(z).sum())


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    error = np.abs(np.asarray(actual, dtype=np.float64) - np.asarray(expected, dtype=np.float64)).max()
    assert error <= tolerance, f"largest error {error:.3g} > {tolerance:.3g}"


# ---- claims ----


def log_probs_entropy_and_masses_are_golden(losses: Losses) -> None:
    output, _ = golden_result(losses, student_draws(), trust_mode="soft")
    assert_close(output.columns["log_ratio"], GOLDEN["log_ratio"])
    assert_close(output.columns["trusted"], GOLDEN["trust_probability"])
    assert_close(output.columns["teacher_mass"], GOLDEN["teacher_mass"], 1e-9)
    assert_close(output.columns["student_mass"], GOLDEN["student_mass"], 1e-9)
    for name, entropy in (("student_logits", "student_entropy"), ("teacher_logits", "teacher_entropy")):
        logits_TW, shard = this_shard(losses, torch.tensor([GOLDEN[name]], dtype=torch.float64))
        logp_TJ, entropy_T = losses.support.support_log_probs(
            logits_TW, torch.arange(VOCABULARY)[None], shard=shard, group=dist.group.WORLD, chunk_tokens=1
        )
        assert_close(logp_TJ[0], GOLDEN["log_p" if name == "student_logits" else "log_q"])
        assert_close(entropy_T, GOLDEN[entropy], 1e-9)


def expected_k1_gradient_is_the_reverse_kl_gradient(losses: Losses) -> None:
    output, gradient_V = golden_result(losses, student_draws(), trust_mode="none")
    assert_close(gradient_V, GOLDEN["reverse_kl_gradient"])
    p = np.array(student_draws().probability)
    assert_close((p * output.columns["loss"].numpy()).sum(), GOLDEN["reverse_kl"], 1e-9)


def outlier_fraction_is_the_total_variation(losses: Losses) -> None:
    for outcomes, mode in ((student_draws_and_gate(), "bernoulli"), (student_draws(), "soft")):
        output, _ = golden_result(losses, outcomes, trust_mode=mode)
        outlier_fraction = (np.array(outcomes.probability) * (1.0 - output.columns["trusted"].numpy())).sum()
        assert_close(outlier_fraction, GOLDEN["total_variation"], 1e-9)


def topk_forward_kl_and_its_gradient_are_golden(losses: Losses) -> None:
    """Every token distrusted: only the direct FKL is left (probabilities sum to 1, so the sum is the FKL itself)."""
    for norm, value in GOLDEN["forward_kl_topk"].items():
        output, gradient_V = golden_result(
            losses, student_draws(), trust_mode="threshold", trust_threshold=99.0, outlier_norm=norm
        )
        assert_close(output.loss_sum.detach(), value, 1e-9)
        assert_close(output.columns["divergence"], value, 1e-9)
        assert_close(gradient_V, GOLDEN["forward_kl_topk_gradient"][norm])


def trusted_term_has_the_golden_expected_gradient(losses: Losses) -> None:
    for outcomes, mode in ((student_draws_and_gate(), "bernoulli"), (student_draws(), "soft")):
        _, gradient_V = golden_result(losses, outcomes, trust_mode=mode, outlier_weight=0.0)
        assert_close(gradient_V, GOLDEN["expected_gradient"]["trust_only"])


def fkl_direct_has_the_golden_expected_gradient(losses: Losses) -> None:
    for outcomes, mode in ((student_draws_and_gate(), "bernoulli"), (student_draws(), "soft")):
        _, gradient_V = golden_result(losses, outcomes, trust_mode=mode, outlier_mode="fkl_direct")
        assert_close(gradient_V, GOLDEN["expected_gradient"]["fkl_direct"])


def fkl_scalar_has_the_golden_expected_gradient(losses: Losses) -> None:
    for outcomes, mode in ((student_draws_and_gate(), "bernoulli"), (student_draws(), "soft")):
        _, gradient_V = golden_result(losses, outcomes, trust_mode=mode, outlier_mode="fkl_scalar")
        assert_close(gradient_V, GOLDEN["expected_gradient"]["fkl_scalar"])


def clip_floors_the_advantage_and_mask_drops_it(losses: Losses) -> None:
    for mode in ("clip", "mask"):
        output, _ = golden_result(losses, student_draws(), outlier_mode=mode)
        assert_close(output.columns["advantage"], GOLDEN[f"{mode}_advantage"])


def advantage_has_the_golden_mean_and_variance(losses: Losses) -> None:
    cases: tuple[tuple[str, Outcomes, str, str], ...] = (
        ("opd", student_draws(), "none", "opd"),
        ("bernoulli", student_draws_and_gate(), "bernoulli", "trust_only"),
        ("soft", student_draws(), "soft", "trust_only"),
    )
    for name, outcomes, mode, mean_name in cases:
        output, _ = golden_result(losses, outcomes, trust_mode=mode, outlier_weight=0.0)
        probability, advantage = np.array(outcomes.probability), output.columns["advantage"].numpy()
        mean = (probability * advantage).sum()
        assert_close(mean, GOLDEN["advantage_mean"][mean_name], 1e-7)
        assert_close((probability * (advantage - mean) ** 2).sum(), GOLDEN["advantage_variance"][name])


def nll_guidance_follows_the_forward_kl_gradient(losses: Losses) -> None:
    output, gradient_V = golden_result(losses, teacher_draws(), prefix_loss="nll")
    assert_close(gradient_V, GOLDEN["guidance_gradient"]["nll"])
    value = (np.array(teacher_draws().probability) * output.columns["loss"].numpy()).sum()
    assert_close(value, GOLDEN["forward_kl"], 1e-9)


def scalar_guidance_points_away_from_the_teacher(losses: Losses) -> None:
    _, gradient_V = golden_result(losses, teacher_draws(), prefix_loss="scalar_adv")
    assert_close(gradient_V, GOLDEN["guidance_gradient"]["scalar_adv"])
    right, wrong = np.array(GOLDEN["guidance_gradient"]["nll"]), gradient_V.numpy()
    cosine = right @ wrong / (np.linalg.norm(right) * np.linalg.norm(wrong))
    assert_close(cosine, GOLDEN["guidance_cosine"], 5e-4)


def entropy_gradient_is_minus_p_times_log_p_plus_entropy(losses: Losses) -> None:
    logits_TW, shard = this_shard(losses, torch.tensor([GOLDEN["student_logits"]], dtype=torch.float64))
    logits_TW.requires_grad_(True)
    _, entropy_T = losses.support.support_log_probs(
        logits_TW, torch.tensor([[0]]), shard=shard, group=dist.group.WORLD, chunk_tokens=1
    )
    entropy_T.sum().backward()
    assert logits_TW.grad is not None
    log_p = _log_softmax(GOLDEN["student_logits"])
    expected = -np.exp(log_p) * (log_p + GOLDEN["student_entropy"])
    assert_close(whole_vocabulary(logits_TW.grad, shard)[0], expected, 1e-9)


def a_student_equal_to_its_teacher_has_no_on_policy_gradient(losses: Losses) -> None:
    """log-ratio 0, trust 1, FKL 0 on the full vocabulary, and no gradient of any on-policy term."""
    rows = VOCABULARY
    logits_TW, shard = this_shard(losses, torch.tensor([GOLDEN["student_logits"]] * rows, dtype=torch.float64))
    logits_TW.requires_grad_(True)
    ids_TJ = torch.cat([torch.arange(rows)[:, None], torch.arange(VOCABULARY).expand(rows, -1)], dim=1)
    logp_TJ, entropy_T = losses.support.support_log_probs(
        logits_TW, ids_TJ, shard=shard, group=dist.group.WORLD, chunk_tokens=5
    )
    log_q = torch.from_numpy(_log_softmax(GOLDEN["student_logits"]))
    ones = torch.ones(rows, dtype=torch.float64)
    for mode, u in (("none", 0.5), ("bernoulli", 0.999999), ("soft", 0.5), ("threshold", 0.5)):
        inputs = losses.objectives.TokenInputs(
            student_logp_T=logp_TJ[:, 0],
            student_topk_logp_TK=logp_TJ[:, 1:],
            student_entropy_T=entropy_T,
            teacher_logp_T=log_q[torch.arange(rows)],
            teacher_topk_logp_TK=log_q.expand(rows, -1),
            behav_logp_T=logp_TJ[:, 0].detach(),
            trust_u_T=u * ones,
            on_mask_T=ones.bool(),
            off_mask_T=~ones.bool(),
            weight_T=ones,
        )
        output = losses.objectives.tropd(inputs, **{**SETTINGS, "trust_mode": mode})
        (gradient_TW,) = torch.autograd.grad(output.loss_sum, logits_TW, retain_graph=True)
        assert_close(output.columns["log_ratio"], 0.0 * ones, 1e-14)
        assert_close(output.columns["trusted"], ones, 1e-14)
        assert_close(output.columns["divergence"], 0.0 * ones, 1e-14)
        assert_close(whole_vocabulary(gradient_TW, shard), torch.zeros(rows, VOCABULARY), 1e-14)


CLAIMS: tuple[Claim, ...] = (
    log_probs_entropy_and_masses_are_golden,
    expected_k1_gradient_is_the_reverse_kl_gradient,
    outlier_fraction_is_the_total_variation,
    topk_forward_kl_and_its_gradient_are_golden,
    trusted_term_has_the_golden_expected_gradient,
    fkl_direct_has_the_golden_expected_gradient,
    fkl_scalar_has_the_golden_expected_gradient,
    clip_floors_the_advantage_and_mask_drops_it,
    advantage_has_the_golden_mean_and_variance,
    nll_guidance_follows_the_forward_kl_gradient,
    scalar_guidance_points_away_from_the_teacher,
    entropy_gradient_is_minus_p_times_log_p_plus_entropy,
    a_student_equal_to_its_teacher_has_no_on_policy_gradient,
)
