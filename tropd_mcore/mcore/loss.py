"""The distillation loss at the end of the pipeline: takes the output layer's rows, returns one sum and one count.

This module does not contain the mathematics (`kernel`, `objectives`) or the schedule (`pipeline`). Invariants: every
decision (for example, whether a token is trusted) is computed from numbers that are bit-identical on all tensor ranks.
The loss itself takes no mean and has no host sync. A non-finite loss is found after the pipeline and before the
optimizer.

Legend: T rows, C rows of a chunk, K teacher top-k, L student top-k, J = 1 + K + L support ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropd_mcore.errors import TrainingError
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.shard import chunks
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.topk import distributed_topk
from tropd_mcore.library import arguments as distill
from tropd_mcore.library.arguments import StudentTopK, TeacherLogits, TeacherTopK
from tropd_mcore.library.checks import reads_prefixes
from tropd_mcore.library.inputs import without_neginf
from tropd_mcore.library.loss import distill_loss
from tropd_mcore.mcore.loss_settings import LossSettings, check_loss_settings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.pipeline import Loss
from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.sentinels import NO_ENTRY
from tropd_mcore.types import MicroBatch, RowContext, TeacherScores

STATISTICS = ("selected_T", "advantage_T", "history_weight_T")
"""Loss arguments that `RowContext.statistic_T` can stand for. An objective needs at most one of them."""


@dataclass(frozen=True)
class LossResult:
    """Results of one micro-batch; all tensors are detached."""

    loss_sum: Tensor
    """scalar, nats: sum of the surrogate over the rows of this rank"""
    token_count: Tensor
    """scalar int64, number of rows that count"""
    broken: Tensor
    """scalar bool: the sum is not finite, or a row that counts has a NaN log-prob, which a gate would take for distrust
    """
    columns: dict[str, Tensor]
    """[T] each: the columns of `TokenTable` except sample_index, token_index and rollout_logp, which the pack holds"""
    reads_teacher: bool = True
    """Whether the objective reads the teacher's log-probs; otherwise they are NaN"""


