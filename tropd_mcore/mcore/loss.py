"""The distillation loss at the end of the pipeline: the output layer's rows in, one sum and one count out.

Not for the mathematics (`kernel`, `objectives`) or for the schedule (`pipeline`). Invariants: what decides anything
(trusted or not) is computed from numbers that are bit-identical on all tensor ranks; no mean and no host sync in the
loss itself; a non-finite loss is found after the pipeline and before the optimizer.

Legend: T rows, C rows of a chunk, K teacher top-k, L student top-k, J = 1 + K + L support ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropd_mcore.errors import TrainingError
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.full_vocabulary import FullVocabulary
from tropd_mcore.kernel.shard import chunks
from tropd_mcore.kernel.source import LogitSource, OutputLayer
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.kernel.topk import distributed_topk
from tropd_mcore.mcore.loss_settings import LossSettings, check_loss_settings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.pipeline import Loss
from tropd_mcore.mcore.token_inputs import TokenInputsBuilder
from tropd_mcore.objectives.registry import LossFunction
from tropd_mcore.types import MicroBatch, RowContext, TeacherScores


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
    """[T] each, the columns of `TokenTable` except sample_index, token_index and rollout_logp, which the pack has"""


def make_distillation_loss(
    model: Model,
    objective: LossFunction,
    scores: Sequence[TeacherScores | None],
    context: Sequence[RowContext | None],
    settings: LossSettings,
    *,
    teacher: Model | None = None,
) -> Loss[LossResult]:
    """Return the loss of each micro-batch, scores[i] being what the teacher says of micro-batch i.

    context[i] is what was made of its rows before the first update; None where nothing was. Rows that the teacher could
    not score leave the loss and its denominator. Teacher ids that the student's vocabulary does not have (padding rows
    of a wider teacher) leave the teacher's top-k. A divergence over the whole vocabulary (`settings.divergence`) takes
    the output layer of `teacher` and the hidden states in its scores. Raises ConfigError where the settings would make
    a wrong gradient. Source: docs/method.md.
    """
    check_loss_settings(settings, model)
    kernel = settings.kernel(model, temperature=settings.temperature)

    def loss(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> tuple[Tensor, Tensor, LossResult]:
        assert model.head is not None, "the last stage has the output layer"
        scored = scores[index]
        assert scored is not None, f"micro-batch {index} has no teacher scores on the last stage"
        rows_in_context = context[index] or RowContext()
        constants = TokenInputsBuilder.of(micro_batch, scored, rows_in_context, model.shard.vocab_size)
        source = settings.source(model, layer)
        # Before the loss, which writes its gradient over given logits.
        topk_overlap_T = _topk_overlap(source, constants, kernel) if settings.topk_overlap else constants.unknown_T

        def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
            inputs = constants.inputs(logp_CJ, entropy_C, divergence_C, rows)
            output = objective(inputs)
            student = {"student_logp": inputs.student_logp_T.detach(), "student_entropy": entropy_C.detach()}
            return replace(output, columns={**output.columns, **student})

        output = support_loss(
            source,
            constants.ids_TJ,
            token_loss,
            kernel,
            unique_run_lengths=constants.unique_run_lengths,
            weight_gradient=settings.weight_gradient,
            reduce_hidden_gradient=model.head.reduces_hidden_gradient,
            full_vocab_term=_full_vocabulary(settings, kernel, scored, teacher),
        )
        columns = {**output.columns, **constants.observed(), "topk_overlap": topk_overlap_T}
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
        sample, token = int(micro_batches[index].sample_index_T[row]), int(micro_batches[index].token_index_T[row])
        where = f"first at sample {sample_ids[sample]}, token {token} ({numbers}); {int(rows.sum())} such rows"
    raise TrainingError(
        f"step {step}: the loss of micro-batch {index} is {float(result.loss_sum):g}, expected a finite number from "
        f"log-probs that are numbers; {where}"
    )


def _counted(columns: dict[str, Tensor]) -> Tensor:
    return columns["on"] | columns["off"]


def _rows_with_nan(columns: dict[str, Tensor]) -> Tensor:
    """bool [T]. A log-prob of -inf is no NaN: the token is impossible for that model (`token_inputs`)."""
    return _counted(columns) & (columns["student_logp"].isnan() | columns["teacher_logp"].isnan())


def _full_vocabulary(
    settings: LossSettings, kernel: Kernel, scored: TeacherScores, teacher: Model | None
) -> FullVocabulary | None:
    """The divergence over the whole vocabulary, from the teacher's hidden states; None where the objective has none."""
    if settings.divergence is None:
        return None
    assert teacher is not None and teacher.head is not None, "the teacher's output layer is needed"
    assert scored.hidden_TD is not None, "the teacher was scored without keep_hidden"
    return FullVocabulary(
        teacher.head.output_layer(scored.hidden_TD),
        kernel,
        teacher_shard=teacher.shard,
        divergence=settings.divergence,
        beta=settings.divergence_beta,
    )


def _topk_overlap(source: LogitSource, constants: TokenInputsBuilder, kernel: Kernel) -> Tensor:
    """[T]: share of the teacher's top-k that is in the student's top-k.

    The student's own candidates (before the update) tell it where they are as many as the teacher's. Else one more pass
    over the vocabulary finds them: of an output layer that is a second product hidden @ weight.T, 2 N D W operations.
    """
    teacher_ids_TK, own_ids_TL = constants.topk_ids_TK, constants.own_ids_TL
    k = teacher_ids_TK.shape[1]
    if own_ids_TL.shape[1] >= k:
        student_ids_TK = own_ids_TL[:, :k]
    else:
        student_ids_TK = distributed_topk(source, k=k, kernel=kernel).ids_TK
    share_T = torch.empty(len(teacher_ids_TK), device=teacher_ids_TK.device)
    for rows in chunks(len(teacher_ids_TK), kernel.chunk_tokens):
        same_CKK = student_ids_TK[rows, :, None] == teacher_ids_TK[rows, None, :]
        share_T[rows] = same_CKK.any(1).sum(1) / k
    return share_T
