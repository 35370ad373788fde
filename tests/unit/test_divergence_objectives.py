"""Objectives with a differentiable divergence: golden values, exact expectations, oracles by token.

Shapes: T tokens, V vocabulary, K teacher top-k, L student top-k.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import divergence_oracles, oracles
from tests.divergence_cases import MOVED, PLAIN, TROPD, Objective, every_objective, student_rows
from tests.objective_batch import Batch
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.matching import eopd, gkd, jsd, lsm
from tropd_mcore.objectives.parts.divergences import topk_forward_kl
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient
from tropd_mcore.objectives.self_distillation import sdpo
from tropd_mcore.objectives.trust_region import aopd, opd, tropd, tropd_aopd

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tropd_vector.json").read_text(encoding="utf-8"))
TEACHER_HALF = 0.1115673832
STUDENT_HALF = [0.268267, -0.394839, 0.335231, -0.213526, -0.059506, 0.063962, 0.157058, -0.817395]
AOPD_GATE = [1, 0, 1, 0, 0, 1, 1, 0]
LSM = 0.9394879017
LSM_GRADIENT = [0.638140, -0.499427, 0.0, -0.138714, 0.0, 0.0, 0.0, 0.0]
GOLDEN_TOLERANCE = 1.5e-6
"""The golden vectors have 6 decimals."""


def golden_batch(topk: int = 3) -> Batch:
    """Every outcome x once, weighted by p(x): sums over the rows are exact expectations over x ~ p."""
    batch = student_rows(Batch(tokens=8, vocabulary=8, topk=topk, student_topk=4))
    z_V = torch.tensor(GOLDEN["student_logits"], dtype=torch.float64)
    batch.z_TV = z_V.repeat(8, 1).requires_grad_(True)
    batch.old_z_TV = batch.z_TV.detach().clone()
    batch.log_q_TV = torch.tensor(GOLDEN["teacher_logits"], dtype=torch.float64).log_softmax(0).repeat(8, 1)
    batch.x_T = torch.arange(8)
    batch.weight_T = z_V.softmax(0)
    return batch


def golden_log_probs() -> tuple[oracles.Array, oracles.Array]:
    """log p and log q."""
    return (
        oracles.log_softmax(np.array(GOLDEN["student_logits"])),
        oracles.log_softmax(np.array(GOLDEN["teacher_logits"])),
    )


def gradient_of(loss: Tensor, batch: Batch) -> Tensor:
    """d loss / d z, [T, V]. The graph may be used again."""
    (gradient_TV,) = torch.autograd.grad(loss, batch.z_TV, retain_graph=True)
    return gradient_TV


def expected_gradient(objective: Objective, topk: int = 3) -> oracles.Array:
    """The expectation over x ~ p of d loss / d z, [V]."""
    batch = golden_batch(topk)
    return batch.gradient(objective(batch.inputs()).loss_sum).sum(dim=0).numpy()


def assert_close(actual: Any, expected: Any, tolerance: float = GOLDEN_TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


# ---- golden values and exact expectations ----


def test_the_golden_aopd_gate_is_open_where_the_teachers_probability_is_higher() -> None:
    columns = aopd(golden_batch().inputs(), threshold=0.0, norm="truncated", policy=PLAIN).columns
    assert columns["trusted"].tolist() == [1 - closed for closed in AOPD_GATE]
    value = [
        GOLDEN["forward_kl_topk"]["truncated"] if gate else -r
        for gate, r in zip(AOPD_GATE, GOLDEN["log_ratio"], strict=True)
    ]
    assert_close(columns["loss"], value)


def test_the_golden_halves_of_the_jsd_add_up_to_its_loss() -> None:
    columns = jsd(golden_batch().inputs(), beta=0.5, policy=PLAIN).columns
    assert_close(columns["loss"], TEACHER_HALF + np.array(STUDENT_HALF))


@pytest.mark.parametrize("norm", ["truncated", "tail", "renorm"])
def test_gkd_has_the_golden_forward_kl_and_gradient(norm: str) -> None:
    objective = partial(gkd, divergence="fkl", beta=0.5, norm=norm, full_vocabulary=False)
    assert_close(objective(golden_batch().inputs()).columns["loss"], GOLDEN["forward_kl_topk"][norm], 1e-9)
    assert_close(expected_gradient(objective), GOLDEN["forward_kl_topk_gradient"][norm])


def test_gkd_on_all_tokens_has_the_golden_reverse_kl_and_gradient() -> None:
    objective = partial(gkd, divergence="rkl", beta=0.5, norm="tail", full_vocabulary=False)
    assert_close(objective(golden_batch(topk=8).inputs()).columns["loss"], GOLDEN["reverse_kl"], 1e-9)
    assert_close(expected_gradient(objective, topk=8), GOLDEN["reverse_kl_gradient"])


def test_lsm_has_the_golden_value_and_gradient() -> None:
    objective = partial(lsm, sampled_tail=False, clip_log_ratio=None)
    assert_close(objective(golden_batch().inputs()).columns["loss"], LSM, 1e-9)
    assert_close(expected_gradient(objective), LSM_GRADIENT)


@pytest.mark.parametrize(("threshold", "adds"), [(0.8, 1.0), (1.2, 0.0)])
def test_the_expected_gradient_of_eopd_is_the_reverse_kl_plus_the_forward_kl_at_high_entropy(
    threshold: float, adds: float
) -> None:
    """The golden teacher has an entropy of 1.10 nats."""
    objective = partial(eopd, entropy_threshold=threshold, norm="truncated", policy=PLAIN)
    forward = np.array(GOLDEN["forward_kl_topk_gradient"]["truncated"])
    assert_close(expected_gradient(objective), np.array(GOLDEN["reverse_kl_gradient"]) + adds * forward, 3e-6)


def test_the_expected_gradient_of_aopd_is_that_of_its_two_regions() -> None:
    log_p, log_q = golden_log_probs()
    p, closed = np.exp(log_p), np.array(AOPD_GATE)
    forward = divergence_oracles.divergence_gradient("fkl", log_q, log_p, [1, 3, 0], "truncated")
    expected = (p * closed).sum() * forward
    for x in range(8):
        expected += p[x] * (1 - closed[x]) * (log_q[x] - log_p[x]) * (p - np.eye(8)[x])
    assert_close(expected_gradient(partial(aopd, threshold=0.0, norm="truncated", policy=PLAIN)), expected, 1e-12)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.9])
def test_the_expected_gradient_of_the_jsd_is_exact_on_the_whole_vocabulary(beta: float) -> None:
    """The score of the sampled half, the mixture's part of it, and the direct half together."""
    log_p, log_q = golden_log_probs()
    exact = divergence_oracles.exact_gradient("jsd", log_q, log_p, beta)
    assert_close(expected_gradient(partial(jsd, beta=beta, policy=PLAIN), topk=8), exact, 1e-12)


