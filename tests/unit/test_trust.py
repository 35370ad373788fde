"""The trust gate: what each mode accepts, and that acceptance measures the total variation distance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from tests.claims import GOLDEN
from tropd_mcore.objectives.parts.trust import trust_gate

MODES = ("bernoulli", "soft", "threshold", "none")


@pytest.mark.parametrize("mode", MODES)
def test_the_trust_gate_equals_the_oracle(mode: str) -> None:
    random = torch.Generator().manual_seed(3)
    log_ratio_T = 3.0 * torch.randn(501, generator=random, dtype=torch.float64)
    u_T = torch.rand(501, generator=random, dtype=torch.float64)
    weight_T = trust_gate(log_ratio_T, mode=mode, trust_u_T=u_T, threshold=-0.8473)
    expected = [oracles.trust(r, mode, u, -0.8473) for r, u in zip(log_ratio_T.tolist(), u_T.tolist(), strict=True)]
    np.testing.assert_allclose(weight_T.numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("mode", ["bernoulli", "soft"])
def test_a_token_that_the_teacher_prefers_is_always_trusted(mode: str) -> None:
    log_ratio_T = torch.tensor([0.0, 1e-6, 5.0])
    almost_one_T = torch.full((3,), 1.0 - 2.0**-24)
    assert trust_gate(log_ratio_T, mode=mode, trust_u_T=almost_one_T, threshold=0.0).tolist() == [1.0, 1.0, 1.0]


def test_a_uniform_of_zero_accepts_however_unlikely_the_token() -> None:
    log_ratio_T = torch.tensor([-1000.0, -12.77])
    assert trust_gate(log_ratio_T, mode="bernoulli", trust_u_T=torch.zeros(2), threshold=0.0).tolist() == [1.0, 1.0]


def test_a_token_that_the_teacher_excludes_is_an_outlier() -> None:
    excluded_T, u_T = torch.tensor([-math.inf]), torch.tensor([0.0])
    for mode in ("bernoulli", "soft", "threshold"):
        assert trust_gate(excluded_T, mode=mode, trust_u_T=u_T, threshold=-0.8473).tolist() == [0.0]


def test_a_log_ratio_equal_to_the_threshold_is_not_trusted() -> None:
    log_ratio_T = torch.tensor([-0.5, -0.5 + 1e-6])
    assert trust_gate(log_ratio_T, mode="threshold", trust_u_T=torch.zeros(2), threshold=-0.5).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mode", MODES)
def test_the_trust_weight_is_detached(mode: str) -> None:
    log_ratio_T = torch.randn(5, requires_grad=True)
    assert not trust_gate(log_ratio_T, mode=mode, trust_u_T=torch.rand(5), threshold=0.0).requires_grad


def test_the_outlier_fraction_of_a_million_draws_is_the_total_variation() -> None:
    random = torch.Generator().manual_seed(5)
    log_p, log_q = (
        torch.log_softmax(torch.tensor(GOLDEN[name], dtype=torch.float64), 0)
        for name in ("student_logits", "teacher_logits")
    )
    draws = 1_000_000
    x_T = torch.multinomial(log_p.exp(), draws, replacement=True, generator=random)
    u_T = torch.rand(draws, generator=random, dtype=torch.float64)
    for mode in ("bernoulli", "soft"):
        trust_T = trust_gate((log_q - log_p)[x_T], mode=mode, trust_u_T=u_T, threshold=0.0)
        four_standard_errors = 4.0 * math.sqrt(0.25 / draws)
        assert float(1.0 - trust_T.mean()) == pytest.approx(GOLDEN["total_variation"], abs=four_standard_errors)


@settings(deadline=None, max_examples=50)
@given(
    student=st.lists(st.floats(-8, 8), min_size=2, max_size=12),
    seed=st.integers(0, 2**16),
)
def test_the_expected_outlier_weight_is_the_total_variation_for_any_pair(student: list[float], seed: int) -> None:
    log_p = torch.log_softmax(torch.tensor(student, dtype=torch.float64), 0)
    random = torch.Generator().manual_seed(seed)
    log_q = torch.log_softmax(4.0 * torch.randn(len(student), generator=random, dtype=torch.float64), 0)
    trust_V = trust_gate(log_q - log_p, mode="soft", trust_u_T=torch.zeros(len(student)), threshold=0.0)
    total_variation = 0.5 * float((log_p.exp() - log_q.exp()).abs().sum())
    assert float((log_p.exp() * (1.0 - trust_V)).sum()) == pytest.approx(total_variation, abs=1e-12)
