"""Top-k forward KL: values, gradients in the full-vocabulary logits, limits, and the signs that are guaranteed.

Shapes: T tokens, V vocabulary, K top-k.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracles
from tropd_mcore.losses.divergences import topk_forward_kl

NORMS = ("truncated", "tail", "renorm", "teacher_renorm")
TOKENS, VOCABULARY = 37, 101


def random_pair(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student logits z [T, V] and teacher log-probs [T, V], float64."""
    random = torch.Generator().manual_seed(seed)
    z_TV = scale * torch.randn(TOKENS, VOCABULARY, generator=random, dtype=torch.float64)
    return z_TV, (scale * torch.randn(TOKENS, VOCABULARY, generator=random, dtype=torch.float64)).log_softmax(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("k", [1, 7, 64])
def test_value_and_gradient_equal_the_oracle(norm: str, k: int) -> None:
    z_TV, log_q_TV = random_pair()
    z_TV.requires_grad_(True)
    log_p_TV = z_TV.log_softmax(dim=1)
    log_q_TK, ids_TK = log_q_TV.topk(k, dim=1)
    divergence_T = topk_forward_kl(log_p_TV.gather(1, ids_TK), log_q_TK, norm=norm)
    divergence_T.sum().backward()
    assert z_TV.grad is not None
    values = divergence_T.tolist()
    for token in range(TOKENS):
        log_q, log_p = log_q_TV[token].numpy(), log_p_TV[token].detach().numpy()
        ids = ids_TK[token].tolist()
        assert values[token] == pytest.approx(oracles.forward_kl(log_q, log_p, ids, norm), abs=1e-12)
        expected = oracles.forward_kl_gradient(log_q, log_p, ids, norm)
        np.testing.assert_allclose(z_TV.grad[token].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_on_the_whole_vocabulary_every_norm_is_the_exact_forward_kl(norm: str) -> None:
    z_TV, log_q_TV = random_pair()
    z_TV.requires_grad_(True)
    log_p_TV = z_TV.log_softmax(dim=1)
    divergence_T = topk_forward_kl(log_p_TV, log_q_TV, norm=norm)
    (gradient_TV,) = torch.autograd.grad(divergence_T.sum(), z_TV)
    exact_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(dim=1)
    torch.testing.assert_close(divergence_T, exact_T, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_TV, (log_p_TV.exp() - log_q_TV.exp()).detach(), rtol=0, atol=1e-12)


def test_truncated_can_be_negative_and_is_not_clamped() -> None:
    """Student mass on the teacher's support above the teacher's: the value is negative, the gradient is alive."""
    log_p_TK = torch.tensor([[0.6, 0.39]]).log().requires_grad_(True)
    divergence_T = topk_forward_kl(log_p_TK, torch.tensor([[0.4, 0.3]]).log(), norm="truncated")
    divergence_T.sum().backward()
    assert float(divergence_T.detach()) < -0.2
    assert log_p_TK.grad is not None
    torch.testing.assert_close(log_p_TK.grad, -torch.tensor([[0.4, 0.3]]))


@pytest.mark.parametrize("norm", NORMS)
def test_an_absent_entry_changes_neither_value_nor_gradient(norm: str) -> None:
    """A teacher log-prob of -inf next to the student's 0 of an unused slot."""
    log_p_TK = torch.tensor([[0.5, 0.2]], dtype=torch.float64).log().requires_grad_(True)
    log_q_TK = torch.tensor([[0.4, 0.5]], dtype=torch.float64).log()
    expected_T = topk_forward_kl(log_p_TK, log_q_TK, norm=norm)
    padded_log_p = torch.cat([log_p_TK, torch.zeros(1, 1, dtype=torch.float64)], dim=1)
    padded_log_q = torch.cat([log_q_TK, torch.full((1, 1), -math.inf, dtype=torch.float64)], dim=1)
    actual_T = topk_forward_kl(padded_log_p, padded_log_q, norm=norm)
    torch.testing.assert_close(actual_T, expected_T, rtol=0, atol=1e-14)
    (expected_gradient,) = torch.autograd.grad(expected_T.sum(), log_p_TK)
    (actual_gradient,) = torch.autograd.grad(actual_T.sum(), log_p_TK)
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_entries_absent_give_zero_and_a_finite_gradient(norm: str, dtype: torch.dtype) -> None:
    log_p_TK = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
    divergence_T = topk_forward_kl(log_p_TK, torch.full((2, 3), -math.inf, dtype=dtype), norm=norm)
    divergence_T.sum().backward()
    assert divergence_T.abs().max() <= 1e-12
    assert log_p_TK.grad is not None and not log_p_TK.grad.any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_certain_student_and_teacher_stay_finite_in_float32(norm: str) -> None:
    """All mass on the support, to the last bit: the tail's log is kept off -inf."""
    log_p_TK = torch.tensor([[0.0, -120.0], [-90.0, 0.0]], requires_grad=True)
    divergence_T = topk_forward_kl(log_p_TK, torch.tensor([[0.0, -90.0], [0.0, -200.0]]), norm=norm)
    divergence_T.sum().backward()
    assert divergence_T.isfinite().all()
    assert log_p_TK.grad is not None and log_p_TK.grad.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    student=st.lists(st.floats(-30, 30), min_size=9, max_size=9),
    teacher=st.lists(st.floats(-30, 30), min_size=9, max_size=9),
    k=st.integers(1, 9),
)
def test_coarse_grained_divergences_are_never_negative(student: list[float], teacher: list[float], k: int) -> None:
    """`tail` and `renorm` are true KL divergences between distributions over K + 1 and K events."""
    log_p_TV = torch.tensor([student], dtype=torch.float64).log_softmax(1)
    log_q_TK, ids_TK = torch.tensor([teacher], dtype=torch.float64).log_softmax(1).topk(k, dim=1)
    for norm in ("tail", "renorm"):
        assert float(topk_forward_kl(log_p_TV.gather(1, ids_TK), log_q_TK, norm=norm)) >= -1e-12
