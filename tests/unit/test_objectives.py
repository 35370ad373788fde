"""Objectives against the oracle, token by token: every mode, value and gradient in the full-vocabulary logits.

Shapes: T tokens (37), V vocabulary (101), K teacher top-k (16).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracles
from tests.golden_rows import GOLDEN, POLICY
from tests.golden_rows import SETTINGS as TROPD_SETTINGS
from tests.objective_batch import TOKENS, VOCABULARY, Batch, filled, token_inputs
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.parts.divergences import topk_forward_kl
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient
from tropd_mcore.objectives.trust_region import opd, tropd

SETTINGS: dict[str, Any] = TROPD_SETTINGS | POLICY
TRUST_MODES = ("bernoulli", "soft", "threshold", "none")
OUTLIER_MODES = ("fkl_direct", "fkl_scalar", "mask", "clip")
NORMS = ("truncated", "tail", "renorm", "teacher_renorm")
PREFIX_LOSSES = ("nll", "none", "topk_fkl", "scalar_adv")
MISMATCHES = ("off", "tis", "icepop", "mask")
RATIOS = ("none", "importance", "ppo_clip")


def batch_oracle(batch: Batch, settings: dict[str, Any]) -> list[oracles.TokenResult]:
    return [
        oracles.tropd_token(
            oracles.Token(
                z=batch.z_TV[token].detach().numpy(),
                old_z=batch.old_z_TV[token].numpy(),
                log_q=batch.log_q_TV[token].numpy(),
                x=int(batch.x_T[token]),
                u=float(batch.u_T[token]),
                rollout_logp=float(batch.rollout_logp_T[token]),
                origin=batch.origin[token],
                weight=float(batch.weight_T[token]),
            ),
            batch.topk,
            settings,
        )
        for token in range(len(batch.origin))
    ]


def run_tropd(inputs: TokenInputs, settings: dict[str, Any]) -> TokenLosses:
    """`tropd` with a flat set of keywords: its own and those of the policy gradient."""
    own = {name: value for name, value in settings.items() if name not in POLICY}
    return tropd(inputs, **own, policy=policy_of(settings))


def policy_of(settings: dict[str, Any]) -> PolicyGradient:
    return PolicyGradient(**{name: value for name, value in settings.items() if name in POLICY})


def assert_equals_the_oracle(batch: Batch, settings: dict[str, Any], tolerance: float = 1e-12) -> None:
    output, expected = run_tropd(batch.inputs(), settings), batch_oracle(batch, settings)
    np.testing.assert_allclose(
        float(output.loss_sum.detach()), sum(token.surrogate for token in expected), rtol=0, atol=30 * tolerance
    )
    expected_gradient = np.stack([token.gradient for token in expected])
    np.testing.assert_allclose(batch.gradient(output.loss_sum).numpy(), expected_gradient, rtol=0, atol=tolerance)
    for name in ("advantage", "trusted", "divergence", "ratio", "clipped"):
        column = [getattr(token, name) for token in expected]
        np.testing.assert_allclose(output.columns[name].numpy(), column, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        output.columns["loss"].numpy(), [token.value for token in expected], rtol=0, atol=tolerance
    )
    assert int(output.token_count) == sum(origin != "none" for origin in batch.origin)


@pytest.mark.parametrize(("trust_mode", "outlier_mode"), list(itertools.product(TRUST_MODES, OUTLIER_MODES)))
def test_every_gate_and_outlier_rule_equals_the_oracle(trust_mode: str, outlier_mode: str) -> None:
    settings = {**SETTINGS, "trust_mode": trust_mode, "outlier_mode": outlier_mode, "outlier_weight": 0.7}
    assert_equals_the_oracle(Batch(), settings)


@pytest.mark.parametrize(("norm", "prefix_loss"), list(itertools.product(NORMS, PREFIX_LOSSES)))
def test_every_norm_and_prefix_loss_equals_the_oracle(norm: str, prefix_loss: str) -> None:
    settings = {**SETTINGS, "outlier_norm": norm, "prefix_loss": prefix_loss, "beta": 0.03}
    assert_equals_the_oracle(Batch(1), settings)


@pytest.mark.parametrize("outlier_mode", OUTLIER_MODES)
@pytest.mark.parametrize(("ratio", "dual_clip"), [("importance", None), ("ppo_clip", None), ("ppo_clip", 1.5)])
def test_every_ratio_of_a_policy_that_has_moved_equals_the_oracle(
    ratio: str, dual_clip: float | None, outlier_mode: str
) -> None:
    settings = {**SETTINGS, "ratio": ratio, "dual_clip": dual_clip, "outlier_mode": outlier_mode, "mismatch": "tis"}
    batch = Batch(4, moved=0.5)
    assert_equals_the_oracle(batch, settings)
    if ratio == "ppo_clip":
        assert run_tropd(batch.inputs(), settings).columns["clipped"].any()


@pytest.mark.parametrize("outlier_mode", ["fkl_direct", "fkl_scalar", "clip"])
@pytest.mark.parametrize(("mismatch", "advantage_clip"), list(itertools.product(MISMATCHES, (None, 0.8))))
def test_every_engine_weight_and_advantage_clip_equals_the_oracle(
    mismatch: str, advantage_clip: float | None, outlier_mode: str
) -> None:
    settings = {
        **SETTINGS,
        "mismatch": mismatch,
        "advantage_clip": advantage_clip,
        "outlier_mode": outlier_mode,
        "tis_cap": 1.2,
        "icepop_low": 0.8,
        "icepop_high": 1.4,
        "mask_below": -0.004,
    }
    assert_equals_the_oracle(Batch(2), settings)


def test_log_ratio_and_masses_are_reported() -> None:
    batch = Batch()
    inputs = batch.inputs()
    counted_T = inputs.student_mask_T | inputs.prefix_mask_T
    columns = run_tropd(inputs, SETTINGS).columns
    log_ratio_T = (inputs.teacher_logp_T - inputs.student_logp_T).detach()
    torch.testing.assert_close(columns["log_ratio"][counted_T], log_ratio_T[counted_T], rtol=0, atol=0)
    teacher_mass_T = inputs.teacher_topk_logp_TK.exp().sum(1)
    torch.testing.assert_close(columns["teacher_mass"][counted_T], teacher_mass_T[counted_T], rtol=0, atol=0)
    student_mass_T = inputs.student_topk_logp_TK.detach().exp().sum(1)
    torch.testing.assert_close(columns["student_mass"][counted_T], student_mass_T[counted_T], rtol=0, atol=0)


def test_an_unused_top_k_slot_has_no_mass() -> None:
    inputs = Batch().inputs()
    unused_T1 = torch.zeros(TOKENS, 1, dtype=torch.float64)
    wider = replace(
        inputs,
        student_topk_logp_TK=torch.cat([inputs.student_topk_logp_TK, unused_T1], dim=1),
        teacher_topk_logp_TK=torch.cat([inputs.teacher_topk_logp_TK, unused_T1 - float("inf")], dim=1),
    )
    narrow_columns, wide_columns = run_tropd(inputs, SETTINGS).columns, run_tropd(wider, SETTINGS).columns
    for name in ("teacher_mass", "student_mass", "loss"):
        torch.testing.assert_close(wide_columns[name], narrow_columns[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("outlier_mode", ["fkl_direct", "fkl_scalar"])
@pytest.mark.parametrize("outlier_weight", [0.0, 1.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_with_the_gate_open_tropd_is_opd_bit_for_bit(outlier_mode: str, outlier_weight: float, ratio: str) -> None:
    batch = Batch(moved=0.3)
    settings = {
        **SETTINGS,
        "ratio": ratio,
        "trust_mode": "none",
        "outlier_mode": outlier_mode,
        "outlier_weight": outlier_weight,
        "prefix_loss": "none",
    }
    ours, plain = run_tropd(batch.inputs(), settings), opd(batch.inputs(), policy=policy_of(settings))
    assert torch.equal(ours.loss_sum, plain.loss_sum)
    assert torch.equal(batch.gradient(ours.loss_sum), batch.gradient(plain.loss_sum))
    assert all(torch.equal(ours.columns[name], plain.columns[name]) for name in ("advantage", "loss", "trusted"))


@pytest.mark.parametrize("norm", NORMS)
def test_with_the_gate_closed_tropd_is_the_topk_forward_kl(norm: str) -> None:
    batch = Batch()
    batch.origin = ["student"] * TOKENS
    inputs = batch.inputs()
    settings = {**SETTINGS, "trust_mode": "threshold", "trust_threshold": 1e9, "outlier_norm": norm}
    closed = run_tropd(inputs, settings).loss_sum
    forward_kl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=norm)
    forward_kl = (batch.weight_T * forward_kl_T).sum()
    torch.testing.assert_close(closed, forward_kl, rtol=0, atol=1e-12)
    (forward_kl_gradient_TV,) = torch.autograd.grad(forward_kl, batch.z_TV, retain_graph=True)
    torch.testing.assert_close(batch.gradient(closed), forward_kl_gradient_TV, rtol=0, atol=1e-15)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_token_outside_both_masks_has_no_influence_on_tropd(ratio: str) -> None:
    batch = Batch(moved=0.3)
    clean, uncounted_T = run_tropd(batch.inputs(), SETTINGS), batch.uncounted_T
    for norm, mismatch in itertools.product(NORMS, MISMATCHES):
        settings = {**SETTINGS, "outlier_norm": norm, "mismatch": mismatch, "ratio": ratio}
        expected = run_tropd(batch.inputs(), settings).loss_sum
        for fill in (math.nan, -math.inf, 1e30):
            inputs = batch.inputs()
            dirty = run_tropd(replace(inputs, **filled(inputs, uncounted_T, fill)), settings)
            assert torch.equal(dirty.loss_sum, expected)
            gradient_TV = batch.gradient(dirty.loss_sum)
            assert gradient_TV.isfinite().all() and not gradient_TV[uncounted_T].any()
            assert int(dirty.token_count) == int(clean.token_count)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_prefix_token_carries_neither_ratio_nor_engine_weight(ratio: str) -> None:
    """Its gradient does not depend on the sampler, which has no value for it, or on how far the policy has moved."""
    batch = Batch(3, moved=0.5)
    batch.origin = ["prefix"] * TOKENS
    for prefix_loss in ("nll", "topk_fkl"):
        plain = run_tropd(batch.inputs(), {**SETTINGS, "prefix_loss": prefix_loss})
        settings = {**SETTINGS, "prefix_loss": prefix_loss, "ratio": ratio, "mismatch": "icepop"}
        inputs = batch.inputs()
        corrected = run_tropd(replace(inputs, rollout_logp_T=torch.zeros_like(inputs.rollout_logp_T)), settings)
        assert torch.equal(corrected.loss_sum, plain.loss_sum)
        assert torch.equal(batch.gradient(corrected.loss_sum), batch.gradient(plain.loss_sum))
        assert torch.equal(corrected.columns["ratio"], torch.ones_like(corrected.columns["ratio"]))


def test_a_token_that_the_teacher_excludes_is_an_outlier_with_a_finite_loss() -> None:
    batch = Batch()
    inputs = batch.inputs()
    inputs = replace(inputs, teacher_logp_T=torch.full_like(inputs.teacher_logp_T, float("-inf")))
    for trust_mode, outlier_mode in itertools.product(("bernoulli", "soft", "threshold"), OUTLIER_MODES):
        settings = {**SETTINGS, "trust_mode": trust_mode, "outlier_mode": outlier_mode, "prefix_loss": "none"}
        output = run_tropd(inputs, settings)
        (gradient_TV,) = torch.autograd.grad(output.loss_sum, batch.z_TV, retain_graph=True)
        assert output.loss_sum.isfinite() and gradient_TV.isfinite().all()


def test_tropd_of_zero_tokens_gives_loss_zero_and_an_empty_gradient() -> None:
    batch = Batch(tokens=0)
    output = run_tropd(batch.inputs(), SETTINGS)
    assert float(output.loss_sum.detach()) == 0.0 and int(output.token_count) == 0
    assert batch.gradient(output.loss_sum).shape == (0, VOCABULARY)
    assert all(column.shape == (0,) for column in output.columns.values())


CONSTANTS = ("teacher_logp_T", "teacher_topk_logp_TK", "old_logp_T", "rollout_logp_T", "trust_u_T", "selected_T",
             "advantage_T", "history_weight_T")  # fmt: skip


def _detach_check(settings: dict[str, Any]) -> None:
    """Only the student's log-probs may get a gradient. A live teacher, sampler or uniform must get none."""
    inputs = Batch(moved=0.3).inputs()
    live = {name: getattr(inputs, name).detach().clone().requires_grad_(True) for name in CONSTANTS}
    output = run_tropd(replace(inputs, **live), settings)
    gradients = torch.autograd.grad(output.loss_sum, list(live.values()), allow_unused=True)
    for name, value in zip(live, gradients, strict=True):
        assert value is None or not value.any(), f"a gradient flows through {name}"
    assert not any(column.requires_grad for column in output.columns.values())


