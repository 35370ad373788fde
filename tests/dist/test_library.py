"""The library on ranks that split the vocabulary: the same bits on each, the results of one process, and detection of
inputs that differ between ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.unit.test_library import NAMES, Case, V
from tropd_mcore import (
    LossInputError,
    OutputLayer,
    TeacherLogits,
    VocabParallel,
    distill_loss,
    distributed_topk,
    objectives,
    support_log_probs,
    trust_uniforms,
)

CUTS = {2: (0, 19, 37), 3: (0, 5, 29, 37)}
"""Uneven shards of the vocabulary."""


def _shard() -> tuple[VocabParallel, slice]:
    cuts, rank, group = CUTS[dist.get_world_size()], dist.get_rank(), dist.group.WORLD
    assert group is not None
    return VocabParallel(group, V, start=cuts[rank], chunk_tokens=4), slice(cuts[rank], cuts[rank + 1])


def _losses(form: str) -> dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """By name: the sum, the gradient of logits or hidden states and weight, the columns."""
    vp, columns = _shard()
    found = {}
    for name in NAMES:
        case, objective = Case(), objectives.from_name(name)
        teacher: Any = case.teacher_of(objective)
        if isinstance(teacher, TeacherLogits):
            teacher = replace(teacher, source=case.teacher[..., columns].contiguous(), vp=vp)
        if form == "logits":
            leaf = case.logits()[..., columns].contiguous().requires_grad_()
            student: Any = leaf * 1.0
        else:
            leaf = case.hidden.clone().requires_grad_()
            student = OutputLayer(leaf, case.weight[columns].clone())
        out = distill_loss(student, case.x, teacher, objective, vp=vp, **case.all_of(objective))
        out.loss_sum.backward()
        assert leaf.grad is not None
        found[name] = (out.value, leaf.grad, out.columns)
    return found


def _alone(name: str, form: str) -> tuple[Tensor, Tensor]:
    case, objective = Case(), objectives.from_name(name)
    vp = VocabParallel.single(V, chunk_tokens=4)
    leaf = (case.logits() if form == "logits" else case.hidden.clone()).requires_grad_()
    student: Any = leaf * 1.0 if form == "logits" else OutputLayer(leaf, case.weight)
    out = distill_loss(student, case.x, case.teacher_of(objective), objective, vp=vp, **case.all_of(objective))
    out.loss_sum.backward()
    assert leaf.grad is not None
    return out.value, leaf.grad


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_have_the_same_bits_and_equal_one_process(ranks: int, form: str) -> None:
    every = run_on_ranks(_losses, ranks, form)
    for name in NAMES:
        value, gradient = _alone(name, form)
        for found in every:
            assert torch.equal(found[name][0], every[0][name][0]), name
            for column, numbers in found[name][2].items():
                assert torch.equal(numbers.nan_to_num(7.0), every[0][name][2][column].nan_to_num(7.0)), (name, column)
        torch.testing.assert_close(every[0][name][0], value, rtol=1e-11, atol=1e-11, msg=name)
        parts = [found[name][1] for found in every]
        whole = torch.cat(parts, dim=-1) if form == "logits" else parts[0]
        torch.testing.assert_close(whole, gradient, rtol=1e-10, atol=1e-11, msg=name)


def _scores() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vp, columns = _shard()
    case = Case()
    logits = case.logits()[..., columns].contiguous()
    logp, entropy = support_log_probs(logits.clone().requires_grad_() * 1.0, case.x[..., None], vp=vp)
    top = distributed_topk(logits, k=6, vp=vp)
    return logp.detach(), entropy.detach(), top.ids_TK, top.logp_TK


def test_scores_and_candidates_equal_those_of_the_whole_vocabulary() -> None:
    log_p = Case().logits().log_softmax(-1)
    for logp, entropy, ids, values in run_on_ranks(_scores, 3):
        torch.testing.assert_close(logp, log_p.gather(-1, Case().x[..., None]), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-12, atol=1e-13)
        expected = log_p.topk(6)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(values, expected.values, rtol=1e-12, atol=1e-13)


def _different(what: str) -> str:
    """The error on this rank if rank 1 was given a different value."""
    vp, columns = _shard()
    case, tropd = Case(), objectives.tropd()
    arguments = {"student_mask_T": case.mask, "trust_u_T": case.given["trust_u_T"], "weight_T": case.weights}
    teacher = case.top
    if dist.get_rank() == 1:
        if what == "trust_u_T":
            arguments[what] = arguments[what].flip(0)
        elif what == "student_mask_T":
            arguments[what] = ~case.mask
        else:
            assert case.top.logp_TK is not None
            teacher = replace(case.top, logp_TK=case.top.logp_TK - 1e-6)
    logits = case.logits()[..., columns].contiguous()
    try:
        distill_loss(logits, case.x, teacher, tropd, vp=replace(vp, debug=True), **arguments)
    except LossInputError as refused:
        return str(refused)
    return "nothing"


@pytest.mark.parametrize("what", ["trust_u_T", "student_mask_T", "teacher_topk_logp_TK"])
def test_with_debug_every_rank_names_the_argument_that_differs_between_ranks(what: str) -> None:
    for said in run_on_ranks(_different, 2, what):
        assert "the ranks of the group were given different" in said and what in said


def _uniforms() -> tuple[Tensor, Tensor]:
    vp, _ = _shard()
    generator = torch.Generator().manual_seed(dist.get_rank())
    return trust_uniforms((9,), generator=generator, vp=vp), trust_uniforms((9,), seed=3)


def test_uniforms_are_equal_on_all_ranks_even_if_generators_differ() -> None:
    one, two = run_on_ranks(_uniforms, 2)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.equal(one[0], torch.rand(9, generator=torch.Generator().manual_seed(0)))


def _too_narrow() -> str:
    vp, _ = _shard()
    with pytest.raises(LossInputError) as refused:
        distill_loss(Case().logits()[..., :5].contiguous(), Case().x, Case().top, "opd", vp=replace(vp, start=None))
    return str(refused.value)


def test_a_group_that_does_not_cover_the_vocabulary_is_refused() -> None:
    for said in run_on_ranks(_too_narrow, 2):
        assert "2 ranks of 5 columns are 10, fewer than vocab_size=37" in said
