"""Losses with planted faults, and one without, in the form of peers of `tropd conformance`. Not a test module.

All use the product's kernel on given logits. Each fault is one that upstream projects have shipped.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tropd_mcore.conformance.cells import Cell
from tropd_mcore.conformance.matrix import run_on_rank
from tropd_mcore.conformance.our_loss import Answer
from tropd_mcore.conformance.peers import PeerCase, PeerMissing, covers
from tropd_mcore.kernel.backend import Kernel, RowGradient
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard, local_ids
from tropd_mcore.kernel.source import GivenLogits
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.registry import bind_objective
from tropd_mcore.sentinels import NO_ENTRY


def run_cells(cells: list[Cell]) -> list[Answer]:
    """On the ranks."""
    return [run_on_rank(cell, "cpu") for cell in cells]


@covers("log_prob", "opd", "tropd", "tropd/soft-tail", "gkd/fkl-t*")
def honest(case: PeerCase) -> Tensor:
    return _loss(case)


@covers("opd")
def sampled_token_lost(case: PeerCase) -> Tensor:
    class Backend(_WrongRow):
        def wrong(self, row: RowGradient) -> RowGradient:
            ids_CJ = row.ids_CJ.clone()
            ids_CJ[:, 0] = NO_ENTRY
            return replace(row, ids_CJ=ids_CJ)

    return _loss(case, Backend())


@covers("gkd/fkl-truncated")
def teacher_mass_taken_for_one(case: PeerCase) -> Tensor:
    """dL/dz = p - q instead of m p - q."""

    class Backend(_WrongRow):
        def wrong(self, row: RowGradient) -> RowGradient:
            total_C1 = row.grad_logp_CJ.sum(dim=1, keepdim=True)
            counted_C1 = (total_C1 != 0).to(total_C1.dtype)
            return _with_slot(row, -counted_C1 - total_C1)

    return _loss(replace(case, weight_T=torch.ones_like(case.weight_T)), Backend())


@covers("log_prob", without=("uneven",))
def padding_in_the_softmax(case: PeerCase) -> Tensor:
    return _loss(case, vocab_size=case.vocab_stop * case.group.size())


@covers("tropd")
def gradient_times_ranks(case: PeerCase) -> Tensor:
    case.logits_TW.register_hook(lambda gradient: gradient * case.group.size())
    return _loss(case)


@covers("gkd/fkl-tail")
def tail_lost(case: PeerCase) -> Tensor:
    return _loss(replace(case, objective=case.objective.model_copy(update={"norm": "truncated"})))


@covers("tropd/soft-tail")
def duplicates_overwrite(case: PeerCase) -> Tensor:
    """`grad[ids] += g` instead of an accumulating scatter."""

    class Backend(EagerBackend):
        def write_gradient(self, logits_CW: Tensor, row: RowGradient, *args: Any) -> None:
            shard: VocabShard = args[0]
            out_CW: Tensor = args[-1]
            nowhere = replace(row, ids_CJ=torch.full_like(row.ids_CJ, NO_ENTRY))
            super().write_gradient(logits_CW.clone(), nowhere, *args)
            local_CJ, here_CJ = local_ids(row.ids_CJ, shard)
            owned_CJ = row.grad_logp_CJ.masked_fill(~here_CJ, 0.0)
            rows_C1 = torch.arange(len(out_CW))[:, None].expand_as(local_CJ)
            out_CW[rows_C1, local_CJ] += owned_CJ.to(out_CW.dtype)

    return _loss(case, Backend())


@covers("tropd")
def hangs_on_rank_1(case: PeerCase) -> Tensor:
    if case.group.rank() == 1:
        time.sleep(600)
    return _loss(case)


@covers("tropd")
def dies_on_rank_1(case: PeerCase) -> Tensor:
    if case.group.rank() == 1:
        os._exit(3)
    return _loss(case)


@covers("tropd")
def raises_on_rank_1(case: PeerCase) -> Tensor:
    if case.group.rank() == 1:
        raise ArithmeticError("rank 1 alone")
    return _loss(case)


@covers("tropd")
def raises(case: PeerCase) -> Tensor:
    raise ArithmeticError("everywhere")


@covers("tropd")
def is_not_installed(case: PeerCase) -> Tensor:
    raise PeerMissing("give the checkout in SOME_ROOT")


def undeclared(case: PeerCase) -> Tensor:
    return _loss(case)


class _WrongRow(EagerBackend):
    """Writes the gradient of a different row than the one given."""

    def wrong(self, row: RowGradient) -> RowGradient:
        raise NotImplementedError

    def write_gradient(self, logits_CW: Tensor, row: RowGradient, *args: Any) -> None:
        super().write_gradient(logits_CW, self.wrong(row), *args)


def _with_slot(row: RowGradient, gradient_C1: Tensor) -> RowGradient:
    """One more support entry without an id. It enters only the dense part."""
    return replace(
        row,
        ids_CJ=torch.cat([row.ids_CJ, torch.full_like(row.ids_CJ[:, :1], NO_ENTRY)], dim=1),
        grad_logp_CJ=torch.cat([row.grad_logp_CJ, gradient_C1], dim=1),
        unique_run_lengths=(*row.unique_run_lengths, 1),
    )


def _loss(case: PeerCase, backend: EagerBackend | None = None, vocab_size: int | None = None) -> Tensor:
    """The loss sum of the case, computed by the product's kernel."""
    kernel = Kernel(
        shard=VocabShard(case.vocab_start, case.vocab_stop, vocab_size or case.vocab_size),
        group=case.group,
        backend=backend or EagerBackend(),
        scaling=Scaling(case.temperature, case.softcap),
        chunk_tokens=64,
    )
    objective = bind_objective(case.objective)
    topk, own = case.topk_ids_TK.shape[1], case.own_ids_TL.shape[1]
    unknown_T = torch.full_like(case.teacher_logp_T, torch.nan)

    def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        return objective(
            TokenInputs(
                student_logp_T=logp_CJ[:, 0],
                student_topk_logp_TK=logp_CJ[:, 1 : 1 + topk],
                student_own_logp_TL=logp_CJ[:, 1 + topk :],
                student_entropy_T=entropy_C,
                divergence_T=None,
                teacher_logp_T=case.teacher_logp_T,
                teacher_topk_logp_TK=case.teacher_topk_logp_TK,
                teacher_own_logp_TL=case.teacher_own_logp_TL,
                teacher_entropy_T=unknown_T,
                topk_ids_TK=case.topk_ids_TK,
                own_ids_TL=case.own_ids_TL,
                target_ids_T=case.target_ids_T,
                reference_logp_T=unknown_T,
                old_logp_T=case.old_logp_T,
                old_own_logp_TL=torch.zeros_like(case.teacher_own_logp_TL),
                rollout_logp_T=case.rollout_logp_T,
                selected_T=unknown_T,
                advantage_T=unknown_T,
                history_weight_T=unknown_T,
                trust_u_T=case.trust_u_T,
                student_mask_T=case.student_mask_T,
                prefix_mask_T=case.prefix_mask_T,
                weight_T=case.weight_T,
            )
        )

    ids_TJ = torch.cat([case.target_ids_T[:, None], case.topk_ids_TK, case.own_ids_TL], dim=1)
    # The kernel writes over the logits; the leaf keeps its values.
    source = GivenLogits(case.logits_TW.clone())
    return support_loss(source, ids_TJ, token_loss, kernel, unique_run_lengths=(1, topk, own)).loss_sum
