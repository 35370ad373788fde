"""The library inside activation checkpoints and hooks, and next to other readers of the logits: right or refused.

docs/autograd.md has the whole table for the kernel that the library calls (tests/dist/test_autograd.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.allocations import traced_allocations
from tests.library_cases import VP, B, Case, S
from tropd_mcore import LossInputError, OutputLayer, TeacherTopK, VocabParallel, distill_loss, objectives
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.parts.divergences import topk_forward_kl

FORMS: dict[str, dict[str, Any]] = {
    "logits": {}, "logits, kept": {"preserve_logits": True}, "logits, each": {"reduction": "none"},
    "hidden, deferred": {"mode": "deferred"}, "hidden, recompute": {"mode": "recompute"},
    "hidden, recompute, each": {"mode": "recompute", "reduction": "none"},
}  # fmt: skip
CHUNKS = -(-B * S // VP.chunk_tokens)


class Counting:
    """A custom loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: TokenInputs) -> TokenLosses:
        self.calls += 1
        kl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm="tail")
        return TokenLosses(kl_T - 0.3 * inputs.student_logp_T, inputs.student_mask_T)


def by_softmax(case: Case, logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    assert case.top.ids_TK is not None and case.top.logp_TK is not None
    log_p_K, log_q_K = log_p.gather(-1, case.top.ids_TK), case.top.logp_TK
    rest_p, rest_q = 1 - log_p_K.exp().sum(-1), 1 - log_q_K.exp().sum(-1)
    kl = (log_q_K.exp() * (log_q_K - log_p_K)).sum(-1) + rest_q * (rest_q / rest_p).log()
    return ((kl - 0.3 * case.at(log_p)) * case.mask).sum()


def expected_gradient(case: Case, form: dict[str, Any]) -> Tensor:
    """The gradient in the leaf of the form: logits or hidden states."""
    if "mode" not in form:
        leaf = case.logits().requires_grad_()
        by_softmax(case, leaf).backward()
    else:
        leaf = case.hidden.clone().requires_grad_()
        by_softmax(case, leaf @ case.weight.T).backward()
    assert leaf.grad is not None
    return leaf.grad


def loss_of(case: Case, form: dict[str, Any], objective: Callable[..., Any], z: Tensor) -> Tensor:
    """The scalar loss of a tensor computed from the leaf."""
    options = {name: value for name, value in form.items() if name != "mode"}
    student = OutputLayer(z, case.weight, weight_grad=form["mode"]) if "mode" in form else z
    out = distill_loss(student, case.x, case.top, objective, vp=VP, student_mask_T=case.mask, **options)
    return out.loss_sum if out.loss_T is None else out.loss_T.sum()


def plain(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    return loss(leaf * 1.0)


def hooks_that_clone(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    with saved_tensors_hooks(torch.clone, lambda saved: saved):
        return loss(leaf * 1.0)


def offload(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    with save_on_cpu():
        return loss(leaf * 1.0)


def in_a_checkpoint(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    return checkpoint(lambda z: loss(z * 1.0) * 1.0, leaf, use_reentrant=False)  # type: ignore[no-any-return]


def in_a_reentrant_checkpoint(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    return checkpoint(lambda z: loss(z * 1.0) * 1.0, leaf, use_reentrant=True)  # type: ignore[no-any-return]


def scaled(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    value = loss(leaf * 1.0)
    value /= 4.0  # as Megatron's schedule does without calculate_per_token_loss
    return value * 4.0


RUNS = {plain: 1, hooks_that_clone: 1, offload: 1, in_a_checkpoint: 2, in_a_reentrant_checkpoint: 2, scaled: 1}
"""Situation -> number of forward passes."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("situation", RUNS, ids=lambda situation: situation.__name__)
def test_the_gradient_is_right_in_every_situation_and_the_objective_is_never_called_needlessly(
    situation: Callable[..., Tensor], form: str
) -> None:
    case, objective = Case(), Counting()
    leaf = (case.hidden if "mode" in FORMS[form] else case.logits()).clone().requires_grad_()
    situation(lambda z: loss_of(case, FORMS[form], objective, z), leaf).backward()
    torch.testing.assert_close(leaf.grad, expected_gradient(case, FORMS[form]), rtol=1e-9, atol=1e-11)
    # If the gradient is computed in the forward pass, a checkpoint that keeps its tensors reruns nothing.
    made_at_once = "deferred" in form
    runs = 1 if made_at_once and situation is in_a_checkpoint else RUNS[situation]
    assert objective.calls == runs * (CHUNKS if made_at_once else 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_backward_pass_and_a_second_derivative_raise(form: str) -> None:
    case = Case()
    start = case.hidden if "mode" in FORMS[form] else case.logits()
    leaf = start.clone().requires_grad_()
    loss = loss_of(case, FORMS[form], Counting(), leaf * 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(LossInputError, match="a second backward pass through the same loss"):
        loss.backward()
    leaf = start.clone().requires_grad_()
    with pytest.raises((LossInputError, RuntimeError)):
        loss = loss_of(case, FORMS[form], Counting(), leaf * 1.0)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.sum().backward()


def test_the_reported_value_survives_an_in_place_division_of_the_loss() -> None:
    case = Case()
    out = distill_loss(case.logits().requires_grad_() * 1.0, case.x, case.top, objectives.opd(), vp=VP)
    before = float(out.value)
    total = out.loss_sum
    total /= 7.0
    assert float(out.value) == before and float(total.detach()) == pytest.approx(before / 7.0)


def test_other_readers_of_the_logits_raise_unless_they_are_kept() -> None:
    """A second loss that has saved them, tanh that has saved its result, a call for each slice."""
    case = Case()

    def twice(**how: Any) -> None:
        leaf = case.logits().requires_grad_()
        logits = leaf * 1.0
        both = logits.square().sum() + loss_of(case, how, Counting(), logits)
        both.backward()
        expected = 2.0 * case.logits() + expected_gradient(case, {})
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-10)

    def slices(**how: Any) -> None:
        leaf = case.logits().requires_grad_()
        logits = leaf * 1.0
        total = logits.new_zeros(())
        for row in range(B):
            out = distill_loss(
                logits[row], None, TeacherTopK(None, case.top.ids_TK[row], case.top.logp_TK[row]),  # type: ignore[index]
                objectives.lsm(), vp=VP, student_mask_T=case.mask[row], **how,
            )  # fmt: skip
            total = total + out.loss_sum
        total.backward()

    for readers in (twice, slices):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            readers()
        readers(preserve_logits=True)


def test_kept_logits_cost_one_buffer_of_their_size() -> None:
    tokens, vocabulary = 512, 4096
    vp, size = VocabParallel.single(vocabulary, chunk_tokens=64), tokens * vocabulary * 4
    numbers = torch.zeros(tokens)

    def peak(**how: Any) -> int:
        logits = torch.zeros(tokens, vocabulary).requires_grad_().clone()  # whose backward makes nothing
        with traced_allocations() as found:
            out = distill_loss(logits, numbers.long(), TeacherTopK(numbers), objectives.opd(), vp=vp, **how)
            out.loss_sum.backward()
        return found.peak

    without = peak()
    assert without < 0.5 * size
    assert abs(peak(preserve_logits=True) - without - size) < 0.01 * size
