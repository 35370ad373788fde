"""Objectives that reward sampled tokens or candidates, token by token: values, gradients, masks, limits, identities.

The equations over a whole vocabulary are in tests/reward_claims.py. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.golden_rows import POLICY
from tests.golden_rows import SETTINGS as TROPD_SETTINGS
from tests.objective_batch import TOKENS, Batch, filled
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.candidates import rethinking
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient
from tropd_mcore.objectives.rewards import (
    entropy_opd,
    exopd,
    iw_opd,
    power_opd,
    reopold,
    topd,
    vopd,
)
from tropd_mcore.objectives.trust_region import opd, tropd
from tropd_mcore.objectives.verified import k3, kdrl, rlad
from tropd_mcore.sentinels import ABSENT

FLOOR = -0.4
MODES = ({"ratio": "none", "mismatch": "tis"}, {"ratio": "importance"}, {"ratio": "ppo_clip", "mismatch": "icepop"})
SUPPORTS = ("student", "teacher", "intersection", "union", "xor")

Objective = Callable[..., TokenLosses]
OBJECTIVES: dict[str, Objective] = {
    "reopold": partial(reopold, floor=FLOOR, train="all"),
    "reopold_phase_one": partial(reopold, floor=FLOOR, train="above_floor"),
    "reopold_phase_two": partial(reopold, floor=FLOOR, train="selected"),
    "entropy_opd": partial(entropy_opd, denominator="selected"),
    "exopd": partial(exopd, scale=1.25),
    "topd": partial(topd, mixing=0.9),
    "vopd": vopd,
    "iw_opd": iw_opd,
    "power_opd": partial(power_opd, power=0.5),
    "kdrl": partial(kdrl, beta=0.01),
    "rlad": partial(rlad, anchor=0.4, reference_weight=0.02),
    **{f"rethinking_{support}": partial(rethinking, support=support) for support in SUPPORTS},
}


def a_batch(seed: int = 0) -> Batch:
    """The policy has moved. If the statistic selects tokens, a third of them is not selected."""
    batch = Batch(seed, moved=0.4)
    batch.statistic_T = torch.where(torch.arange(TOKENS) % 3 == 1, 0.0, batch.statistic_T)
    return batch


def expected_reward(name: str, batch: Batch, token: int) -> tuple[float, bool]:
    """(A without the engine weight, trained?) of one token that the student sampled."""
    x = int(batch.x_T[token])
    old = oracles.log_softmax(batch.old_z_TV[token].numpy())
    log_q, log_ref = batch.log_q_TV[token].numpy(), batch.log_reference_TV[token].numpy()
    r, statistic = float(log_q[x] - old[x]), float(batch.statistic_T[token])
    if name.startswith("reopold"):
        trained = {"reopold": True, "reopold_phase_one": r >= FLOOR, "reopold_phase_two": statistic != 0}[name]
        return max(r, FLOOR), trained
    if name == "vopd":
        own = oracles.top_ids(batch.old_z_TV[token].numpy(), batch.student_topk)
        p, q = (np.exp(log[own]) / np.exp(log[own]).sum() for log in (old, log_q))
        return r + float((p * np.log(p / q)).sum()), True
    return {
        "entropy_opd": r,
        "exopd": 1.25 * (log_q[x] - log_ref[x]) - (old[x] - log_ref[x]),
        "topd": statistic,
        "iw_opd": statistic * (log_q[x] - float(batch.rollout_logp_T[token])),
        "power_opd": math.sqrt(math.exp(log_q[x])) - math.sqrt(math.exp(old[x])),
        "kdrl": statistic,
        "rlad": statistic,
    }[name], name != "entropy_opd" or statistic != 0


def expected_direct(name: str, batch: Batch, token: int) -> tuple[float, float, float]:
    """(D, dD / d log p(x), log of the ratio's denominator) of one token."""
    x = int(batch.x_T[token])
    logp = float(oracles.log_softmax(batch.z_TV[token].detach().numpy())[x])
    old = float(oracles.log_softmax(batch.old_z_TV[token].numpy())[x])
    log_q, log_ref = float(batch.log_q_TV[token, x]), float(batch.log_reference_TV[token, x])
    if name == "kdrl":
        return 0.01 * (log_q - logp) ** 2 / 2, -0.01 * (log_q - logp), old
    if name == "rlad":
        d = log_ref - logp
        return 0.02 * (math.exp(d) - 1 - d), 0.02 * (1 - math.exp(d)), 0.4 * old + 0.6 * log_q
    return 0.0, 0.0, old


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["ratio"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not name.startswith("rethinking")])
def test_rewards_give_the_loss_gradient_and_columns_of_a_loop_over_tokens(name: str, mode: dict[str, str]) -> None:
    batch, settings = a_batch(1), {**POLICY, **mode}
    output = OBJECTIVES[name](batch.inputs(), policy=PolicyGradient(**settings))
    gradient_TV = batch.gradient(output.loss_sum).numpy()
    total, trained_tokens = 0.0, 0
    for token in range(TOKENS):
        x, origin = int(batch.x_T[token]), batch.origin[token]
        log_p = oracles.log_softmax(batch.z_TV[token].detach().numpy())
        old = oracles.log_softmax(batch.old_z_TV[token].numpy())
        advantage, trained = expected_reward(name, batch, token)
        engine = oracles.engine_weight(float(old[x]), float(batch.rollout_logp_T[token]), settings)
        direct, direct_slope, anchor = expected_direct(name, batch, token)
        sampled = oracles.policy(engine * advantage, float(log_p[x]), anchor, settings)
        slope = 0.0
        if origin == "student" and trained:
            total += float(batch.weight_T[token]) * (sampled.loss + direct)
            slope = float(batch.weight_T[token]) * (sampled.slope + direct_slope)
            trained_tokens += 1
            assert float(output.columns["advantage"][token]) == pytest.approx(engine * advantage, abs=1e-12)
            assert float(output.columns["ratio"][token]) == pytest.approx(sampled.ratio)
            assert float(output.columns["clipped"][token]) == sampled.clipped
        else:
            assert float(output.columns["advantage"][token]) == 0.0
        expected = slope * (np.eye(len(log_p))[x] - np.exp(log_p))
        np.testing.assert_allclose(gradient_TV[token], expected, rtol=0, atol=1e-12)
    assert float(output.loss_sum.detach()) == pytest.approx(total, abs=1e-10)
    counts_trained = name in ("entropy_opd", "reopold_phase_one", "reopold_phase_two")
    counted = trained_tokens if counts_trained else sum(origin != "none" for origin in batch.origin)
    assert int(output.token_count) == counted


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["ratio"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_candidates_equal_a_loop_over_the_support(support: str, mode: dict[str, str]) -> None:
    """A teacher candidate that is not a student candidate has ratio 1, because its old log-prob is not stored."""
    batch, settings = a_batch(2), {**POLICY, **mode, "mismatch": "off"}
    output = rethinking(batch.inputs(), support=support, policy=PolicyGradient(**settings))
    gradient_TV = batch.gradient(output.loss_sum).numpy()
    total = 0.0
    for token in range(TOKENS):
        log_p = oracles.log_softmax(batch.z_TV[token].detach().numpy())
        old = oracles.log_softmax(batch.old_z_TV[token].numpy())
        log_q = batch.log_q_TV[token].numpy()
        own, teacher = oracles.top_ids(old, batch.student_topk), oracles.top_ids(log_q, batch.topk)
        before = {v: float(old[v]) if v in own else float(log_p[v]) for v in {*own, *teacher}}
        support_ids = {
            "student": set(own),
            "teacher": set(teacher),
            "intersection": set(own) & set(teacher),
            "union": set(own) | set(teacher),
            "xor": set(own) ^ set(teacher),
        }[support]
        mass = sum(math.exp(before[v]) for v in support_ids)
        expected, weight = np.zeros(len(log_p)), float(batch.weight_T[token])
        for v in support_ids if batch.origin[token] == "student" else ():
            advantage = -math.exp(before[v]) / mass * (before[v] - float(log_q[v]))
            candidate = oracles.policy(advantage, float(log_p[v]), before[v], settings)
            total += weight * candidate.loss
            expected += weight * candidate.slope * (np.eye(len(log_p))[v] - np.exp(log_p))
        np.testing.assert_allclose(gradient_TV[token], expected, rtol=0, atol=1e-12)
    assert float(output.loss_sum.detach()) == pytest.approx(total, abs=1e-10)


@pytest.mark.parametrize("ratio", ["none", "ppo_clip"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_token_outside_both_masks_has_no_influence_on_reward_objectives(name: str, ratio: str) -> None:
    batch, policy = a_batch(), PolicyGradient(ratio=ratio, mismatch="off" if "rethinking" in name else "tis")
    clean = OBJECTIVES[name](batch.inputs(), policy=policy)
    for fill in (math.nan, -math.inf, 1e30):
        inputs = batch.inputs()
        dirty = OBJECTIVES[name](replace(inputs, **filled(inputs, batch.uncounted_T, fill)), policy=policy)
        assert torch.equal(dirty.loss_sum, clean.loss_sum) and int(dirty.token_count) == int(clean.token_count)
        gradient_TV = batch.gradient(dirty.loss_sum)
        assert gradient_TV.isfinite().all() and not gradient_TV[batch.uncounted_T].any()
        for column, values in dirty.columns.items():
            if column != "divergence":
                assert torch.equal(values[~batch.on_T & ~batch.off_T], clean.columns[column][batch.uncounted_T])


CONSTANTS = (
    "teacher_logp_T",
    "teacher_topk_logp_TK",
    "teacher_own_logp_TL",
    "reference_logp_T",
    "old_logp_T",
    "old_own_logp_TL",
    "rollout_logp_T",
    "selected_T",
    "advantage_T",
    "history_weight_T",
)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_reward_objectives_flow_only_through_the_student(name: str) -> None:
    for ratio in ("none", "ppo_clip"):
        inputs = a_batch().inputs()
        live = {field: getattr(inputs, field).detach().clone().requires_grad_(True) for field in CONSTANTS}
        output = OBJECTIVES[name](replace(inputs, **live), policy=PolicyGradient(ratio=ratio))
        gradients = torch.autograd.grad(output.loss_sum, list(live.values()), allow_unused=True)
        for field, value in zip(live, gradients, strict=True):
            assert value is None or not value.any(), f"a gradient flows through {field}"
        assert not any(column.requires_grad for column in output.columns.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_reward_objectives_of_zero_tokens_give_loss_zero_and_an_empty_gradient(name: str) -> None:
    batch = Batch(tokens=0)
    output = OBJECTIVES[name](batch.inputs(), policy=PolicyGradient())
    assert float(output.loss_sum.detach()) == 0.0 and int(output.token_count) == 0
    assert batch.gradient(output.loss_sum).shape == batch.z_TV.shape


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_losses_of_chunks_add_up_to_that_of_the_whole(name: str) -> None:
    batch, policy = a_batch(), PolicyGradient(ratio="ppo_clip")
    whole, inputs = OBJECTIVES[name](batch.inputs(), policy=policy), batch.inputs()
    parts = []
    for rows in (slice(0, 10), slice(10, 11), slice(11, TOKENS)):
        cut = {field: value[rows] if value is not None else None for field, value in vars(inputs).items()}
        parts.append(OBJECTIVES[name](TokenInputs(**cut), policy=policy))
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum, rtol=0, atol=1e-12)
    assert sum(int(part.token_count) for part in parts) == int(whole.token_count)
    for column, values in whole.columns.items():
        joined = torch.cat([part.columns[column] for part in parts])
        torch.testing.assert_close(joined, values, rtol=0, atol=1e-14, equal_nan=True)


def _opd(batch: Batch, **policy: Any) -> TokenLosses:
    return opd(batch.inputs(), policy=PolicyGradient(**policy))


def _same_loss_and_gradient(batch: Batch, one: TokenLosses, other: TokenLosses, atol: float) -> None:
    torch.testing.assert_close(one.loss_sum, other.loss_sum, rtol=0, atol=40 * atol)
    torch.testing.assert_close(batch.gradient(one.loss_sum), batch.gradient(other.loss_sum), rtol=0, atol=atol)


def _ones(batch: Batch) -> TokenInputs:
    ones_T = torch.ones(TOKENS, dtype=torch.float64)
    return replace(batch.inputs(), selected_T=ones_T, history_weight_T=ones_T)


@pytest.mark.parametrize("ratio", ["none", "importance", "ppo_clip"])
def test_variants_of_opd_equal_opd_at_the_limits_of_their_settings(ratio: str) -> None:
    batch = Batch(moved=0.4)
    batch.rollout_logp_T = batch.inputs().old_logp_T
    policy, plain = PolicyGradient(ratio=ratio), partial(_opd, batch, ratio=ratio)
    _same_loss_and_gradient(batch, reopold(batch.inputs(), floor=-1e9, train="all", policy=policy), plain(), 0.0)
    _same_loss_and_gradient(batch, entropy_opd(_ones(batch), denominator="all", policy=policy), plain(), 0.0)
    _same_loss_and_gradient(batch, exopd(batch.inputs(), scale=1.0, policy=policy), plain(), 1e-13)
    _same_loss_and_gradient(batch, iw_opd(_ones(batch), policy=policy), plain(), 0.0)
    equal_teacher = replace(batch.inputs(), teacher_own_logp_TL=batch.inputs().old_own_logp_TL)
    _same_loss_and_gradient(batch, vopd(equal_teacher, policy=policy), plain(), 1e-13)


def test_reopold_of_one_stage_is_tropd_with_clipped_outliers() -> None:
    batch = Batch(moved=0.4)
    settings = {**TROPD_SETTINGS, "outlier_mode": "clip", "clip_tau": FLOOR, "prefix_loss": "none"}
    clip = tropd(batch.inputs(), **settings, policy=PolicyGradient())
    ours = reopold(batch.inputs(), floor=FLOOR, train="all", policy=PolicyGradient())
    _same_loss_and_gradient(batch, ours, clip, 0.0)
    for name in ("advantage", "trusted", "loss", "log_ratio"):
        assert torch.equal(ours.columns[name], clip.columns[name])


def test_power_opd_over_its_power_tends_to_the_log_ratio_and_is_bounded() -> None:
    batch, policy = Batch(), PolicyGradient()
    small = power_opd(batch.inputs(), power=1e-6, policy=policy).columns["advantage"] / 1e-6
    torch.testing.assert_close(small[batch.on_T], _opd(batch).columns["advantage"][batch.on_T], rtol=0, atol=1e-3)
    excluded = replace(batch.inputs(), teacher_logp_T=torch.full((TOKENS,), -math.inf, dtype=torch.float64))
    for power in (0.1, 1.0, 5.0):
        assert (power_opd(excluded, power=power, policy=policy).columns["advantage"].abs() <= 1.0).all()


@pytest.mark.parametrize("name", ["reopold", "reopold_phase_one", "topd", "power_opd", "kdrl", "rlad"])
def test_a_teacher_that_excludes_the_token_leaves_a_bounded_reward_finite(name: str) -> None:
    """kdrl's K2 is not bounded; its advantage is."""
    batch = a_batch()
    excluded = replace(batch.inputs(), teacher_logp_T=torch.full((TOKENS,), -math.inf, dtype=torch.float64))
    output = OBJECTIVES[name](excluded, policy=PolicyGradient(ratio="ppo_clip"))
    assert output.columns["advantage"].isfinite().all()
    if name != "kdrl":
        assert output.loss_sum.isfinite() and batch.gradient(output.loss_sum).isfinite().all()


def test_rlad_anchored_at_the_old_policy_is_grpo() -> None:
    """Even if the teacher excludes the token, because log q has no weight in the anchor."""
    batch = a_batch()
    for teacher in (batch.inputs().teacher_logp_T, torch.full((TOKENS,), -math.inf, dtype=torch.float64)):
        policy = PolicyGradient(ratio="ppo_clip")
        inputs = replace(batch.inputs(), teacher_logp_T=teacher)
        anchored = rlad(inputs, anchor=1.0, reference_weight=0.0, policy=policy)
        grpo = topd(batch.inputs(), mixing=0.5, policy=policy)  # the statistic is its advantage
        _same_loss_and_gradient(batch, anchored, grpo, 0.0)


def test_rlad_with_reference_weight_zero_needs_no_reference() -> None:
    batch = a_batch()
    unknown = replace(batch.inputs(), reference_logp_T=torch.full((TOKENS,), math.nan, dtype=torch.float64))
    output = rlad(unknown, anchor=0.5, reference_weight=0.0, policy=PolicyGradient(ratio="ppo_clip"))
    assert output.loss_sum.isfinite() and batch.gradient(output.loss_sum).isfinite().all()


def test_the_k3_penalty_is_never_negative_and_never_pulls_away_from_the_reference() -> None:
    """d = log ref - log p, so that dK3/dd has the sign of d, and is 0 beyond the guard."""
    gap_T = torch.tensor([-800.0, -30.0, -1.0, 0.0, 1e-4, 3.0, 30.0, 800.0], dtype=torch.float64, requires_grad=True)
    k3_T = k3(gap_T)
    (slope_T,) = torch.autograd.grad(k3_T.sum(), gap_T)
    assert (k3_T >= 0).all() and k3_T.isfinite().all()
    torch.testing.assert_close(slope_T[:6], gap_T.detach()[:6].expm1())
    assert not slope_T[6:].any()


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_token_without_candidates_has_no_loss_but_counts_in_the_denominator(support: str) -> None:
    batch = a_batch()
    inputs = batch.inputs()
    nothing = replace(
        inputs,
        teacher_own_logp_TL=torch.full_like(inputs.teacher_own_logp_TL, ABSENT),
        teacher_topk_logp_TK=torch.full_like(inputs.teacher_topk_logp_TK, ABSENT),
    )
    output = rethinking(nothing, support=support, policy=PolicyGradient(ratio="ppo_clip"))
    assert float(output.loss_sum.detach()) == 0.0 and not batch.gradient(output.loss_sum).any()
    assert int(output.token_count) == int((batch.on_T | batch.off_T).sum())


def test_rethinking_on_the_teachers_support_needs_no_student_candidates() -> None:
    batch = Batch(student_topk=0)
    with_own = Batch()
    policy = PolicyGradient()
    alone = rethinking(batch.inputs(), support="teacher", policy=policy)
    both = rethinking(with_own.inputs(), support="teacher", policy=policy)
    torch.testing.assert_close(batch.gradient(alone.loss_sum), with_own.gradient(both.loss_sum), rtol=0, atol=1e-13)


def test_a_single_candidate_pulls_its_probability_towards_the_teachers() -> None:
    """Renormalised on one candidate its weight is 1, but its log-ratio is over the whole vocabulary: not degenerate."""
    batch = Batch(student_topk=1)
    output = rethinking(batch.inputs(), support="student", policy=PolicyGradient())
    gradient_TV = batch.gradient(output.loss_sum)
    best_T = batch.z_TV.detach().argmax(dim=1)
    for token in torch.nonzero(batch.on_T).flatten().tolist():
        best = int(best_T[token])
        too_likely = float(batch.z_TV.detach()[token].log_softmax(0)[best] - batch.log_q_TV[token, best])
        assert math.copysign(1.0, float(gradient_TV[token, best])) == math.copysign(1.0, too_likely)


@pytest.mark.parametrize("name", ["exopd", "vopd", "iw_opd", "entropy_opd"])
def test_the_advantage_clip_bounds_the_log_ratio_but_not_baseline_or_weight(name: str) -> None:
    batch, bound = a_batch(), 0.3
    clipped = OBJECTIVES[name](batch.inputs(), policy=PolicyGradient(advantage_clip=bound)).columns
    free = OBJECTIVES[name](batch.inputs(), policy=PolicyGradient()).columns
    base_T = free["divergence"].nan_to_num() if name == "vopd" else torch.zeros(TOKENS, dtype=torch.float64)
    scale_T = batch.statistic_T if name == "iw_opd" else torch.ones(TOKENS, dtype=torch.float64)
    log_ratio_T = torch.where(scale_T == 0, 0.0, (free["advantage"] - base_T) / scale_T)
    expected_T = base_T + scale_T * log_ratio_T.clamp(-bound, bound)
    on_T: Tensor = batch.on_T & (free["trusted"] > 0)
    torch.testing.assert_close(clipped["advantage"][on_T], expected_T[on_T], rtol=0, atol=1e-12)
