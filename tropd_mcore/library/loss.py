"""`distill_loss`: from the student's logits or hidden states and a teacher's scores to one sum and one count.

It does not divide, and it knows no schedules or models. Invariants: no mean and no host sync. Decisions (trusted or
not) depend only on numbers that are bit-identical on all ranks of the group. One all-reduce per chunk forward, one for
dH backward.

Legend: *T the token shape, T its tokens in a row, W vocabulary columns of this rank, D hidden, K teacher candidates, L
student candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel import source as kernel_source
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.full_vocabulary import FullVocabulary
from tropd_mcore.kernel.shard import math_dtype
from tropd_mcore.kernel.source import GivenLogits, LogitSource
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.surroundings import outside_compile
from tropd_mcore.kernel.token_losses import SummedLoss, TokenLosses
from tropd_mcore.kernel.topk import distributed_topk
from tropd_mcore.library import checks
from tropd_mcore.library.arguments import (
    DistillLoss,
    OutputLayer,
    StudentTopK,
    TeacherLogits,
    TeacherTopK,
    VocabParallel,
)
from tropd_mcore.library.inputs import Constants
from tropd_mcore.library.shapes import TokenNumbers, as_given, source_of, teacher_in_a_row
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.parts.divergences import candidate_tv
from tropd_mcore.objectives.registry import function_of

Loss = Objective | str | Callable[[TokenInputs], TokenLosses]
Reduction = Literal["sum", "none"]


@outside_compile
def distill_loss(
    student: Tensor | OutputLayer,
    target_ids_T: Tensor | None,
    teacher: TeacherTopK | TeacherLogits,
    objective: Loss = "tropd",
    *,
    vp: VocabParallel,
    student_mask_T: Tensor | None = None,
    prefix_mask_T: Tensor | None = None,
    weight_T: Tensor | None = None,
    trust_u_T: Tensor | None = None,
    rollout_logp_T: Tensor | None = None,
    old_logp_T: Tensor | None = None,
    reference_logp_T: Tensor | None = None,
    advantage_T: Tensor | None = None,
    selected_T: Tensor | None = None,
    history_weight_T: Tensor | None = None,
    student_topk: StudentTopK | None = None,
    reduction: Reduction = "sum",
    preserve_logits: bool = False,
    measure_force: bool = False,
) -> DistillLoss:
    """Return the distillation loss of this rank's tokens, differentiable in the student.

    Args:
        student: logits [*T, W] of this rank's vocabulary columns, or hidden states and output weight.
        target_ids_T: int [*T], the token x predicted at each position. Shift before the call; outside the masks any
            number will do. None for an objective that reads no target.
        teacher: its scores of these tokens, or its logits.
        objective: an `Objective` of `tropd_mcore.objectives`, a name for one with all defaults, or a function from
            `TokenInputs` to `TokenLosses`, called once per chunk.
        vp: how the logits are read, and the group.
        student_mask_T: bool, sampled by the student. None = all tokens outside prefix_mask_T.
        prefix_mask_T: bool, written by the teacher. None = none. A token in both masks is a student token.
        weight_T: factor of each token's loss. None = 1.
        trust_u_T: uniforms in [0, 1) for the Bernoulli gate, equal on all ranks of the group (`trust_uniforms`).
        rollout_logp_T: log p(x) as the rollout engine reported it.
        old_logp_T: log p(x) before the first update on the batch. None = log p(x) now, detached.
        reference_logp_T: log-prob of x under a frozen reference model.
        advantage_T, selected_T, history_weight_T: numbers computed from other tokens (group advantages, ...).
        student_topk: the student's own candidates before the first update.
        reduction: "sum", or "none" to get `loss_T` as well.
        preserve_logits: leave given logits unchanged; their gradient then takes a buffer of their size. Set this if
            something else reads the logits after the backward pass or saved them (another loss, tanh), or for several
            calls on slices of the same logits.
        measure_force: also return the columns `tv` and `force` (docs/metrics.md). No pass over the vocabulary.

    Raises LossInputError, in one line, if an input is missing or would give another gradient.
    """
    checks.refuse_vp(vp)
    chosen = as_objective(objective)
    numbers = TokenNumbers(
        target_ids_T=target_ids_T,
        student_mask_T=student_mask_T,
        prefix_mask_T=prefix_mask_T,
        weight_T=weight_T,
        trust_u_T=trust_u_T,
        rollout_logp_T=rollout_logp_T,
        old_logp_T=old_logp_T,
        reference_logp_T=reference_logp_T,
        advantage_T=advantage_T,
        selected_T=selected_T,
        history_weight_T=history_weight_T,
        student_topk=student_topk,
    )
    checks.refuse_what_does_not_fit(chosen, numbers.given(teacher))
    checks.refuse_groups(vp, teacher)
    source, shape, options = source_of(student, preserve_logits)
    _refuse_reduction(reduction, student, chosen)
    device = source.tensors[0].device
    kernel = vp.kernel(source.width, device, overlap=isinstance(student, OutputLayer))
    numbers = numbers.in_a_row(shape, device)
    found, term = _teacher(teacher, shape, numbers.target_ids_T, chosen, kernel)
    constants = Constants.of(found, numbers, vocab_size=vp.vocab_size, dtype=math_dtype(source.tensors[0]))
    if device.type == "cpu":  # on a GPU, looking at the numbers would be a host sync
        checks.refuse_impossible_numbers(constants.columns)
    if vp.debug:
        checks.check_contents(vp, constants.columns, None if isinstance(student, OutputLayer) else student)
    result = _loss_of(source, constants, chosen, kernel, full_vocab_term=term, measure_force=measure_force, **options)
    return as_given(result, shape, each=reduction == "none")


def _loss_of(
    source: LogitSource,
    constants: Constants,
    objective: Objective,
    kernel: Kernel,
    *,
    full_vocab_term: FullVocabulary | None,
    weight_gradient: Any = "deferred",
    reduce_hidden_gradient: bool = True,
    measure_force: bool = False,
) -> SummedLoss:
    """Return the loss of tokens in a row, after all checks."""
    function = function_of(objective)

    def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        inputs = constants.inputs(logp_CJ, entropy_C, divergence_C, rows)
        output = function(inputs)
        logp_C = inputs.student_logp_T.detach() if constants.has_target else torch.full_like(entropy_C, torch.nan)
        student = {"student_logp": logp_C.detach(), "student_entropy": entropy_C.detach()}
        if measure_force:
            student["tv"] = candidate_tv(inputs.student_topk_logp_TK.detach(), inputs.teacher_topk_logp_TK)
        return replace(output, columns={**output.columns, **student})

    return support_loss(
        source,
        constants.ids_TJ,
        token_loss,
        kernel,
        unique_run_lengths=constants.unique_run_lengths,
        weight_gradient=weight_gradient,
        reduce_hidden_gradient=reduce_hidden_gradient,
        full_vocab_term=full_vocab_term,
        measure_force=measure_force,
    )


def as_objective(objective: Loss) -> Objective:
    """Return the objective for an objective, a name or a function. Raises LossInputError for anything else."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        try:
            return catalogue.from_name(objective)
        except ValueError as error:
            raise LossInputError(f"{checks.CALL}: {error}") from error
    if getattr(objective, "__module__", None) == catalogue.__name__:
        name = getattr(objective, "__name__", objective)
        raise LossInputError(f"{checks.CALL}: objectives.{name} makes an objective; call it: objectives.{name}()")
    if callable(objective):
        return catalogue.custom(objective)
    raise LossInputError(
        f"{checks.CALL}: expected an objective, a name or a function, found {type(objective).__name__}"
    )


