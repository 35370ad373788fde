"""Divergences on candidates: values, gradients in the full-vocabulary logits, limits and guaranteed signs.

Shapes: T tokens, V vocabulary, K candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import divergence_oracles
from tropd_mcore.objectives.parts.divergences import (
    clipped_reverse_kl,
    log_mixture,
    topk_forward_kl,
    topk_jensen_shannon,
    topk_reverse_kl,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tropd_vector.json").read_text(encoding="utf-8"))
LSM = 0.9394879017
LSM_GRADIENT = [0.638140, -0.499427, 0.0, -0.138714, 0.0, 0.0, 0.0, 0.0]
TOKENS, VOCABULARY = 37, 101
BETA = 0.3
CASES = [
    *(("fkl", norm) for norm in ("truncated", "tail", "renorm", "teacher_renorm")),
    *(("rkl", norm) for norm in ("truncated", "tail", "renorm")),
    *(("jsd", norm) for norm in ("truncated", "tail", "renorm")),
]
"""Every divergence with every norm that it has."""
NORMALISED = [(kind, norm) for kind, norm in CASES if norm in ("tail", "renorm")]


def divergence(kind: str, norm: str, beta: float = BETA) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of (student log-probs, teacher log-probs) of the candidates."""
    if kind == "jsd":
        return partial(topk_jensen_shannon, beta=beta, norm=norm)
    return partial({"fkl": topk_forward_kl, "rkl": topk_reverse_kl}[kind], norm=norm)