@pytest.mark.parametrize(("trust_mode", "outlier_mode"), list(itertools.product(TRUST_MODES, OUTLIER_MODES)))
def test_ratio_gate_advantage_and_columns_are_detached(trust_mode: str, outlier_mode: str) -> None:
    cases = zip(MISMATCHES, PREFIX_LOSSES, itertools.cycle(RATIOS), strict=False)
    for mismatch, prefix_loss, ratio in cases:
        changed = {"trust_mode": trust_mode, "outlier_mode": outlier_mode, "mismatch": mismatch, "ratio": ratio}
        _detach_check({**SETTINGS, **changed, "prefix_loss": prefix_loss})


@pytest.mark.parametrize("outlier_mode", ["fkl_scalar", "mask", "clip"])
def test_an_advantage_reaches_the_student_only_through_the_sampled_log_prob(outlier_mode: str) -> None:
    """d loss / d log p(x) is minus the advantage, and the top-k log-probs get no gradient."""
    batch = Batch()
    inputs = batch.inputs()
    output = run_tropd(inputs, {**SETTINGS, "outlier_mode": outlier_mode})
    sampled_T, topk_TK = torch.autograd.grad(
        output.loss_sum, [inputs.student_logp_T, inputs.student_topk_logp_TK], allow_unused=True
    )
    torch.testing.assert_close(sampled_T, -batch.weight_T * output.columns["advantage"], rtol=0, atol=1e-15)
    assert topk_TK is None or not topk_TK.any()