def _refuse_reduction(reduction: Reduction, student: Tensor | OutputLayer, objective: Objective) -> None:
    if reduction not in ("sum", "none"):
        raise LossInputError(f"{checks.CALL}: reduction={reduction!r}, expected 'sum' or 'none'; you divide yourself")
    whole = objective.whole is not None
    if isinstance(student, OutputLayer) and student.weight_grad == "recompute" and whole:
        raise LossInputError(f"{checks.CALL}: weight_grad='recompute' has no full_vocabulary; use 'deferred'")
    if reduction == "none" and (whole or (isinstance(student, OutputLayer) and student.weight_grad != "recompute")):
        raise LossInputError(
            f"{checks.CALL}: reduction='none' needs the gradient of each token in the backward pass; give logits, or "
            "OutputLayer(weight_grad='recompute'), and no full_vocabulary"
        )


def _teacher(
    teacher: TeacherTopK | TeacherLogits,
    shape: torch.Size,
    target_ids_T: Tensor | None,
    objective: Objective,
    kernel: Kernel,
) -> tuple[TeacherTopK, FullVocabulary | None]:
    """The teacher's scores, [T] each, and the divergence over the whole vocabulary if the objective reads one."""
    if isinstance(teacher, TeacherTopK):
        return teacher_in_a_row(teacher, shape), None
    source, theirs, _ = source_of(teacher.source, preserve_logits=False)
    if theirs != shape:
        raise LossInputError(f"{checks.CALL}: TeacherLogits have tokens {tuple(theirs)}, the student {tuple(shape)}")
    if isinstance(source, GivenLogits):
        source = GivenLogits(source.logits_TW.detach(), preserve=True)
    else:
        source = kernel_source.OutputLayer(source.hidden_TD.detach(), source.weight_WD.detach())
    its = teacher.vp.kernel(source.width, source.tensors[0].device, overlap=False)
    term = None
    if (whole := objective.whole) is not None:
        term = FullVocabulary(
            source,
            kernel,
            teacher_shard=its.shard,
            teacher_scaling=its.scaling,
            divergence=whole.divergence,
            beta=whole.beta,
        )
    if teacher.top is not None:
        return teacher_in_a_row(teacher.top, shape), term
    asked_T1 = None
    if target_ids_T is not None:
        asked_T1 = target_ids_T.to(torch.int64).clamp(-1, teacher.vp.vocab_size - 1)[:, None]
    top = distributed_topk(source, k=min(teacher.topk, teacher.vp.vocab_size), kernel=its, ids_TJ=asked_T1)
    found = TeacherTopK.of(top, scored_T=None if teacher.scored_T is None else teacher.scored_T.reshape(-1))
    if target_ids_T is not None:
        # A target outside the teacher's vocabulary is not scored.
        has_T = target_ids_T < teacher.vp.vocab_size
        found = replace(found, scored_T=has_T if found.scored_T is None else found.scored_T & has_T)
    return found, term
