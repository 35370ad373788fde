"""Claims about the objectives that reward sampled tokens or candidates. `claims` says what a claim is.

Shapes as in `golden_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.claims import Claim
from tests.golden_rows import (
    GOLDEN,
    VOCABULARY,
    Array,
    assert_close,
    golden_rows,
    log_softmax,
    policy,
    student_draws,
)
from tests.mutants import Losses


def advantages_of_the_log_ratio_family_are_golden(losses: Losses) -> None:
    """ExOPD against a uniform reference, vOPD with the whole vocabulary, and REOPOLD, which is Clip Outlier."""
    rewards, rows = losses["objectives.rewards"], golden_rows(losses, student_draws())
    none = policy(losses)
    exopd = rewards.exopd(rows.inputs, scale=GOLDEN["exopd_scale"], policy=none)
    assert_close(exopd.columns["advantage"], GOLDEN["exopd_advantage"])
    vopd = rewards.vopd(rows.inputs, policy=none)
    assert_close(vopd.columns["advantage"], GOLDEN["vopd_advantage"])
    assert_close(vopd.columns["divergence"], GOLDEN["reverse_kl"], 1e-9)
    reopold = rewards.reopold(rows.inputs, floor=GOLDEN["clip_tau"], train="all", policy=none)
    assert_close(reopold.columns["advantage"], GOLDEN["clip_advantage"])
    for mixing, expected in GOLDEN["mixed_log_ratio"].items():
        topd = rewards.topd(rows.inputs, mixing=float(mixing), policy=none)
        assert_close(-topd.columns["loss"], expected)


def an_advantage_has_the_expected_gradient_of_its_closed_form(losses: Losses) -> None:
    """Over x ~ p and with a constant A, d/dz_v of E[-A log p] is -p_v (A_v - E[A])."""
    log_p, log_q = log_softmax(GOLDEN["student_logits"]), log_softmax(GOLDEN["teacher_logits"])
    p, r = np.exp(log_p), log_q - log_p
    half = np.exp(0.5 * log_q) - np.exp(0.5 * log_p)
    rewards = losses["objectives.rewards"]
    history_T = torch.linspace(1.0, 1.5, VOCABULARY, dtype=torch.float64)
    cases: tuple[tuple[Callable[..., Any], dict[str, Any], Array], ...] = (
        (rewards.reopold, {"floor": GOLDEN["clip_tau"], "train": "all"}, np.maximum(r, GOLDEN["clip_tau"])),
        (rewards.exopd, {"scale": 1.25}, 1.25 * (log_q + math.log(VOCABULARY)) - (log_p + math.log(VOCABULARY))),
        (rewards.topd, {"mixing": 0.9}, history_T.numpy()),
        (rewards.vopd, {}, r),
        (rewards.iw_opd, {}, history_T.numpy() * r),
        (rewards.power_opd, {"power": 0.5}, half),
        (rewards.entropy_opd, {"denominator": "all"}, r),
    )
    for ratio in ("none", "importance", "ppo_clip"):
        for objective, constants, advantage in cases:
            rows = golden_rows(losses, student_draws())
            inputs = replace(rows.inputs, history_weight_T=history_T, advantage_T=history_T)
            output = objective(inputs, **constants, policy=policy(losses, ratio=ratio))
            expected = -p * (advantage - (p * advantage).sum())
            assert_close(rows.gradient(output.loss_sum).sum(dim=0), expected, 1e-12)


def vopd_has_no_mean_advantage_and_the_gradient_of_the_reverse_kl(losses: Losses) -> None:
    rows = golden_rows(losses, student_draws())
    output = losses["objectives.rewards"].vopd(rows.inputs, policy=policy(losses))
    p = np.array(student_draws().probability)
    assert_close((p * output.columns["advantage"].numpy()).sum(), 0.0, 1e-12)
    assert_close((p * output.columns["loss"].numpy()).sum(), GOLDEN["reverse_kl"], 1e-9)
    assert_close(rows.gradient(output.loss_sum).sum(dim=0), GOLDEN["reverse_kl_gradient"])


def k2_has_the_gradient_of_the_reverse_kl(losses: Losses) -> None:
    rows = golden_rows(losses, student_draws())
    inputs = replace(rows.inputs, advantage_T=torch.zeros(VOCABULARY, dtype=torch.float64))
    output = losses["objectives.verified"].kdrl(inputs, beta=0.25, policy=policy(losses))
    assert_close(output.columns["divergence"], np.array(GOLDEN["log_ratio"]) ** 2 / 2.0, 5e-6)
    assert_close(rows.gradient(output.loss_sum).sum(dim=0), 0.25 * np.array(GOLDEN["reverse_kl_gradient"]))


def k3_to_the_reference_is_golden(losses: Losses) -> None:
    """With the teacher as reference, d = r. Its gradient in log p is 1 - e^d on the sampled token."""
    rows = golden_rows(losses, student_draws())
    zero_T = torch.zeros(VOCABULARY, dtype=torch.float64)
    inputs = replace(rows.inputs, reference_logp_T=rows.inputs.teacher_logp_T, advantage_T=zero_T)
    output = losses["objectives.verified"].rlad(
        inputs, anchor=1.0, reference_weight=0.5, policy=policy(losses, ratio="ppo_clip")
    )
    assert_close(output.columns["divergence"], GOLDEN["k3"])
    p = np.array(student_draws().probability)
    slope = 0.5 * p * (1.0 - np.exp(GOLDEN["log_ratio"]))
    assert_close(rows.gradient(output.loss_sum).sum(dim=0), slope - p * slope.sum(), 5e-6)


def rlad_clips_at_the_ratio_to_its_anchor(losses: Losses) -> None:
    """Anchored at the teacher, w = p / q: d/dz of row x is -A w (e_x - p), and 0 where PPO holds w."""
    r, p = np.array(GOLDEN["log_ratio"]), np.exp(log_softmax(GOLDEN["student_logits"]))
    for sign in (1.0, -1.0):
        rows = golden_rows(losses, student_draws())
        inputs = replace(rows.inputs, advantage_T=sign * rows.inputs.advantage_T)
        output = losses["objectives.verified"].rlad(
            inputs, anchor=0.0, reference_weight=0.0, policy=policy(losses, ratio="ppo_clip")
        )
        gradient_TV = rows.gradient(output.loss_sum).numpy()
        for x in range(VOCABULARY):
            w = math.exp(-r[x])
            held = w > 1.3 if sign > 0 else not 0.8 <= w <= 3.0
            expected = np.zeros(VOCABULARY) if held else -sign * w * p[x] * (np.eye(VOCABULARY)[x] - p)
            assert_close(gradient_TV[x], expected, 5e-6)


def candidates_on_the_whole_vocabulary_have_the_reverse_kl_gradient(losses: Losses) -> None:
    """The gradient of `rethinking` is exact in every single row, whatever token was sampled."""
    for support, ratio in (("student", "none"), ("student", "ppo_clip"), ("union", "importance")):
        rows = golden_rows(losses, student_draws())
        output = losses["objectives.candidates"].rethinking(
            rows.inputs, support=support, policy=policy(losses, ratio=ratio)
        )
        gradient_TV = rows.gradient(output.loss_sum) / rows.inputs.weight_T[:, None]
        assert_close(gradient_TV, np.tile(GOLDEN["reverse_kl_gradient"], (VOCABULARY, 1)))
        assert_close(output.columns["divergence"], GOLDEN["reverse_kl"], 1e-9)


def candidates_are_weighted_by_the_renormalised_student(losses: Losses) -> None:
    """On a support A, row by row: d/dz_v = -sum over a in A of w_a r_a ([v = a] - p_v), w = p / sum_A p."""
    r, p = np.array(GOLDEN["log_ratio"]), np.exp(log_softmax(GOLDEN["student_logits"]))
    teacher = GOLDEN["teacher_topk_ids"]
    student = np.argsort(-p)[:4].tolist()
    supports = {
        "student": student,
        "teacher": teacher,
        "intersection": [v for v in student if v in teacher],
        "union": [*student, *(v for v in teacher if v not in student)],
        "xor": [v for v in range(VOCABULARY) if (v in student) != (v in teacher)],
    }
    for support, ids in supports.items():
        rows = golden_rows(losses, student_draws())
        own = ("student_own_logp_TL", "teacher_own_logp_TL", "own_ids_TL", "old_own_logp_TL")
        inputs = replace(rows.inputs, **{name: getattr(rows.inputs, name)[:, :4] for name in own})
        output = losses["objectives.candidates"].rethinking(inputs, support=support, policy=policy(losses))
        weighted = np.zeros(VOCABULARY)
        weighted[ids] = p[ids] / p[ids].sum() * r[ids]
        gradient_TV = rows.gradient(output.loss_sum) / rows.inputs.weight_T[:, None]
        assert_close(gradient_TV, np.tile(-(weighted - p * weighted.sum()), (VOCABULARY, 1)), 5e-6)


def selection_counts_and_trains_the_selected_only(losses: Losses) -> None:
    chosen_T = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for name, constants in (
        ("entropy_opd", {"denominator": "selected"}),
        ("reopold", {"floor": -99.0, "train": "selected"}),
    ):
        rows = golden_rows(losses, student_draws())
        inputs = replace(rows.inputs, selected_T=chosen_T)
        output = getattr(losses["objectives.rewards"], name)(inputs, **constants, policy=policy(losses))
        assert_close(int(output.token_count), 3)
        assert_close(output.columns["trusted"], chosen_T)
        gradient_TV = rows.gradient(output.loss_sum)
        assert_close(gradient_TV[chosen_T == 0], 0.0, 0.0)
        assert bool(gradient_TV[chosen_T == 1].any(dim=1).all()), "a selected token has no gradient"


def statistics_of_a_batch_are_those_of_a_hand_count(losses: Losses) -> None:
    """Two samples of prompt 7 and one of prompt 8; the last row of sample 0 is out of the mask."""
    statistics = losses["objectives.parts.batch_statistics"]
    log_ratio = np.array([0.3, -0.2, 0.5, 9.0, 0.1, -0.4, 0.6])
    rows = statistics.BatchRows(
        sample_index_T=np.array([0, 0, 0, 0, 1, 1, 2]),
        token_index_T=np.array([4, 3, 5, 6, 9, 8, 2]),
        on_T=np.array([True, True, True, False, True, True, True]),
        student_entropy_T=np.array([0.1, 0.9, 0.2, 5.0, 0.3, 0.8, 0.4]),
        old_logp_T=np.full(7, -1.0),
        rollout_logp_T=np.full(7, -1.0),
        teacher_logp_T=log_ratio - 1.0,
        prompt_index_S=np.array([7, 7, 8]),
        reward_S=np.array([1.0, 0.0, 1.0]),
    )
    assert_close(statistics.most_uncertain(rows, fraction=0.5), [0, 1, 0, 0, 0, 1, 1], 0.0)
    assert_close(statistics.group_advantage(rows), [1, 1, 1, 0, -1, -1, 0], 1e-12)
    before = np.array([0.2, 0.0, 0.5, 0.0, 0.4, 0.0, 0.0]) / np.array([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.6])
    assert_close(statistics.history_weight(rows, gamma=0.5), (1.5 - 0.5 * before) * rows.on_T, 1e-12)
    m = np.log(0.7 * np.exp(log_ratio) + 0.3)
    later = np.array([m[2], (m[0] + m[2]) / 2, 0.0, 0.0, 0.0, m[4], 0.0])
    returns = (m + later) * rows.on_T
    found = statistics.mixed_return(rows, mixing=0.7, future_mean=True, normalise=False)
    assert_close(found, returns, 1e-12)
    group = returns[[0, 1, 2, 4, 5]]
    expected = np.insert((group - group.mean()) / group.std(), 3, 0.0)
    normalised = statistics.mixed_return(rows, mixing=0.7, future_mean=True, normalise=True)
    assert_close(normalised, np.append(expected, 0.0), 1e-12)


REWARD_CLAIMS: tuple[Claim, ...] = (
    advantages_of_the_log_ratio_family_are_golden,
    an_advantage_has_the_expected_gradient_of_its_closed_form,
    vopd_has_no_mean_advantage_and_the_gradient_of_the_reverse_kl,
    k2_has_the_gradient_of_the_reverse_kl,
    k3_to_the_reference_is_golden,
    rlad_clips_at_the_ratio_to_its_anchor,
    candidates_on_the_whole_vocabulary_have_the_reverse_kl_gradient,
    candidates_are_weighted_by_the_renormalised_student,
    selection_counts_and_trains_the_selected_only,
    statistics_of_a_batch_are_those_of_a_hand_count,
)
