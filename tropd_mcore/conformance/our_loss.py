"""Our loss on one rank: the real path from the tensors of a case to a loss sum and its gradients.

`objectives.registry` makes the objective, `objectives.parts.batch_statistics` computes its batch statistic, and
`distill_loss` does the rest. `megatron` tests the loss inside a Megatron model.

Shapes: T tokens, W vocabulary shard, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.conformance.batch import CaseBatch, Student
from tropd_mcore.conformance.cases import make_batch
from tropd_mcore.conformance.cells import Cell
from tropd_mcore.conformance.entries import Entry
from tropd_mcore.kernel.backend import Backend
from tropd_mcore.kernel.choose import backend
from tropd_mcore.kernel.shard import VocabShard, math_dtype
from tropd_mcore.library.arguments import (
    DistillLoss,
    OutputLayer,
    StudentTopK,
    TeacherLogits,
    TeacherTopK,
    VocabParallel,
)
from tropd_mcore.library.checks import STATISTICS, reads_prefixes
from tropd_mcore.library.loss import distill_loss
from tropd_mcore.objectives.parts.batch_statistics import BatchRows, statistic_of
from tropd_mcore.objectives.registry import objective_of

MICRO_BATCHES = (11, 0, 9, 7)
CHUNK_TOKENS = 4
BACKWARD_FACTOR = 0.5
"""Factor of the loss before its backward pass; a power of two, so that it causes no rounding"""


@dataclass(frozen=True)
class Answer:
    """The result of one rank; gradients in float64, of this rank's shard."""

    loss: float
    token_count: int | None
    """None for a peer, which returns no count"""
    logits_TW: Tensor | None = None
    hidden_TD: Tensor | None = None
    """summed over the ranks"""
    weight_WD: Tensor | None = None


def run_ours(cell: Cell, entry: Entry, device: torch.device) -> Answer:
    """Return the answer of our loss to a cell; called on every rank of the default group."""
    batch = make_batch(cell.conditions())
    statistic_T = batch_statistic(entry, batch)
    leaves = _Leaves(cell, batch.student, device)
    loss, count, start = 0.0, 0, 0
    for size in MICRO_BATCHES if cell.schedule != "whole" else (sum(MICRO_BATCHES),):
        rows = torch.arange(start, start + size)
        output = _loss_of(cell, entry, batch, leaves, rows, statistic_T[rows], device)
        factor = 1.0 if cell.mode == "folded" else BACKWARD_FACTOR
        (output.loss_sum * factor).backward()
        leaves.collect(rows, factor)
        loss += float(output.loss_sum.detach())
        count += int(output.token_count)
        start += size
    return leaves.answer(loss, count)


class _Leaves:
    """The tensors to differentiate, and their gradients over all micro-batches."""

    def __init__(self, cell: Cell, student: Student, device: torch.device) -> None:
        self._fused = cell.form == "fused"
        self._factor = 1.0
        self.shard = shard_of(cell)
        columns = slice(self.shard.start, self.shard.stop)
        self._hidden_TD = student.hidden_TD.to(device)
        self._logits_TW = student.logits_TW[:, columns].to(device)
        self.weight_WD = student.weight_WD[columns].to(device).clone().requires_grad_()
        # Like Megatron's data-parallel wrapper, which gives a parameter its main_grad.
        self.weight_WD.main_grad = torch.zeros_like(  # type: ignore[attr-defined]
            self.weight_WD, dtype=math_dtype(self.weight_WD), requires_grad=False
        )
        self._leaf: Tensor | None = None
        self._gradient = torch.zeros_like(self._hidden_TD if self._fused else self._logits_TW, dtype=torch.float64)

    def source(self, rows: Tensor, cell: Cell) -> Tensor | OutputLayer:
        """Return the output layer or the logits of some rows."""
        values = (self._hidden_TD if self._fused else self._logits_TW)[rows.to(self._hidden_TD.device)]
        self._leaf = values.clone().requires_grad_()
        mode: Any = cell.mode
        return OutputLayer(self._leaf, self.weight_WD, weight_grad=mode) if self._fused else self._leaf

    def collect(self, rows: Tensor, factor: float) -> None:
        """Store the gradient of the rows of the last `source` call."""
        assert self._leaf is not None
        self._factor = factor
        self.weight_WD.grad = None  # a placeholder: the gradient is in main_grad
        if self._leaf.grad is not None:
            self._gradient[rows.to(self._gradient.device)] = self._leaf.grad.double() / factor

    def answer(self, loss: float, count: int) -> Answer:
        """Return loss, count and all gradients."""
        if not self._fused:
            return Answer(loss, count, logits_TW=self._gradient.cpu())
        weight_WD: Tensor = self.weight_WD.main_grad.double() / self._factor  # type: ignore[attr-defined]
        return Answer(loss, count, hidden_TD=self._gradient.cpu(), weight_WD=weight_WD.cpu())


