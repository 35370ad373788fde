"""Properties of every objective with a divergence: masks, detached constants, chunks, dtypes, convergence.

Shapes: T tokens, V vocabulary, K teacher top-k, L student top-k.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from tests.divergence_cases import MOVED, PLAIN, every_objective, student_rows
from tests.objective_batch import Batch
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.matching import eopd, gkd
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient

CONSTANTS = {
    "teacher_logp_T",
    "teacher_topk_logp_TK",
    "teacher_own_logp_TL",
    "teacher_entropy_T",
    "reference_logp_T",
    "old_logp_T",
    "old_own_logp_TL",
    "rollout_logp_T",
    "selected_T",
    "advantage_T",
    "history_weight_T",
    "trust_u_T",
}


@pytest.mark.parametrize("name", every_objective())
@pytest.mark.parametrize("fill", [math.nan, -math.inf, 1e30])
def test_a_token_outside_both_masks_has_no_influence_whatever_its_values(name: str, fill: float) -> None:
    policy = PolicyGradient(ratio="importance", mismatch="icepop")
    objective, batch = every_objective(policy)[name], Batch(moved=0.2)
    inputs = batch.inputs()
    dirty = {}
    for field in CONSTANTS:
        value = getattr(inputs, field)
        rows = batch.uncounted_T if value.ndim == 1 else batch.uncounted_T[:, None]
        dirty[field] = value.masked_fill(rows, fill)
    clean, soiled = objective(inputs), objective(replace(inputs, **dirty))
    assert torch.equal(clean.loss_sum, soiled.loss_sum) and int(clean.token_count) == int(soiled.token_count)
    gradient_TV = batch.gradient(soiled.loss_sum)
    assert gradient_TV.isfinite().all() and not gradient_TV[batch.uncounted_T].any()
    assert soiled.columns["divergence"][batch.uncounted_T].isnan().all()
    assert not soiled.columns["loss"][batch.uncounted_T].any()


def test_a_full_vocabulary_divergence_outside_both_masks_has_no_influence() -> None:
    batch = Batch()
    divergence_T = batch.z_TV.sum(dim=1).masked_fill(batch.uncounted_T, math.nan)
    inputs = replace(batch.inputs(), divergence_T=divergence_T)
    output = gkd(inputs, divergence="fkl", beta=0.5, norm="tail", full_vocabulary=True)
    (gradient_T,) = torch.autograd.grad(output.loss_sum, divergence_T)
    torch.testing.assert_close(gradient_T, batch.weight_T * batch.on_T, rtol=0, atol=0)


@pytest.mark.parametrize("name", every_objective())
@pytest.mark.parametrize("policy", [PLAIN, MOVED], ids=["plain", "moved"])
def test_gradients_of_divergence_objectives_flow_only_through_the_student(name: str, policy: PolicyGradient) -> None:
    inputs = Batch(moved=0.2).inputs()
    live = {field: getattr(inputs, field).detach().clone().requires_grad_(True) for field in CONSTANTS}
    output = every_objective(policy)[name](replace(inputs, **live))
    gradients = torch.autograd.grad(output.loss_sum, list(live.values()), allow_unused=True)
    for field, gradient in zip(live, gradients, strict=True):
        assert gradient is None or not gradient.any(), f"a gradient flows through {field}"
    assert not any(column.requires_grad for column in output.columns.values())


@pytest.mark.parametrize("name", every_objective())
def test_chunk_losses_add_up_and_chunk_columns_concatenate(name: str) -> None:
    objective, batch = every_objective(MOVED)[name], Batch(moved=0.2)
    inputs = batch.inputs()

    def part(rows: slice) -> TokenInputs:
        values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
        return TokenInputs(**{key: None if value is None else value[rows] for key, value in values.items()})

    whole = objective(inputs)
    pieces = [objective(part(slice(start, start + 9))) for start in range(0, 37, 9)]
    torch.testing.assert_close(sum(piece.loss_sum for piece in pieces), whole.loss_sum, rtol=1e-13, atol=1e-13)
    assert sum(int(piece.token_count) for piece in pieces) == int(whole.token_count)
    for column, values_T in whole.columns.items():
        joined_T = torch.cat([piece.columns[column] for piece in pieces])
        torch.testing.assert_close(joined_T, values_T, rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("name", every_objective())
def test_divergence_objectives_of_zero_tokens_give_loss_zero_and_an_empty_gradient(name: str) -> None:
    batch = Batch(tokens=0)
    output = every_objective()[name](batch.inputs())
    assert float(output.loss_sum.detach()) == 0.0 and int(output.token_count) == 0
    assert batch.gradient(output.loss_sum).shape == (0, 101)


@pytest.mark.parametrize("name", every_objective())
def test_divergence_objectives_in_float32_differ_from_float64_only_by_rounding(name: str) -> None:
    inputs = Batch(moved=0.2).inputs()
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    narrow = {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in values.items()
    }
    objective = every_objective(MOVED)[name]
    wide_loss, narrow_loss = objective(inputs).loss_sum, objective(TokenInputs(**narrow)).loss_sum
    assert narrow_loss.dtype == torch.float32
    torch.testing.assert_close(narrow_loss.double(), wide_loss, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["aopd", "jsd", "lsm with the sampled token"])
def test_a_token_that_the_teacher_excludes_has_a_finite_loss(name: str) -> None:
    """log q(x) = -inf: AOPD's gate closes, the mixture keeps p, local matching leaves the token out."""
    batch = Batch()
    inputs = batch.inputs()
    inputs = replace(inputs, teacher_logp_T=torch.full_like(inputs.teacher_logp_T, -math.inf))
    output = every_objective()[name](inputs)
    assert output.loss_sum.isfinite() and batch.gradient(output.loss_sum).isfinite().all()


