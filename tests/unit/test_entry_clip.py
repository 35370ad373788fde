"""`opsd`: the effect of its bound on value, gradient and count of the entries, without repeating the equation.

Shapes: T tokens, V vocabulary, L student top-k.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.divergence_cases import student_rows
from tests.objective_batch import Batch
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.parts.divergences import topk_forward_kl
from tropd_mcore.objectives.self_distillation import opsd

NORMS = ("truncated", "tail")


def entries_of(inputs: TokenInputs) -> Tensor:
    """q log(q / p) of the student's own candidates, [T, L]."""
    return inputs.teacher_own_logp_TL.exp() * (inputs.teacher_own_logp_TL - inputs.student_own_logp_TL)


@pytest.mark.parametrize("norm", NORMS)
def test_a_bound_far_above_every_entry_gives_the_forward_kl_bit_for_bit(norm: str) -> None:
    batch = Batch(moved=0.3)
    inputs = batch.inputs()
    output = opsd(inputs, entry_clip=1e6, norm=norm)
    fkl_T = topk_forward_kl(inputs.student_own_logp_TL, inputs.teacher_own_logp_TL, norm=norm)
    expected = (batch.weight_T * fkl_T)[batch.on_T].sum()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-14, atol=0)
    (found_TV,) = torch.autograd.grad(output.loss_sum, batch.z_TV, retain_graph=True)
    torch.testing.assert_close(found_TV, batch.gradient(expected), rtol=0, atol=1e-15)
    assert torch.equal(output.columns["divergence"][batch.on_T], fkl_T.detach()[batch.on_T])
    assert not output.columns["clipped_entries"][batch.on_T].any()
    assert output.columns["clipped_entries"][~batch.on_T].isnan().all()


def test_clipped_entries_have_gradient_zero_and_the_others_that_of_the_forward_kl() -> None:
    """With respect to the candidates' log-probs, of which `truncated` makes one entry each: -q, or 0."""
    batch, bound = student_rows(Batch()), 0.05
    inputs = batch.inputs()
    own_TL = inputs.student_own_logp_TL.detach().requires_grad_(True)
    inputs = replace(inputs, student_own_logp_TL=own_TL)
    output = opsd(inputs, entry_clip=bound, norm="truncated")
    (gradient_TL,) = torch.autograd.grad(output.loss_sum, own_TL)
    clipped_TL = entries_of(inputs).detach() > bound
    assert clipped_TL.any() and not clipped_TL.all()
    assert not gradient_TL[clipped_TL].any()
    unclipped_TL = -batch.weight_T[:, None] * inputs.teacher_own_logp_TL.exp()
    torch.testing.assert_close(gradient_TL[~clipped_TL], unclipped_TL[~clipped_TL], rtol=1e-14, atol=0)
    assert torch.equal(output.columns["clipped_entries"], clipped_TL.sum(dim=1).double())


def test_the_tail_is_clipped_like_every_other_entry() -> None:
    """q is almost all outside the candidates and p is not: the tail is far above the bound, and the only such entry."""
    batch = student_rows(Batch(tokens=1))
    inputs = batch.inputs()
    own_TL = torch.full((1, 2), math.log(0.45), dtype=torch.float64, requires_grad=True)
    teacher_TL = torch.full((1, 2), math.log(0.01), dtype=torch.float64)
    inputs = replace(inputs, student_own_logp_TL=own_TL, teacher_own_logp_TL=teacher_TL)
    output = opsd(inputs, entry_clip=0.2, norm="tail")
    (gradient_TL,) = torch.autograd.grad(output.loss_sum, own_TL)
    assert float(output.columns["clipped_entries"]) == 1.0
    assert float(output.columns["loss"]) == pytest.approx(0.2 - 0.02 * math.log(45))
    torch.testing.assert_close(gradient_TL, -0.01 * batch.weight_T[:, None].expand(1, 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_grows_with_the_bound_and_stays_below_the_bound_times_the_entries(norm: str) -> None:
    inputs = student_rows(Batch()).inputs()
    before_T = torch.full_like(inputs.old_logp_T, -math.inf)
    for bound in (1e-3, 0.01, 0.1, 1.0, 10.0):
        loss_T = opsd(inputs, entry_clip=bound, norm=norm).columns["loss"]
        assert (loss_T >= before_T).all()
        assert (loss_T <= bound * (inputs.own_ids_TL.shape[1] + 1)).all()
        before_T = loss_T


def test_an_absent_candidate_does_not_count_as_clipped() -> None:
    inputs = student_rows(Batch()).inputs()
    absent = replace(inputs, teacher_own_logp_TL=torch.full_like(inputs.teacher_own_logp_TL, -math.inf))
    output = opsd(absent, entry_clip=1e-9, norm="truncated")
    assert not output.columns["clipped_entries"].any() and not output.columns["loss"].any()
