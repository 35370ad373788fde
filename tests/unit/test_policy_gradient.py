"""From an advantage to a loss: the three ratios, PPO's clip case by case, and the effect of a moved policy.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.golden_rows import POLICY
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient, PolicyLoss, clipped_reward, policy_loss

RATIOS = ("none", "importance", "ppo_clip")
MISMATCHES = ("off", "tis", "icepop", "mask")


def loss_of(
    logp: Tensor, advantage: Tensor, old_logp: Tensor, *, rollout_logp: Tensor | None = None, **changed: object
) -> PolicyLoss:
    return policy_loss(
        logp,
        advantage,
        old_logp_T=old_logp,
        rollout_logp_T=old_logp if rollout_logp is None else rollout_logp,
        policy=PolicyGradient(**{**POLICY, **changed}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "clipped"),
    [
        (2.0, 1.0, -2.0, -2.0, 0.0),
        (2.0, 0.5, -1.0, -1.0, 0.0),
        (2.0, 1.29, -2.58, -2.58, 0.0),
        (2.0, 1.31, -2.6, 0.0, 1.0),
        (2.0, 9.0, -2.6, 0.0, 1.0),
        (-2.0, 1.0, 2.0, 2.0, 0.0),
        (-2.0, 0.81, 1.62, 1.62, 0.0),
        (-2.0, 0.79, 1.6, 0.0, 1.0),
        (-2.0, 0.1, 1.6, 0.0, 1.0),
        (-2.0, 1.31, 2.62, 2.62, 0.0),
        (-2.0, 2.99, 5.98, 5.98, 0.0),
        (-2.0, 3.01, 6.0, 0.0, 1.0),
        (0.0, 9.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_ppo_loss_and_its_slope_equal_worked_values(
    advantage: float, ratio: float, loss: float, slope: float, clipped: float
) -> None:
    """The band is [0.8, 1.3], the dual clip 3."""
    logp_T = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    result = loss_of(
        logp_T, torch.tensor([advantage]).double(), torch.tensor([-1.0]).double(), ratio="ppo_clip", clip_high=0.3
    )
    (slope_T,) = torch.autograd.grad(result.loss_T.sum(), logp_T)
    assert result.loss_T.item() == pytest.approx(loss, abs=1e-12)
    assert slope_T.item() == pytest.approx(slope, abs=1e-12)
    assert result.clipped_T.item() == clipped
    assert result.ratio_T.item() == pytest.approx(ratio)


def test_without_the_dual_clip_a_negative_advantage_has_no_bound() -> None:
    logp_T = torch.tensor([math.log(50.0)], dtype=torch.float64, requires_grad=True)
    zero_T = torch.zeros(1, dtype=torch.float64)
    result = loss_of(logp_T, zero_T - 2.0, zero_T, ratio="ppo_clip", dual_clip=None)
    assert result.loss_T.item() == pytest.approx(100.0) and result.clipped_T.item() == 0.0


@pytest.mark.parametrize("mismatch", MISMATCHES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dual_clip", [None, 1.7])
def test_loss_slope_ratio_and_clip_equal_the_oracle(ratio: str, mismatch: str, dual_clip: float | None) -> None:
    random = torch.Generator().manual_seed(3)
    logp_T, old_T, behav_T = (-3.0 * torch.rand(211, generator=random, dtype=torch.float64) for _ in range(3))
    advantage_T = torch.randn(211, generator=random, dtype=torch.float64)
    logp_T.requires_grad_(True)
    settings = {**POLICY, "ratio": ratio, "mismatch": mismatch, "dual_clip": dual_clip}
    result = loss_of(logp_T, advantage_T, old_T, rollout_logp=behav_T, **settings)
    (slope_T,) = torch.autograd.grad(result.loss_T.sum(), logp_T)
    for token in range(len(logp_T)):
        engine = oracles.engine_weight(float(old_T[token]), float(behav_T[token]), settings)
        advantage = engine * float(advantage_T[token])
        expected = oracles.policy(advantage, float(logp_T[token].detach()), float(old_T[token]), settings)
        assert float(result.loss_T[token].detach()) == pytest.approx(expected.loss, abs=1e-12)
        assert float(slope_T[token]) == pytest.approx(expected.slope, abs=1e-12)
        assert float(result.advantage_T[token]) == pytest.approx(advantage, abs=1e-12)
        assert float(result.clipped_T[token]) == expected.clipped
        assert float(result.ratio_T[token]) == pytest.approx(expected.ratio)


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_all_ratios_have_the_same_gradient_if_the_policy_has_not_moved(mismatch: str) -> None:
    random = torch.Generator().manual_seed(4)
    logp_T = (-3.0 * torch.rand(101, generator=random)).requires_grad_(True)
    advantage_T, behav_T = torch.randn(101, generator=random), -3.0 * torch.rand(101, generator=random)
    slopes = []
    for ratio in RATIOS:
        result = loss_of(logp_T, advantage_T, logp_T.detach(), rollout_logp=behav_T, ratio=ratio, mismatch=mismatch)
        slopes.append(torch.autograd.grad(result.loss_T.sum(), logp_T)[0])
    assert torch.equal(slopes[0], slopes[1]) and torch.equal(slopes[0], slopes[2])


def _expected_gradient(z_V: Tensor, old_V: Tensor, advantage_V: Tensor, **changed: object) -> np.ndarray:
    """The exact d/dz of the loss's expectation over x from the old policy: one token per x."""
    live_V = z_V.clone().requires_grad_(True)
    result = loss_of(live_V.log_softmax(0), advantage_V, old_V.log_softmax(0), **changed)
    (gradient_V,) = torch.autograd.grad((old_V.softmax(0) * result.loss_T).sum(), live_V)
    return gradient_V.numpy()


