"""The distillation loss at the end of the pipeline: vocabulary shards in, one sum and one count out.

Not for the mathematics (`losses`) or for the schedule (`pipeline`). Invariants: what decides anything (trusted or not)
is computed from numbers that are bit-identical on all tensor ranks; no mean and no host sync in the loss itself; a
non-finite loss is found after the pipeline and before the optimizer.

Legend: T rows, W vocabulary shard, K teacher top-k, J = 1 + K support ids, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.errors import TrainingError
from tropd_mcore.losses.method_table import Objective
from tropd_mcore.losses.objectives import ABSENT, TokenInputs
from tropd_mcore.losses.support import NO_ENTRY, support_log_probs
from tropd_mcore.losses.topk import distributed_topk
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.pipeline import Loss
from tropd_mcore.types import MicroBatch, TeacherScores


@dataclass(frozen=True)
class LossResult:
    """What one micro-batch leaves behind; all detached."""

    loss_sum: Tensor
    """scalar, nats: sum of the surrogate over the rows of this rank"""
    token_count: Tensor
    """scalar int64, rows that count"""
    broken: Tensor
    """scalar bool: the sum is not finite, or a row that counts has a NaN log-prob, which a gate takes for distrust"""
    columns: dict[str, Tensor]
    """[T] each, the columns of `TokenTable` except sample_index, token_index and behav_logp, which the pack has"""


@dataclass(frozen=True)
class LossSettings:
    """How the student's log-probs are computed."""

    temperature: float
    """Of the rollouts: log p is the log-prob of the distribution that was sampled."""
    chunk_tokens: int
    """Rows of one chunk of the support kernel."""
    topk_overlap: bool
    """Also find the student's own top-k, for the overlap metric; costs one more pass over the shard."""


def make_distillation_loss(
    model: Model, objective: Objective, scores: Sequence[TeacherScores | None], settings: LossSettings
) -> Loss[LossResult]:
    """Return the loss of each micro-batch, `scores[i]` being what the teacher says of micro-batch i.

    Rows that the teacher could not score leave the loss and its denominator. Teacher ids that the student's vocabulary
    does not have (padding rows of a wider teacher) leave the teacher's top-k. Source: docs/method.md.
    """
    shard, group = model.shard, model.layout.groups.tp

    def loss(logits_TW: Tensor, micro_batch: MicroBatch, index: int) -> tuple[Tensor, Tensor, LossResult]:
        teacher = scores[index]
        assert teacher is not None, f"micro-batch {index} has no teacher scores on the last stage"
        known_TK = teacher.topk_ids_TK < shard.vocab_size
        topk_ids_TK = torch.where(known_TK, teacher.topk_ids_TK, NO_ENTRY)
        logp_TJ, entropy_T = support_log_probs(
            logits_TW,
            torch.cat([micro_batch.target_ids[:, None], topk_ids_TK], dim=1),
            shard=shard,
            group=group,
            temperature=settings.temperature,
            chunk_tokens=settings.chunk_tokens,
        )
        inputs = TokenInputs(
            student_logp_T=logp_TJ[:, 0],
            student_topk_logp_TK=logp_TJ[:, 1:],
            student_entropy_T=entropy_T,
            teacher_logp_T=teacher.logp_T,
            teacher_topk_logp_TK=teacher.topk_logp_TK.masked_fill(~known_TK, ABSENT),
            behav_logp_T=micro_batch.behav_logp,
            trust_u_T=micro_batch.trust_u,
            on_mask_T=micro_batch.on_mask & teacher.scored_T,
            off_mask_T=micro_batch.off_mask & teacher.scored_T,
            weight_T=micro_batch.weight,
        )
        output = objective(inputs)
        columns = {**output.columns, **_observed(inputs, teacher)}
        columns["topk_overlap"] = (
            _topk_overlap(logits_TW.detach(), topk_ids_TK, model, settings)
            if settings.topk_overlap
            else torch.full_like(columns["student_logp"], torch.nan)
        )
        loss_sum = output.loss_sum.detach()
        broken = ~loss_sum.isfinite() | _rows_with_nan(columns).any()
        return output.loss_sum, output.token_count, LossResult(loss_sum, output.token_count, broken, columns)

    return loss


def check_finite(
    results: Sequence[LossResult | None], micro_batches: Sequence[MicroBatch], *, step: int, sample_ids: Sequence[str]
) -> None:
    """Raise TrainingError if the loss of a micro-batch of this rank is broken, naming the sample that did it.

    `sample_ids` are those of the step's rollouts. One host sync; no collective, so the caller shares the error.
    """
    at_hand = [(index, result) for index, result in enumerate(results) if result is not None]
    if not at_hand or not bool(torch.stack([result.broken for _, result in at_hand]).any()):
        return
    index, result = next((index, result) for index, result in at_hand if result.broken)
    where = "its rows are finite, so the sum overflowed or the teacher's top-k is no number"
    columns = {name: result.columns[name].float() for name in ("student_logp", "teacher_logp", "loss")}
    rows = _rows_with_nan(result.columns) | (_counted(result.columns) & ~columns["loss"].isfinite())
    if rows.any():
        row = int(rows.nonzero()[0])
        numbers = ", ".join(f"{name} {float(column[row]):g}" for name, column in columns.items())
        sample, token = int(micro_batches[index].sample_index[row]), int(micro_batches[index].token_index[row])
        where = f"first at sample {sample_ids[sample]}, token {token} ({numbers}); {int(rows.sum())} such rows"
    raise TrainingError(
        f"step {step}: the loss of micro-batch {index} is {float(result.loss_sum):g}, expected a finite number from "
        f"log-probs that are numbers; {where}"
    )


def _counted(columns: dict[str, Tensor]) -> Tensor:
    return columns["on"] | columns["off"]


def _rows_with_nan(columns: dict[str, Tensor]) -> Tensor:
    """bool [T]. A log-prob of -inf is legal: the token is impossible for that model."""
    return _counted(columns) & (columns["student_logp"].isnan() | columns["teacher_logp"].isnan())


def _observed(inputs: TokenInputs, teacher: TeacherScores) -> dict[str, Tensor]:
    """The columns that are inputs of the objective rather than its results."""
    unknown_T = torch.full_like(teacher.logp_T, torch.nan)
    return {
        "on": inputs.on_mask_T,
        "off": inputs.off_mask_T,
        "student_logp": inputs.student_logp_T.detach(),
        "teacher_logp": teacher.logp_T,
        "student_entropy": inputs.student_entropy_T.detach(),
        "teacher_entropy": teacher.entropy_T if teacher.entropy_T is not None else unknown_T,
    }


def _topk_overlap(logits_TW: Tensor, teacher_ids_TK: Tensor, model: Model, settings: LossSettings) -> Tensor:
    """[T]: share of the teacher's top-k that is in the student's top-k."""
    k = teacher_ids_TK.shape[1]
    student_ids_TK = distributed_topk(
        logits_TW, k=k, shard=model.shard, group=model.layout.groups.tp, chunk_tokens=settings.chunk_tokens
    ).ids_TK
    pairs = zip(student_ids_TK.split(settings.chunk_tokens), teacher_ids_TK.split(settings.chunk_tokens), strict=True)
    shared = [(student_CK[:, :, None] == teacher_CK[:, None, :]).any(1).sum(1) for student_CK, teacher_CK in pairs]
    return torch.cat(shared).float() / k