def test_a_teacher_that_cannot_give_its_entropy_makes_the_loss_of_eopd_nan() -> None:
    inputs = Batch().inputs()
    unknown = replace(inputs, teacher_entropy_T=torch.full_like(inputs.teacher_entropy_T, math.nan))
    assert eopd(unknown, entropy_threshold=0.8, norm="truncated", policy=PLAIN).loss_sum.isnan()


@pytest.mark.parametrize("name", ["eopd", "aopd", "jsd", "lsm", "gkd rkl tail", "sdpo 0.4 tail"])
def test_a_tabular_student_approaches_its_teacher_with_every_divergence_objective(name: str) -> None:
    """Eleven tokens, plain gradient descent on sampled tokens: the total variation on the candidates falls."""
    random = torch.Generator().manual_seed(23)
    batch = student_rows(Batch(seed=3, tokens=100, vocabulary=11, topk=6, student_topk=6))
    z_V, log_q_V = batch.old_z_TV[0].clone(), batch.log_q_TV[0].clone()
    batch.log_q_TV = log_q_V.repeat(100, 1)
    batch.weight_T = torch.full((100,), 1 / 100, dtype=torch.float64)
    teacher_V, objective = log_q_V.softmax(0), every_objective()[name]
    known = log_q_V.topk(6).indices

    def distance() -> float:
        p, q = z_V.softmax(0)[known], teacher_V[known]
        return float((p / p.sum() - q / q.sum()).abs().sum())

    before = distance()
    for _ in range(20):
        batch.z_TV = z_V.repeat(100, 1).requires_grad_(True)
        batch.old_z_TV = batch.z_TV.detach()
        batch.x_T = torch.multinomial(z_V.softmax(0), 100, replacement=True, generator=random)
        batch.rollout_logp_T = z_V.log_softmax(0)[batch.x_T]
        z_V = z_V - 2.0 * batch.gradient(objective(batch.inputs()).loss_sum).sum(dim=0)
    assert before > 0.5 and distance() < 0.5 * before
