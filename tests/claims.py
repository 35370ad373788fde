"""Claims about TrOPD and the kernel that are checked for the real modules and must fail for mutated ones.

Each claim runs on every rank of the default group, gets the modules to check, and raises AssertionError if it does
not hold. Shapes as in `golden_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tests.golden_rows import (
    GOLDEN,
    SETTINGS,
    VOCABULARY,
    Outcomes,
    assert_close,
    golden_result,
    golden_rows,
    log_softmax,
    policy,
    student_draws,
    student_draws_and_gate,
    support_log_probs,
    teacher_draws,
    this_shard,
    whole_vocabulary,
)
from tests.mutants import Losses

Claim = Callable[[Losses], None]


def log_probs_entropy_and_masses_are_golden(losses: Losses) -> None:
    output, _ = golden_result(losses, student_draws(), trust_mode="soft")
    assert_close(output.columns["log_ratio"], GOLDEN["log_ratio"])
    assert_close(output.columns["trusted"], GOLDEN["trust_probability"])
    assert_close(output.columns["teacher_mass"], GOLDEN["teacher_mass"], 1e-9)
    assert_close(output.columns["student_mass"], GOLDEN["student_mass"], 1e-9)
    for name, entropy in (("student_logits", "student_entropy"), ("teacher_logits", "teacher_entropy")):
        logits_TW, shard = this_shard(losses, torch.tensor([GOLDEN[name]], dtype=torch.float64))
        logp_TJ, entropy_T = support_log_probs(losses, logits_TW, torch.arange(VOCABULARY)[None], shard, (VOCABULARY,))
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
    _, entropy_T = support_log_probs(losses, logits_TW, torch.tensor([[0]]), shard, (1,))
    (gradient_TW,) = torch.autograd.grad(entropy_T.sum(), logits_TW)
    log_p = log_softmax(GOLDEN["student_logits"])
    expected = -np.exp(log_p) * (log_p + GOLDEN["student_entropy"])
    assert_close(whole_vocabulary(gradient_TW.detach(), shard)[0], expected, 1e-9)


def a_student_equal_to_its_teacher_has_no_on_policy_gradient(losses: Losses) -> None:
    """log-ratio 0, trust 1, FKL 0 on the full vocabulary, and no gradient of any on-policy term."""
    zeros, ones = np.zeros(VOCABULARY), np.ones(VOCABULARY)
    for mode, u in (("none", 0.5), ("bernoulli", 0.999999), ("soft", 0.5), ("threshold", 0.5)):
        outcomes = replace(student_draws(), u=[u] * VOCABULARY)
        rows = golden_rows(losses, outcomes, teacher="student_logits")
        output = losses["objectives.trust_region"].tropd(
            rows.inputs, **{**SETTINGS, "trust_mode": mode}, policy=policy(losses)
        )
        assert_close(output.columns["log_ratio"], zeros, 1e-14)
        assert_close(output.columns["trusted"], ones, 1e-14)
        assert_close(output.columns["divergence"], zeros, 1e-14)
        assert_close(rows.gradient(output.loss_sum), np.zeros((VOCABULARY, VOCABULARY)), 1e-14)


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