def random_pair(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student logits z [T, V] and teacher log-probs [T, V], float64."""
    random = torch.Generator().manual_seed(seed)
    z_TV = scale * torch.randn(TOKENS, VOCABULARY, generator=random, dtype=torch.float64)
    return z_TV, (scale * torch.randn(TOKENS, VOCABULARY, generator=random, dtype=torch.float64)).log_softmax(1)


@pytest.mark.parametrize(("kind", "norm"), CASES)
@pytest.mark.parametrize("k", [2, 64])
def test_candidate_divergences_and_gradients_equal_the_oracle(kind: str, norm: str, k: int) -> None:
    z_TV, log_q_TV = random_pair()
    z_TV.requires_grad_(True)
    log_p_TV = z_TV.log_softmax(dim=1)
    log_q_TK, ids_TK = log_q_TV.topk(k, dim=1)
    divergence_T = divergence(kind, norm)(log_p_TV.gather(1, ids_TK), log_q_TK)
    (gradient_TV,) = torch.autograd.grad(divergence_T.sum(), z_TV)
    values = divergence_T.tolist()
    for token in range(TOKENS):
        log_q, log_p = log_q_TV[token].numpy(), log_p_TV[token].detach().numpy()
        ids = ids_TK[token].tolist()
        expected = divergence_oracles.divergence(kind, log_q, log_p, ids, norm, BETA)
        assert values[token] == pytest.approx(expected, abs=1e-12)
        expected_gradient = divergence_oracles.divergence_gradient(kind, log_q, log_p, ids, norm, BETA)
        np.testing.assert_allclose(gradient_TV[token].numpy(), expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_the_oracle_has_the_gradient_of_its_own_value(kind: str, norm: str) -> None:
    """By central differences, on the golden pair."""
    z, log_q = np.array(GOLDEN["student_logits"]), np.array(GOLDEN["teacher_logits"])
    log_q = log_q - np.log(np.exp(log_q).sum())
    ids, step = GOLDEN["teacher_topk_ids"], 1e-5

    def value(logits: np.ndarray) -> float:
        return divergence_oracles.divergence(kind, log_q, logits - np.log(np.exp(logits).sum()), ids, norm, BETA)

    differences = [(value(z + step * unit) - value(z - step * unit)) / (2 * step) for unit in np.eye(len(z))]
    gradient = divergence_oracles.divergence_gradient(kind, log_q, z - np.log(np.exp(z).sum()), ids, norm, BETA)
    np.testing.assert_allclose(gradient, differences, rtol=0, atol=1e-9)


def test_local_support_matching_has_the_golden_value_and_gradient() -> None:
    z_V = torch.tensor(GOLDEN["student_logits"], dtype=torch.float64, requires_grad=True)
    log_q_V = torch.tensor(GOLDEN["teacher_logits"], dtype=torch.float64).log_softmax(0)
    ids = GOLDEN["teacher_topk_ids"]
    value = topk_reverse_kl(z_V.log_softmax(0)[None, ids], log_q_V[None, ids], norm="renorm")[0]
    (gradient_V,) = torch.autograd.grad(value, z_V)
    assert float(value.detach()) == pytest.approx(LSM, abs=1e-9)
    np.testing.assert_allclose(gradient_V.numpy(), LSM_GRADIENT, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_on_the_whole_vocabulary_every_norm_is_the_exact_divergence(kind: str, norm: str) -> None:
    z_TV, log_q_TV = random_pair()
    z_TV.requires_grad_(True)
    log_p_TV = z_TV.log_softmax(dim=1)
    divergence_T = divergence(kind, norm)(log_p_TV, log_q_TV)
    (gradient_TV,) = torch.autograd.grad(divergence_T.sum(), z_TV, retain_graph=True)
    q_TV, p_TV = log_q_TV.exp(), log_p_TV.exp()
    mix_TV = BETA * q_TV + (1 - BETA) * p_TV
    exact_T = {
        "fkl": q_TV * (log_q_TV - log_p_TV),
        "rkl": p_TV * (log_p_TV - log_q_TV),
        "jsd": BETA * q_TV * (log_q_TV - mix_TV.log()) + (1 - BETA) * p_TV * (log_p_TV - mix_TV.log()),
    }[kind].sum(dim=1)
    (exact_gradient_TV,) = torch.autograd.grad(exact_T.sum(), z_TV)
    torch.testing.assert_close(divergence_T, exact_T, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_TV, exact_gradient_TV, rtol=0, atol=1e-12)


def test_a_truncated_forward_kl_can_be_negative_and_is_not_clamped() -> None:
    """If the student has more mass on the support than the teacher, the value is negative and has a gradient."""
    log_p_TK = torch.tensor([[0.6, 0.39]]).log().requires_grad_(True)
    divergence_T = topk_forward_kl(log_p_TK, torch.tensor([[0.4, 0.3]]).log(), norm="truncated")
    divergence_T.sum().backward()
    assert float(divergence_T.detach()) < -0.2
    assert log_p_TK.grad is not None
    torch.testing.assert_close(log_p_TK.grad, -torch.tensor([[0.4, 0.3]]))


@pytest.mark.parametrize("norm", ["truncated", "tail", "renorm"])
def test_only_the_truncated_reverse_kl_has_a_gradient_if_student_and_teacher_are_equal(norm: str) -> None:
    """The reason why a truncated reverse KL is refused as an objective: it always takes probability from the top-k."""
    z_TV, _ = random_pair()
    z_TV.requires_grad_(True)
    log_q_TK, ids_TK = z_TV.detach().log_softmax(1).topk(7, dim=1)
    for kind in ("fkl", "rkl", "jsd"):
        loss = divergence(kind, norm)(z_TV.log_softmax(1).gather(1, ids_TK), log_q_TK).sum()
        (gradient_TV,) = torch.autograd.grad(loss, z_TV)
        on_support_T = gradient_TV.gather(1, ids_TK).sum(dim=1)
        if (kind, norm) == ("rkl", "truncated"):
            assert (on_support_T > 0.01).all()
        elif (kind, norm) == ("fkl", "truncated"):
            assert (on_support_T < -0.01).all()  # towards the support: a bound that is tight at full mass
        else:
            assert gradient_TV.abs().max() <= 1e-15


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_an_absent_entry_changes_neither_value_nor_gradient(kind: str, norm: str) -> None:
    """A teacher log-prob of -inf, next to the student's 0 of an unused slot or its log-prob of a real token."""
    log_p_TK = torch.tensor([[0.5, 0.2]], dtype=torch.float64).log().requires_grad_(True)
    log_q_TK = torch.tensor([[0.4, 0.5]], dtype=torch.float64).log()
    expected_T = divergence(kind, norm)(log_p_TK, log_q_TK)
    (expected_gradient,) = torch.autograd.grad(expected_T.sum(), log_p_TK)
    for student in (0.0, -1.5):
        padded_log_p = torch.cat([log_p_TK, torch.full((1, 1), student, dtype=torch.float64)], dim=1)
        padded_log_q = torch.cat([log_q_TK, torch.full((1, 1), -math.inf, dtype=torch.float64)], dim=1)
        actual_T = divergence(kind, norm)(padded_log_p, padded_log_q)
        torch.testing.assert_close(actual_T, expected_T, rtol=0, atol=1e-14)
        (actual_gradient,) = torch.autograd.grad(actual_T.sum(), log_p_TK)
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kind", "norm"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_entries_absent_give_zero_and_a_finite_gradient(kind: str, norm: str, dtype: torch.dtype) -> None:
    log_p_TK = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
    divergence_T = divergence(kind, norm)(log_p_TK, torch.full((2, 3), -math.inf, dtype=dtype))
    divergence_T.sum().backward()
    assert divergence_T.abs().max() <= 1e-12
    assert log_p_TK.grad is not None and not log_p_TK.grad.any()


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_divergences_of_certain_distributions_stay_finite_in_float32(kind: str, norm: str) -> None:
    """All mass on the support, to the last bit: the tail's log is kept off -inf; log-probs far below the smallest."""
    log_p_TK = torch.tensor([[0.0, -120.0], [-90.0, 0.0], [-0.7, -0.7]], requires_grad=True)
    divergence_T = divergence(kind, norm)(log_p_TK, torch.tensor([[0.0, -90.0], [0.0, -200.0], [-300.0, 0.0]]))
    divergence_T.sum().backward()
    assert divergence_T.isfinite().all()
    assert log_p_TK.grad is not None and log_p_TK.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_divergences_in_float32_differ_from_float64_only_by_rounding(kind: str, norm: str) -> None:
    """A tail is 1 minus a mass. For a tail of 1e-3, float32 has four digits."""
    z_TV, log_q_TV = random_pair(scale=4.0)
    log_q_TK, ids_TK = log_q_TV.topk(16, dim=1)
    log_p_TK = z_TV.log_softmax(1).gather(1, ids_TK)
    narrow_T = divergence(kind, norm)(log_p_TK.float(), log_q_TK.float())
    assert narrow_T.dtype == torch.float32
    torch.testing.assert_close(narrow_T.double(), divergence(kind, norm)(log_p_TK, log_q_TK), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    student=st.lists(st.floats(-30, 30), min_size=9, max_size=9),
    teacher=st.lists(st.floats(-30, 30), min_size=9, max_size=9),
    k=st.integers(1, 9),
)
def test_coarse_grained_divergences_are_never_negative(student: list[float], teacher: list[float], k: int) -> None:
    """`tail` and `renorm` are true divergences between distributions over K + 1 and K events."""
    log_p_TV = torch.tensor([student], dtype=torch.float64).log_softmax(1)
    log_q_TK, ids_TK = torch.tensor([teacher], dtype=torch.float64).log_softmax(1).topk(k, dim=1)
    for kind, norm in NORMALISED:
        assert float(divergence(kind, norm)(log_p_TV.gather(1, ids_TK), log_q_TK)) >= -1e-12


def test_the_jensen_shannon_divergence_tends_to_the_two_kl_divergences() -> None:
    z_TV, log_q_TV = random_pair(scale=1.0)
    log_p_TK, log_q_TK = z_TV.log_softmax(1)[:, :8], log_q_TV[:, :8]
    for norm in ("tail", "renorm"):
        near_0_T = divergence("jsd", norm, beta=1e-7)(log_p_TK, log_q_TK) / 1e-7
        near_1_T = divergence("jsd", norm, beta=1 - 1e-7)(log_p_TK, log_q_TK) / 1e-7
        torch.testing.assert_close(near_0_T, divergence("fkl", norm)(log_p_TK, log_q_TK), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(near_1_T, divergence("rkl", norm)(log_p_TK, log_q_TK), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_mixture_equals_its_definition_and_is_exact_where_both_agree(dtype: torch.dtype) -> None:
    logp = torch.tensor([-1.0, -0.3, -2.0, -7.3, -200.0, -0.1], dtype=dtype, requires_grad=True)
    logq = torch.tensor([-0.3, -1.0, -2.0, -7.3, -0.1, -math.inf], dtype=dtype)
    mixture = log_mixture(logp, logq, BETA)
    exact = (BETA * logq.double().exp() + (1 - BETA) * logp.detach().double().exp()).log()
    torch.testing.assert_close(mixture.double(), exact, rtol=0, atol=3e-7 if dtype == torch.float32 else 1e-15)
    assert torch.equal(mixture[2:4], logp[2:4])
    (gradient,) = torch.autograd.grad(mixture.sum(), logp)
    expected = (1 - BETA) * (logp.detach().double().exp() - 0.0) / exact.exp()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-30)


def test_a_clipped_reverse_kl_with_a_wide_bound_equals_the_renormalised_reverse_kl() -> None:
    z_TV, log_q_TV = random_pair()
    z_TV.requires_grad_(True)
    log_q_TK, ids_TK = log_q_TV.topk(7, dim=1)
    log_p_TK = z_TV.log_softmax(1).gather(1, ids_TK)
    clipped_T = clipped_reverse_kl(log_p_TK, log_q_TK, bound=100.0)
    plain_T = topk_reverse_kl(log_p_TK, log_q_TK, norm="renorm")
    torch.testing.assert_close(clipped_T, plain_T, rtol=0, atol=1e-14)
    (clipped_TV,) = torch.autograd.grad(clipped_T.sum(), z_TV, retain_graph=True)
    (plain_TV,) = torch.autograd.grad(plain_T.sum(), z_TV)
    torch.testing.assert_close(clipped_TV, plain_TV, rtol=0, atol=1e-14)


def test_a_clamped_log_ratio_acts_as_a_constant_factor() -> None:
    """d/dz_v = p~_v (clamp_v - value) on the candidates: nothing is taken from those that agree."""
    z_TV, log_q_TV = random_pair()
    z_TV.requires_grad_(True)
    log_q_TK, ids_TK = log_q_TV.topk(7, dim=1)
    divergence_T = clipped_reverse_kl(z_TV.log_softmax(1).gather(1, ids_TK), log_q_TK, bound=0.5)
    (gradient_TV,) = torch.autograd.grad(divergence_T.sum(), z_TV)
    for token in range(TOKENS):
        ids = ids_TK[token].tolist()
        p = np.exp(z_TV[token].detach().numpy()[ids])
        q = np.exp(log_q_TV[token].numpy()[ids])
        p, q = p / p.sum(), q / q.sum()
        clamped = np.clip(np.log(p / q), -0.5, 0.5)
        value = float((p * clamped).sum())
        assert float(divergence_T[token].detach()) == pytest.approx(value, abs=1e-12)
        expected = np.zeros(VOCABULARY)
        expected[ids] = p * (clamped - value)
        np.testing.assert_allclose(gradient_TV[token].numpy(), expected, rtol=0, atol=1e-12)