def test_the_expected_gradient_of_the_sampled_half_of_the_jsd_is_that_of_its_kl() -> None:
    """Without the direct half: K1 of KL(p || mix), mix moving with p. By central differences of the exact value."""
    log_p, log_q = golden_log_probs()
    q, beta, step = np.exp(log_q), 0.3, 1e-5

    def value(z: oracles.Array) -> float:
        p = np.exp(oracles.log_softmax(z))
        return float((1 - beta) * (p * np.log(p / (beta * q + (1 - beta) * p))).sum())

    z = np.array(GOLDEN["student_logits"])
    exact = [(value(z + step * unit) - value(z - step * unit)) / (2 * step) for unit in np.eye(8)]

    def sampled_half(inputs: TokenInputs) -> TokenLosses:
        nobody_TK = torch.full_like(inputs.teacher_topk_logp_TK, -math.inf)
        return jsd(replace(inputs, teacher_topk_logp_TK=nobody_TK), beta=beta, policy=PLAIN)

    assert_close(expected_gradient(sampled_half), exact, 1e-9)
    assert_close((np.exp(log_p) * sampled_half(golden_batch().inputs()).columns["loss"].numpy()).sum(), value(z), 1e-12)


@pytest.mark.parametrize(
    "name", [name for name in every_objective() if name not in ("gkd fkl truncated", "opsd truncated", "eopd", "jsd")]
)
def test_a_student_equal_to_its_teacher_has_no_gradient(name: str) -> None:
    """Except if a sum of q log(q / .) is truncated, which pulls towards the support."""
    batch = student_rows(Batch())
    batch.log_q_TV = batch.z_TV.detach().log_softmax(dim=1)
    output = every_objective()[name](batch.inputs())
    assert batch.gradient(output.loss_sum).abs().max() <= 1e-15
    assert output.columns["loss"].abs().max() <= 1e-14


# ---- composition ----