def test_the_importance_ratio_gives_the_gradient_of_the_moved_policy() -> None:
    """Over x ~ p_old: importance has the gradient of -E_{x ~ p}[A] at the moved p, and no ratio has not."""
    random = torch.Generator().manual_seed(5)
    z_V, old_V, advantage_V = (torch.randn(11, generator=random, dtype=torch.float64) for _ in range(3))
    p, a = z_V.softmax(0).numpy(), advantage_V.numpy()
    closed_form = -p * (a - (p * a).sum())
    corrected = _expected_gradient(z_V, old_V, advantage_V, ratio="importance")
    np.testing.assert_allclose(corrected, closed_form, rtol=0, atol=1e-14)
    plain = _expected_gradient(z_V, old_V, advantage_V, ratio="none")
    assert np.abs(plain - closed_form).max() > 0.05


def test_ppo_drops_exactly_the_clipped_tokens_from_the_gradient_of_the_moved_policy() -> None:
    random = torch.Generator().manual_seed(6)
    z_V, old_V, advantage_V = (torch.randn(11, generator=random, dtype=torch.float64) for _ in range(3))
    p, old, a = z_V.softmax(0).numpy(), old_V.softmax(0).numpy(), advantage_V.numpy()
    w = p / old
    free = np.array([not (w[v] > 1.2 if a[v] > 0 else (w[v] < 0.8 or w[v] > 3.0)) for v in range(11)])
    assert 0 < free.sum() < 11
    kept = p * a * free
    gradient = _expected_gradient(z_V, old_V, advantage_V, ratio="ppo_clip", clip_high=0.2)
    np.testing.assert_allclose(gradient, -(kept - p * kept.sum()), rtol=0, atol=1e-14)


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_flow_only_through_the_students_log_prob(ratio: str) -> None:
    random = torch.Generator().manual_seed(7)
    live = [torch.randn(9, generator=random).requires_grad_(True) for _ in range(4)]
    logp_T, advantage_T, old_T, behav_T = live
    result = loss_of(logp_T, advantage_T, old_T, rollout_logp=behav_T, ratio=ratio, mismatch="tis")
    slope_T, *others = torch.autograd.grad(result.loss_T.sum(), live, allow_unused=True)
    assert slope_T.any() and all(other is None for other in others)
    assert not any(t.requires_grad for t in (result.ratio_T, result.clipped_T, result.advantage_T))


def test_the_anchor_replaces_the_old_policy_only_in_the_ratio() -> None:
    random = torch.Generator().manual_seed(8)
    logp_T, advantage_T, old_T, behav_T, anchor_T = (torch.randn(9, generator=random) for _ in range(5))
    policy = PolicyGradient(ratio="ppo_clip", mismatch="tis")
    anchored = policy_loss(
        logp_T, advantage_T, old_logp_T=old_T, rollout_logp_T=behav_T, policy=policy, anchor_logp_T=anchor_T
    )
    plain = policy_loss(logp_T, advantage_T, old_logp_T=old_T, rollout_logp_T=behav_T, policy=policy)
    torch.testing.assert_close(anchored.ratio_T, (logp_T - anchor_T).exp())
    assert torch.equal(anchored.advantage_T, plain.advantage_T)


def test_an_advantage_of_minus_infinity_is_dropped_where_the_engine_weight_is_zero() -> None:
    logp_T = torch.tensor([-1.0], requires_grad=True)
    infinite_T = torch.tensor([-math.inf])
    for ratio in RATIOS:
        result = loss_of(
            logp_T, infinite_T, torch.tensor([-1.0]), rollout_logp=torch.tensor([-9.0]), ratio=ratio, mismatch="icepop"
        )
        assert torch.autograd.grad(result.loss_T.sum(), logp_T)[0].item() == 0.0


def test_a_huge_gap_between_policies_stays_finite() -> None:
    logp_T = torch.tensor([0.0, -500.0], requires_grad=True)
    for ratio in RATIOS:
        result = loss_of(logp_T, torch.tensor([1.0, -1.0]), torch.tensor([-500.0, 0.0]), ratio=ratio)
        (slope_T,) = torch.autograd.grad(result.loss_T.sum(), logp_T)
        assert result.loss_T.isfinite().all() and slope_T.isfinite().all()


def test_a_clipped_reward_stays_within_its_bound() -> None:
    reward_T = torch.tensor([-math.inf, -3.0, 0.5, 7.0])
    assert clipped_reward(reward_T, 2.0).tolist() == [-2.0, -2.0, 0.5, 2.0]
    assert clipped_reward(reward_T, None) is reward_T