def shard_of(cell: Cell) -> VocabShard:
    """The columns of this rank."""
    rank, cuts = dist.get_rank(), cell.divided.cuts
    return VocabShard(cuts[rank], cuts[rank + 1], make_batch(cell.conditions()).vocab_size)


def _loss_of(
    cell: Cell, entry: Entry, batch: CaseBatch, leaves: _Leaves, rows: Tensor, statistic_T: Tensor, device: torch.device
) -> DistillLoss:
    """The loss of one micro-batch."""
    objective = objective_of(entry.objective, entry.progress)
    given = {name: tensor.to(device) for name, tensor in vars(batch.tokens.rows(rows)).items()}
    group = dist.group.WORLD
    assert group is not None
    vp = VocabParallel(
        group,
        leaves.shard.vocab_size,
        start=leaves.shard.start,
        temperature=batch.temperature,
        logit_softcap=batch.softcap,
        backend=_backend(cell.backend, device),
        chunk_tokens=CHUNK_TOKENS if cell.schedule != "whole" else 64,
        overlap=cell.schedule == "overlap",
    )
    top = TeacherTopK(
        given["teacher_logp_T"],
        given["topk_ids_TK"],
        given["teacher_topk_logp_TK"],
        given["teacher_entropy_T"],
    )
    own = StudentTopK(given["own_ids_TL"], given["teacher_own_logp_TL"], given["old_own_logp_TL"])
    statistic: dict[str, Any] = {name: statistic_T.to(device) for name in STATISTICS if name in objective.needs}
    return distill_loss(
        leaves.source(rows, cell),
        given["target_ids_T"],
        top if entry.objective.full_vocabulary_divergence is None else _whole(cell, batch, top, vp, rows, device),
        objective,
        vp=vp,
        student_mask_T=given["student_mask_T"],
        prefix_mask_T=given["prefix_mask_T"] if reads_prefixes(objective) else None,
        weight_T=given["weight_T"],
        trust_u_T=given["trust_u_T"],
        rollout_logp_T=given["rollout_logp_T"],
        old_logp_T=given["old_logp_T"],
        reference_logp_T=given["reference_logp_T"],
        student_topk=own if own.ids_TL.shape[1] else None,
        **statistic,
    )


def _backend(name: str, device: torch.device) -> Backend:
    """The backend. On a CPU also Triton, whose kernels are then interpreted (see `machine`)."""
    if name == "triton" and device.type == "cpu":
        from tropd_mcore.kernel.triton_backend import TritonBackend

        return TritonBackend()
    return backend(name, device)


def _whole(
    cell: Cell, batch: CaseBatch, top: TeacherTopK, vp: VocabParallel, rows: Tensor, device: torch.device
) -> TeacherLogits:
    """The teacher's logits or output layer, this rank's columns."""
    shard = shard_of(cell)
    columns = slice(shard.start, shard.stop)
    source: Tensor | OutputLayer
    if cell.form == "fused":
        weight_WD = batch.teacher.weight_WD[columns]
        source = OutputLayer(batch.teacher.hidden_TD[rows].to(device), weight_WD.to(device))
    else:
        source = batch.teacher.logits_TW[rows][:, columns].to(device)
    return TeacherLogits(source, replace(vp, temperature=1.0), top=top)


def batch_statistic(entry: Entry, batch: CaseBatch) -> Tensor:
    """The objective's statistic over the whole batch, before it is cut into micro-batches; 1 if it has none."""
    tokens = batch.tokens
    statistic = statistic_of(entry.objective, entry.progress)
    if statistic is None:
        return torch.ones(len(tokens.target_ids_T), dtype=torch.float64)
    order_T = torch.arange(len(tokens.target_ids_T))
    rows = BatchRows(
        sample_index_T=tokens.sample_T.numpy(),
        token_index_T=order_T.numpy(),
        on_T=tokens.student_mask_T.numpy(),
        student_entropy_T=tokens.old_entropy_T.numpy(),
        old_logp_T=tokens.old_logp_T.numpy(),
        rollout_logp_T=tokens.rollout_logp_T.numpy(),
        teacher_logp_T=tokens.teacher_logp_T.numpy(),
        prompt_index_S=batch.group_S.numpy(),
        reward_S=batch.reward_S.numpy(),
    )
    return torch.from_numpy(statistic(rows))