def test_direct_outlier_loss_reaches_tokens_other_than_the_sampled_one() -> None:
    batch = Batch()
    settings = {**SETTINGS, "trust_mode": "threshold", "trust_threshold": 1e9, "prefix_loss": "none"}
    gradient_TV = batch.gradient(run_tropd(batch.inputs(), settings).loss_sum)
    ids_TK = batch.log_q_TV.topk(batch.topk, dim=1).indices
    pulled_up_TK = gradient_TV.gather(1, ids_TK)[batch.on_T] < 0
    assert pulled_up_TK.float().mean() > 0.5


def test_opd_has_a_gradient_through_the_students_log_prob() -> None:
    batch = Batch()
    assert batch.gradient(opd(batch.inputs(), policy=policy_of(SETTINGS)).loss_sum).abs().max() > 1e-3


def test_loss_and_gradient_are_proportional_to_the_row_weight() -> None:
    batch = Batch()
    one: TokenLosses = run_tropd(batch.inputs(), SETTINGS)
    two = run_tropd(replace(batch.inputs(), weight_T=2.0 * batch.weight_T), SETTINGS)
    torch.testing.assert_close(two.loss_sum, 2.0 * one.loss_sum, rtol=1e-15, atol=0)
    torch.testing.assert_close(batch.gradient(two.loss_sum), 2.0 * batch.gradient(one.loss_sum), rtol=1e-15, atol=0)
    assert torch.equal(one.columns["loss"], two.columns["loss"])