@pytest.mark.parametrize("policy", [PLAIN, MOVED], ids=["plain", "moved"])
def test_eopd_is_opd_plus_the_forward_kl_of_uncertain_states(policy: PolicyGradient) -> None:
    batch = Batch(moved=0.3)
    inputs = batch.inputs()
    threshold = float(inputs.teacher_entropy_T.median())
    both = eopd(inputs, entropy_threshold=threshold, norm="tail", policy=policy)
    uncertain_T = (inputs.teacher_entropy_T > threshold) & inputs.student_mask_T
    assert 3 < int(uncertain_T.sum()) < int(inputs.student_mask_T.sum()) - 3
    forward_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm="tail")
    expected = opd(inputs, policy=policy).loss_sum + (batch.weight_T * uncertain_T * forward_T).sum()
    torch.testing.assert_close(both.loss_sum, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_of(both.loss_sum, batch), gradient_of(expected, batch), rtol=0, atol=1e-13)


@pytest.mark.parametrize("policy", [PLAIN, MOVED], ids=["plain", "moved"])
def test_aopd_equals_opd_with_its_gate_open_and_the_forward_kl_with_its_gate_closed(policy: PolicyGradient) -> None:
    batch = student_rows(Batch(moved=0.3))
    inputs = batch.inputs()
    always_open, always_closed = (
        aopd(inputs, threshold=threshold, norm="truncated", policy=policy) for threshold in (-1.0, 1.0)
    )
    assert torch.equal(always_open.loss_sum, opd(inputs, policy=policy).loss_sum)
    forward = gkd(inputs, divergence="fkl", beta=0.5, norm="truncated", full_vocabulary=False)
    torch.testing.assert_close(always_closed.loss_sum, forward.loss_sum, rtol=1e-15, atol=0)


def test_the_aopd_gate_uses_the_student_before_the_update() -> None:
    batch = student_rows(Batch(moved=1.0))
    inputs = batch.inputs()
    columns = aopd(inputs, threshold=0.0, norm="truncated", policy=PLAIN).columns
    before_T = (inputs.teacher_logp_T > inputs.old_logp_T).double()
    assert torch.equal(columns["trusted"], before_T)
    assert not torch.equal(before_T, (inputs.teacher_logp_T > inputs.student_logp_T).double())


@pytest.mark.parametrize("policy", [PLAIN, MOVED], ids=["plain", "moved"])
def test_tropd_aopd_adds_the_forward_kl_on_gated_student_tokens_only(policy: PolicyGradient) -> None:
    batch = Batch(moved=0.3)
    inputs = batch.inputs()
    plain = tropd(inputs, **TROPD, policy=policy)
    both, none = (
        tropd_aopd(inputs, aopd_threshold=0.0, aopd_weight=weight, **TROPD, policy=policy) for weight in (0.4, 0.0)
    )
    assert torch.equal(none.loss_sum, plain.loss_sum) and torch.equal(none.columns["loss"], plain.columns["loss"])
    gated_T = inputs.student_mask_T & (inputs.teacher_logp_T <= inputs.old_logp_T)
    forward_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm="tail")
    expected = plain.loss_sum + 0.4 * (batch.weight_T * gated_T * forward_T).sum()
    torch.testing.assert_close(both.loss_sum, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_of(both.loss_sum, batch), gradient_of(expected, batch), rtol=0, atol=1e-13)
    added_T = both.columns["loss"] - plain.columns["loss"]
    torch.testing.assert_close(added_T, 0.4 * (gated_T * forward_T).detach(), rtol=0, atol=1e-13)
    assert int(both.token_count) == int(plain.token_count)


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd"])
@pytest.mark.parametrize("norm", ["truncated", "tail", "renorm"])
def test_gkd_equals_the_oracle_on_student_tokens(divergence: str, norm: str) -> None:
    batch = Batch()
    output = gkd(batch.inputs(), divergence=divergence, beta=0.3, norm=norm, full_vocabulary=False)
    _assert_is_a_divergence_on_student_tokens(
        batch,
        output,
        lambda log_q, log_p, token: (
            divergence_oracles.divergence(divergence, log_q, log_p, ids(batch, token), norm, 0.3),
            divergence_oracles.divergence_gradient(divergence, log_q, log_p, ids(batch, token), norm, 0.3),
        ),
    )