def make_distillation_loss(
    model: Model,
    objective: Objective,
    scores: Sequence[TeacherScores | None],
    context: Sequence[RowContext | None],
    settings: LossSettings,
    *,
    teacher: Model | None = None,
) -> Loss[LossResult]:
    """Return a function that computes the loss of one micro-batch with `distill_loss`.

    scores[i] holds the teacher's scores of micro-batch i. context[i] holds values of its rows that were computed before
    the first update, or None. Rows that the teacher could not score are left out of the loss and of its denominator.
    Teacher ids that the student's vocabulary does not have (padding rows of a wider teacher) are left out of the
    teacher's top-k. A divergence over the whole vocabulary (`settings.divergence`) uses the output layer of `teacher`
    and the hidden states in its scores. Raises ConfigError if the settings would give a wrong gradient. Source:
    docs/method.md.
    """
    check_loss_settings(settings, model)
    vp = settings.vocab_parallel(model, temperature=settings.temperature)

    def loss(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> tuple[Tensor, Tensor, LossResult]:
        assert model.head is not None, "the last stage has the output layer"
        scored = scores[index]
        assert scored is not None, f"micro-batch {index} has no teacher scores on the last stage"
        source = settings.source(model, layer)
        before = context[index] or RowContext()
        # The overlap must be computed first: the loss overwrites given logits with their gradient.
        topk_overlap_T = torch.full_like(scored.logp_T, torch.nan)
        has_candidates = scored.topk_ids_TK.shape[1] > 0  # none for an objective without a teacher
        if settings.topk_overlap and has_candidates:
            kernel = settings.kernel(model, temperature=settings.temperature)
            topk_overlap_T = _topk_overlap(source, scored, before, kernel)
        statistic: dict[str, Any] = {name: before.statistic_T for name in STATISTICS if name in objective.needs}
        output = distill_loss(
            _student(source, model, settings),
            micro_batch.target_ids_T,
            _teacher(objective, settings, scored, teacher),
            objective,
            vp=vp,
            student_mask_T=micro_batch.student_mask_T,
            prefix_mask_T=micro_batch.prefix_mask_T if reads_prefixes(objective) else None,
            weight_T=micro_batch.weight_T,
            trust_u_T=micro_batch.trust_u_T,
            rollout_logp_T=micro_batch.rollout_logp_T,
            old_logp_T=before.old_logp_T,
            reference_logp_T=before.reference_logp_T,
            student_topk=_student_topk(before),
            measure_force=settings.measure_force and has_candidates,
            **statistic,
        )
        columns = {**output.columns, **observed(micro_batch, scored), "topk_overlap": topk_overlap_T}
        reads_teacher = objective.reads_teacher
        broken = ~output.value.isfinite() | _rows_with_nan(columns, reads_teacher=reads_teacher).any()
        result = LossResult(output.value, output.token_count, broken, columns, reads_teacher)
        return output.loss_sum, output.token_count, result

    return loss


def _student(source: LogitSource, model: Model, settings: LossSettings) -> Tensor | distill.OutputLayer:
    if isinstance(source, GivenLogits):
        return source.logits_TW
    assert model.head is not None
    return distill.OutputLayer(
        source.hidden_TD,
        source.weight_WD,
        reduce_hidden_grad=model.head.reduces_hidden_gradient,
        weight_grad=settings.weight_gradient,
    )


def _teacher(
    objective: Objective, settings: LossSettings, scored: TeacherScores, teacher: Model | None
) -> TeacherTopK | TeacherLogits:
    """Return the teacher's scores, and its output layer if the objective is a divergence over the whole vocabulary."""
    top = TeacherTopK(scored.logp_T, scored.topk_ids_TK, scored.topk_logp_TK, scored.entropy_T, scored.scored_T)
    if objective.whole is None:
        return top
    assert teacher is not None and teacher.head is not None, "the teacher's output layer is needed"
    assert scored.hidden_TD is not None, "the teacher was scored without keep_hidden"
    layer = teacher.head.output_layer(scored.hidden_TD)
    source = distill.OutputLayer(layer.hidden_TD, layer.weight_WD)
    return TeacherLogits(source, settings.vocab_parallel(teacher, temperature=1.0), top=top)


def _student_topk(before: RowContext) -> StudentTopK | None:
    if before.own_ids_TL is None:
        return None
    assert before.teacher_own_logp_TL is not None, "the teacher was not asked for the student's own candidates"
    return StudentTopK(before.own_ids_TL, before.teacher_own_logp_TL, before.old_own_logp_TL)


def observed(micro_batch: MicroBatch, scored: TeacherScores) -> dict[str, Tensor]:
    """Return the columns that are inputs of the objective; the loss returns the others."""
    unknown_T = torch.full_like(scored.logp_T, torch.nan)
    on_T, off_T = micro_batch.student_mask_T & scored.scored_T, micro_batch.prefix_mask_T & scored.scored_T
    return {
        "on": on_T,
        "off": off_T,
        "impossible": scored.logp_T.isneginf() & (on_T | off_T),
        "excluded": unknown_T if scored.excluded_T is None else scored.excluded_T.to(torch.float32),
        "teacher_logp": without_neginf(scored.logp_T),
        "teacher_entropy": unknown_T if scored.entropy_T is None else scored.entropy_T,
    }


def check_finite(
    results: Sequence[LossResult | None], micro_batches: Sequence[MicroBatch], *, step: int, sample_ids: Sequence[str]
) -> None:
    """Raise TrainingError if the loss of a micro-batch of this rank is broken; the message names the first bad sample.

    `sample_ids` are the ids of the step's rollouts. Costs one host sync. There is no collective here, so the caller
    must raise the error on the other ranks.
    """
    at_hand = [(index, result) for index, result in enumerate(results) if result is not None]
    if not at_hand or not bool(torch.stack([result.broken for _, result in at_hand]).any()):
        return
    index, result = next((index, result) for index, result in at_hand if result.broken)
    where = "its rows are finite, so the sum overflowed or the teacher's top-k is NaN"
    columns = {name: result.columns[name].float() for name in ("student_logp", "teacher_logp", "loss")}
    unknown = _rows_with_nan(result.columns, reads_teacher=result.reads_teacher)
    rows = unknown | (_counted(result.columns) & ~columns["loss"].isfinite())
    if rows.any():
        row = int(rows.nonzero()[0])
        numbers = ", ".join(f"{name} {float(column[row]):g}" for name, column in columns.items())
        sample, token = int(micro_batches[index].sample_index_T[row]), int(micro_batches[index].token_index_T[row])
        where = f"first at sample {sample_ids[sample]}, token {token} ({numbers}); {int(rows.sum())} such rows"
    raise TrainingError(
        f"step {step}: the loss of micro-batch {index} is {float(result.loss_sum):g}, expected a finite number and "
        f"no NaN log-probs; {where}"
    )


def _counted(columns: dict[str, Tensor]) -> Tensor:
    return columns["on"] | columns["off"]


def _rows_with_nan(columns: dict[str, Tensor], *, reads_teacher: bool) -> Tensor:
    """bool [T]. A log-prob of -inf does not count as NaN: the token is impossible for that model (`library.inputs`)."""
    names = ("student_logp", "teacher_logp") if reads_teacher else ("student_logp",)
    return _counted(columns) & torch.stack([columns[name].isnan() for name in names]).any(dim=0)


def _topk_overlap(source: LogitSource, scored: TeacherScores, before: RowContext, kernel: Kernel) -> Tensor:
    """Return the share [T] of the teacher's top-k that is also in the student's top-k.

    If the student's top-k from before the update has at least as many ids as the teacher's, it is used. Otherwise one
    more pass over the vocabulary finds the student's top-k. For an output layer that is a second product
    hidden @ weight.T, 2 T D W operations.
    """
    known_TK = scored.topk_ids_TK < kernel.shard.vocab_size
    teacher_ids_TK = torch.where(known_TK, scored.topk_ids_TK, NO_ENTRY)
    k, own_ids_TL = teacher_ids_TK.shape[1], before.own_ids_TL
    if own_ids_TL is not None and own_ids_TL.shape[1] >= k:
        student_ids_TK = own_ids_TL[:, :k]
    else:
        student_ids_TK = distributed_topk(source, k=k, kernel=kernel).ids_TK
    share_T = torch.empty(len(teacher_ids_TK), device=teacher_ids_TK.device)
    for rows in chunks(len(teacher_ids_TK), kernel.chunk_tokens):
        same_CKK = student_ids_TK[rows, :, None] == teacher_ids_TK[rows, None, :]
        share_T[rows] = same_CKK.any(1).sum(1) / k
    return share_T