def test_tropd_in_float32_differs_from_float64_only_by_rounding() -> None:
    batch = Batch()
    inputs = batch.inputs()
    narrow = {
        name: value.float() if value is not None and value.is_floating_point() else value
        for name, value in vars(inputs).items()
    }
    for norm in NORMS:
        wide_loss = run_tropd(inputs, {**SETTINGS, "outlier_norm": norm}).loss_sum
        narrow_loss = run_tropd(TokenInputs(**narrow), {**SETTINGS, "outlier_norm": norm}).loss_sum
        assert narrow_loss.dtype == torch.float32
        torch.testing.assert_close(narrow_loss.double(), wide_loss, rtol=1e-5, atol=1e-5)


def test_the_mean_policy_gradient_of_a_million_draws_equals_the_closed_form() -> None:
    """The trusted term and the whole of TrOPD, sampled over token and gate, against exact enumeration."""
    draws = 1_000_000
    random = torch.Generator().manual_seed(17)
    log_q_V = torch.tensor(GOLDEN["teacher_logits"], dtype=torch.float64).log_softmax(0)
    z_V = torch.tensor(GOLDEN["student_logits"], dtype=torch.float64)
    x_T = torch.multinomial(z_V.softmax(0), draws, replacement=True, generator=random)
    u_T = torch.rand(draws, generator=random, dtype=torch.float64)
    topk_ids = GOLDEN["teacher_topk_ids"]
    for outlier_mode, outlier_weight, expected in (
        ("fkl_direct", 0.0, "trust_only"),
        ("fkl_direct", 1.0, "fkl_direct"),
        ("fkl_scalar", 1.0, "fkl_scalar"),
    ):
        live_V = z_V.clone().requires_grad_(True)
        log_p_V = live_V.log_softmax(0)
        inputs = token_inputs(
            student_logp_T=log_p_V[x_T],
            student_topk_logp_TK=log_p_V[topk_ids].expand(draws, -1),
            teacher_logp_T=log_q_V[x_T],
            teacher_topk_logp_TK=log_q_V[topk_ids].expand(draws, -1),
            trust_u_T=u_T,
            weight_T=torch.full((draws,), 1.0 / draws, dtype=torch.float64),
        )
        settings = {**SETTINGS, "outlier_mode": outlier_mode, "outlier_weight": outlier_weight}
        (gradient_V,) = torch.autograd.grad(run_tropd(inputs, settings).loss_sum, live_V)
        np.testing.assert_allclose(gradient_V.numpy(), GOLDEN["expected_gradient"][expected], rtol=0, atol=4e-3)