def test_lsm_appends_the_sampled_token_only_if_it_is_outside_the_support() -> None:
    batch = Batch(topk=24)
    inside = [int(batch.x_T[token]) in ids(batch, token) for token in range(len(batch.origin))]
    assert 3 < sum(inside) < len(inside) - 3

    def expected(log_q: oracles.Array, log_p: oracles.Array, token: int) -> tuple[float, oracles.Array]:
        support = list(dict.fromkeys([*ids(batch, token), int(batch.x_T[token])]))
        return (
            divergence_oracles.divergence("rkl", log_q, log_p, support, "renorm"),
            divergence_oracles.divergence_gradient("rkl", log_q, log_p, support, "renorm"),
        )

    output = lsm(batch.inputs(), sampled_tail=True, clip_log_ratio=None)
    _assert_is_a_divergence_on_student_tokens(batch, output, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("norm", ["tail", "renorm"])
@pytest.mark.parametrize("mismatch", ["off", "tis"])
def test_sdpo_equals_the_oracle_after_the_policy_has_moved(alpha: float, norm: str, mismatch: str) -> None:
    batch = Batch(moved=0.4)
    inputs = batch.inputs()
    kind = {0.0: "fkl", 1.0: "rkl"}.get(alpha, "jsd")

    def expected(log_q: oracles.Array, log_p: oracles.Array, token: int) -> tuple[float, oracles.Array]:
        own = inputs.own_ids_TL[token].tolist()
        return (
            divergence_oracles.divergence(kind, log_q, log_p, own, norm, alpha),
            divergence_oracles.divergence_gradient(kind, log_q, log_p, own, norm, alpha),
        )

    def factor(token: int) -> float:
        x = int(batch.x_T[token])
        old = float(oracles.log_softmax(batch.old_z_TV[token].numpy())[x])
        now = float(oracles.log_softmax(batch.z_TV[token].detach().numpy())[x])
        engine = min(math.exp(old - float(batch.rollout_logp_T[token])), 1.1) if mismatch == "tis" else 1.0
        return min(math.exp(now - old), 1.2) * engine

    policy = PolicyGradient(mismatch=mismatch, tis_cap=1.1)
    output = sdpo(inputs, alpha=alpha, norm=norm, ratio_cap=1.2, policy=policy)
    _assert_is_a_divergence_on_student_tokens(batch, output, expected, factor)
    assert 1.0 < float(output.columns["ratio"].max()) <= 1.2


def test_gkd_takes_the_divergence_over_the_whole_vocabulary_from_the_kernel() -> None:
    batch = Batch()
    exact_T = (batch.z_TV.softmax(1) * (batch.z_TV.log_softmax(1) - batch.log_q_TV)).sum(dim=1)
    inputs = replace(batch.inputs(), divergence_T=exact_T)
    output = gkd(inputs, divergence="rkl", beta=0.5, norm="tail", full_vocabulary=True)
    _assert_is_a_divergence_on_student_tokens(
        batch,
        output,
        lambda log_q, log_p, token: (
            divergence_oracles.exact("rkl", log_q, log_p),
            divergence_oracles.exact_gradient("rkl", log_q, log_p),
        ),
    )


def ids(batch: Batch, token: int) -> list[int]:
    """The teacher's top-k."""
    return oracles.top_ids(batch.log_q_TV[token].numpy(), batch.topk)


def _assert_is_a_divergence_on_student_tokens(
    batch: Batch,
    output: TokenLosses,
    expected: Callable[[oracles.Array, oracles.Array, int], tuple[float, oracles.Array]],
    factor: Callable[[int], float] = lambda token: 1.0,
) -> None:
    gradient_TV = batch.gradient(output.loss_sum).numpy()
    total = 0.0
    for token, origin in enumerate(batch.origin):
        log_q = batch.log_q_TV[token].numpy()
        value, gradient = expected(log_q, oracles.log_softmax(batch.z_TV[token].detach().numpy()), token)
        scale = float(batch.weight_T[token]) * factor(token) if origin == "student" else 0.0
        total += scale * value
        np.testing.assert_allclose(gradient_TV[token], scale * gradient, rtol=0, atol=1e-12)
        assert float(output.columns["loss"][token]) == pytest.approx(value if origin == "student" else 0.0, abs=1e-12)
        assert float(output.columns["advantage"][token]) == 0.0
    assert float(output.loss_sum.detach()) == pytest.approx(total, abs=1e-10)
    assert int(output.token_count) == sum(origin != "none" for origin in batch.origin)