@pytest.mark.parametrize("method", ["opd", "tropd", "tropd_soft", "tropd_scalar"])
def test_a_tabular_student_approaches_its_teacher_with_tropd(method: str) -> None:
    """Five states, eleven tokens, plain gradient descent on sampled tokens: the total variation falls."""
    states, vocabulary, draws, steps = 5, 11, 100, 200
    random = torch.Generator().manual_seed(23)
    log_q_SV = (1.5 * torch.randn(states, vocabulary, generator=random, dtype=torch.float64)).log_softmax(1)
    z_SV = (1.5 * torch.randn(states, vocabulary, generator=random, dtype=torch.float64)).requires_grad_(True)
    state_T = torch.arange(states).repeat_interleave(draws)
    topk_TK = log_q_SV.topk(4, dim=1).indices[state_T]
    settings: dict[str, Any] = {
        "opd": {"trust_mode": "none"},
        "tropd": {},
        "tropd_soft": {"trust_mode": "soft"},
        "tropd_scalar": {"outlier_mode": "fkl_scalar"},
    }[method]

    def total_variation() -> float:
        return float(0.5 * (z_SV.detach().softmax(1) - log_q_SV.exp()).abs().sum(dim=1).mean())

    before = total_variation()
    for _ in range(steps):
        x_T = torch.multinomial(z_SV.detach().softmax(1), draws, replacement=True, generator=random).flatten()
        log_p_TV = z_SV.log_softmax(1)[state_T]
        logp_T = log_p_TV.gather(1, x_T[:, None])[:, 0]
        inputs = token_inputs(
            student_logp_T=logp_T,
            student_topk_logp_TK=log_p_TV.gather(1, topk_TK),
            teacher_logp_T=log_q_SV[state_T, x_T],
            teacher_topk_logp_TK=log_q_SV[state_T].gather(1, topk_TK),
            trust_u_T=torch.rand(len(x_T), generator=random, dtype=torch.float64),
            weight_T=torch.full_like(logp_T, 1.0 / draws),
        )
        (gradient_SV,) = torch.autograd.grad(run_tropd(inputs, {**SETTINGS, **settings}).loss_sum, z_SV)
        with torch.no_grad():
            z_SV -= 0.5 * gradient_SV
    assert before > 0.5
    assert total_variation() < 0.1 * before if method != "tropd_scalar" else total_variation() < 0.5 * before
