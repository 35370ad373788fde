"""`distill_loss`: the student's logits or hidden states and a teacher's numbers in, one sum and one count out.

Not for dividing, schedules or models. Invariants: no mean and no host sync; what decides anything (trusted or not) is
made of numbers that are the same bits on all ranks of the group; one all-reduce per chunk forward, one for dH backward.

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
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.objectives.inputs import TokenInputs
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
) -> DistillLoss:
    """The distillation loss of this rank's tokens, differentiable in the student.

    Args:
        student: logits [*T, W] of this rank's vocabulary columns, or hidden states and output weight.
        target_ids_T: int [*T], the token x predicted at each position (shift before the call; any number outside the
            masks). None for an objective that reads none.
        teacher: what it says of these tokens, or its logits.
        objective: an `Objective` of `tropd_mcore.objectives`, a name for one with all defaults, or a function from
            `TokenInputs` to `TokenLosses`, called once per chunk.
        vp: how the logits are read, and the group.
        student_mask_T: bool, sampled by the student. None = all tokens outside prefix_mask_T.
        prefix_mask_T: bool, written by the teacher. None = none. A token in both masks is a student token.
        weight_T: factor of each token's loss. None = 1.
        trust_u_T: uniform in [0, 1) of the Bernoulli gate, equal on all ranks of the group (`trust_uniforms`).
        rollout_logp_T: log p(x) as the rollout engine reported it.
        old_logp_T: log p(x) before the first update on the batch. None = log p(x) now, detached.
        reference_logp_T: log-prob of x under a frozen reference model.
        advantage_T, selected_T, history_weight_T: numbers made from other tokens (group advantages, ...).
        student_topk: the student's own candidates before the first update.
        reduction: "sum", or "none" to have `loss_T` as well.
        preserve_logits: leave given logits as they are; their gradient then takes a buffer of their size. Set it if
            something else reads them after the backward pass, or saved them (another loss, tanh), or for several calls
            on slices of them.

    Raises LossInputError, in one line, for what is missing or would make another gradient.
    """
    chosen = as_objective(objective)
    given = {
        "target_ids_T": target_ids_T,
        "prefix_mask_T": prefix_mask_T,
        "trust_u_T": trust_u_T,
        "rollout_logp_T": rollout_logp_T,
        "old_logp_T": old_logp_T,
        "reference_logp_T": reference_logp_T,
        "advantage_T": advantage_T,
        "selected_T": selected_T,
        "history_weight_T": history_weight_T,
        "student_topk": student_topk,
        "student_topk.old_logp_TL": student_topk.old_logp_TL if student_topk is not None else None,
        **_given_by(teacher),
    }
    checks.refuse_missing(chosen, given)
    checks.refuse_unread(chosen, given)
    checks.refuse_groups(vp, teacher)
    source, shape, options = source_of(student, preserve_logits)
    _refuse_reduction(reduction, student, chosen)
    kernel = vp.kernel(source.width, source.tensors[0].device, overlap=isinstance(student, OutputLayer))

    columns = {name: given[name] for name in ("rollout_logp_T", "reference_logp_T", "advantage_T", "selected_T",
                                              "history_weight_T", "trust_u_T", "old_logp_T")}  # fmt: skip
    flat = _flatten(shape, columns | {"weight_T": weight_T, "target_ids_T": target_ids_T})
    masks = _masks(shape, student_mask_T, prefix_mask_T, source.tensors[0].device)
    found, term = _teacher(teacher, shape, flat["target_ids_T"], chosen, kernel, vp)
    own = _flat_student_topk(student_topk, shape)
    constants = Constants.of(
        found,
        target_ids_T=flat["target_ids_T"],
        student_mask_T=masks[0],
        prefix_mask_T=masks[1],
        weight_T=flat["weight_T"],
        old_logp_T=flat["old_logp_T"],
        student_topk=own,
        optional=flat,
        vocab_size=vp.vocab_size,
        dtype=math_dtype(source.tensors[0]),
    )
    if vp.debug:
        checks.check_contents(vp, constants.columns, None if isinstance(student, OutputLayer) else student)
    result = loss_of(source, constants, chosen, kernel, full_vocab_term=term, **options)
    return _shaped(result, shape, reduction)


def loss_of(
    source: LogitSource,
    constants: Constants,
    objective: Objective,
    kernel: Kernel,
    *,
    full_vocab_term: FullVocabulary | None,
    weight_gradient: Any = "deferred",
    reduce_hidden_gradient: bool = True,
) -> SummedLoss:
    """The loss of tokens in a row, once everything is checked: what `distill_loss` and the trainer share."""
    function = function_of(objective)

    def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        inputs = constants.inputs(logp_CJ, entropy_C, divergence_C, rows)
        output = function(inputs)
        student = {"student_logp": inputs.student_logp_T.detach(), "student_entropy": entropy_C.detach()}
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
    )


@outside_compile
def loss_from_log_probs(
    student_logp_T: Tensor | None,
    teacher: TeacherTopK,
    objective: Loss = "tropd",
    *,
    student_topk_logp_TK: Tensor | None = None,
    student_own_logp_TL: Tensor | None = None,
    student_entropy_T: Tensor | None = None,
    target_ids_T: Tensor | None = None,
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
) -> DistillLoss:
    """The same objectives for stacks that hand over log-probs: plain autograd, no group, no logits.

    Args: student_logp_T [*T], log p(x), differentiable; student_topk_logp_TK [*T, K], log p of `teacher.ids_TK`;
    student_own_logp_TL [*T, L], log p of `student_topk.ids_TL`; student_entropy_T for the columns. The others are those
    of `distill_loss`. Ids of candidates are read by `lsm` and `rethinking` only; without them every entry of
    `teacher.logp_TK` above -inf is a candidate.

    Raises LossInputError.
    """
    chosen = as_objective(objective)
    first = next(
        (tensor for tensor in (student_logp_T, student_topk_logp_TK, student_own_logp_TL) if tensor is not None), None
    )
    if first is None:
        raise LossInputError("loss_from_log_probs: pass student_logp_T or the log-probs of candidates")
    shape = first.shape if first is student_logp_T else first.shape[:-1]
    given = {
        "target_ids_T": student_logp_T,
        "prefix_mask_T": prefix_mask_T,
        "trust_u_T": trust_u_T,
        "rollout_logp_T": rollout_logp_T,
        "old_logp_T": old_logp_T,
        "reference_logp_T": reference_logp_T,
        "advantage_T": advantage_T,
        "selected_T": selected_T,
        "history_weight_T": history_weight_T,
        "student_topk": student_topk if student_own_logp_TL is not None else None,
        "student_topk.old_logp_TL": student_topk.old_logp_TL if student_topk is not None else None,
        **_given_by(teacher),
        "teacher.ids_TK": student_topk_logp_TK,
    }
    checks.refuse_missing(chosen, given)
    checks.refuse_unread(chosen, given)
    names = ("rollout_logp_T", "reference_logp_T", "advantage_T", "selected_T", "history_weight_T", "trust_u_T",
             "old_logp_T")  # fmt: skip
    flat = _flatten(shape, {name: given[name] for name in names} | {"weight_T": weight_T, "target_ids_T": target_ids_T})
    masks = _masks(shape, student_mask_T, prefix_mask_T, first.device)
    found = _flat_teacher(teacher, shape)
    if found.logp_TK is not None and found.ids_TK is None:
        found = replace(
            found, ids_TK=torch.arange(found.logp_TK.shape[1], device=first.device).expand_as(found.logp_TK)
        )
    tokens, dtype = shape.numel(), math_dtype(first)
    constants = Constants.of(
        found,
        target_ids_T=flat["target_ids_T"],
        student_mask_T=masks[0],
        prefix_mask_T=masks[1],
        weight_T=flat["weight_T"],
        old_logp_T=flat["old_logp_T"],
        student_topk=_flat_student_topk(student_topk, shape),
        optional=flat,
        vocab_size=torch.iinfo(torch.int64).max,
        dtype=dtype,
    )

    def log_probs(tensor: Tensor | None, name: str) -> Tensor:
        if tensor is None:
            return torch.zeros(tokens, 0, dtype=dtype, device=first.device)
        checks.refuse_shape(name, tensor, shape, extra=1)
        return tensor.reshape(tokens, tensor.shape[-1]).to(dtype)

    unknown_T = torch.full((tokens,), torch.nan, dtype=dtype, device=first.device)
    logp_T = unknown_T if student_logp_T is None else student_logp_T.reshape(tokens).to(dtype)
    own_TL = log_probs(student_own_logp_TL, "student_own_logp_TL")
    inputs = TokenInputs(
        student_logp_T=logp_T,
        student_topk_logp_TK=log_probs(student_topk_logp_TK, "student_topk_logp_TK"),
        student_own_logp_TL=own_TL,
        student_entropy_T=unknown_T if student_entropy_T is None else student_entropy_T.reshape(tokens).to(dtype),
        divergence_T=None,
        **{"old_logp_T": logp_T.detach(), "old_own_logp_TL": own_TL.detach(), **constants.columns},
    )
    output = function_of(chosen)(inputs)
    student = {"student_logp": inputs.student_logp_T.detach(), "student_entropy": inputs.student_entropy_T.detach()}
    result = SummedLoss(output.loss_sum, output.token_count, {**output.columns, **student}, output.loss_T)
    return _shaped(result, shape, reduction)


def as_objective(objective: Loss) -> Objective:
    """Return the objective that a name or a function stands for. Raises LossInputError for what is none."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        try:
            return catalogue.from_name(objective)
        except ValueError as error:
            raise LossInputError(f"{checks.CALL}: {error}") from error
    if callable(objective):
        return catalogue.custom(objective)
    raise LossInputError(
        f"{checks.CALL}: expected an objective, a name or a function, found {type(objective).__name__}"
    )


def source_of(student: Tensor | OutputLayer, preserve_logits: bool) -> tuple[LogitSource, torch.Size, dict[str, Any]]:
    """The logits of T tokens in a row, the shape that they had, the options of the form. Raises LossInputError."""
    if isinstance(student, OutputLayer):
        checks.refuse_tensors(hidden_TD=student.hidden_TD, weight_WD=student.weight_WD)
        checks.refuse_layer(student, "OutputLayer")
        if preserve_logits:
            raise LossInputError(
                f"{checks.CALL}: preserve_logits is for given logits; OutputLayer keeps none, leave it out"
            )
        hidden_TD = _view(student.hidden_TD, "the hidden states")
        options = {"weight_gradient": student.weight_grad, "reduce_hidden_gradient": student.reduce_hidden_grad}
        return kernel_source.OutputLayer(hidden_TD, student.weight_WD), student.hidden_TD.shape[:-1], options
    checks.refuse_tensors(student=student)
    if student.dim() < 2 or not student.is_floating_point():
        raise LossInputError(f"{checks.CALL}: expected logits [*T, W], found {student.dtype} {tuple(student.shape)}")
    return GivenLogits(_view(student, "logits"), preserve=preserve_logits), student.shape[:-1], {}


def _view(tensor: Tensor, what: str) -> Tensor:
    """[T, W] of [*T, W], the same memory."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise LossInputError(
            f"{checks.CALL}: {what} have a last dimension with a stride of {tensor.stride(-1)}, expected 1"
        )
    try:
        return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        raise LossInputError(
            f"{checks.CALL}: {what} of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be viewed as "
            "[T, W] without a copy; keep all positions, roll the targets and mask the last one"
        ) from None


def _given_by(teacher: TeacherTopK | TeacherLogits) -> dict[str, Any]:
    """Needs that a teacher meets."""
    if isinstance(teacher, TeacherLogits):
        names = ("teacher.logp_T", "teacher.ids_TK", "teacher.logp_TK", "teacher.entropy_T", "teacher logits")
        return dict.fromkeys(names, teacher)
    if not isinstance(teacher, TeacherTopK):
        raise LossInputError(f"{checks.CALL}: expected TeacherTopK or TeacherLogits, found {type(teacher).__name__}")
    fields = ("logp_T", "ids_TK", "logp_TK", "entropy_T")
    return {f"teacher.{name}": getattr(teacher, name) for name in fields}


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


def _flatten(shape: torch.Size, named: dict[str, Any]) -> dict[str, Tensor | None]:
    """[T] of [*T], by name; a copy where memory asks for one."""
    checks.refuse_tensors(**named)
    flat: dict[str, Tensor | None] = {}
    for name, tensor in named.items():
        checks.refuse_shape(name, tensor, shape)
        flat[name] = None if tensor is None else tensor.reshape(-1)
    return flat


def _masks(
    shape: torch.Size, student: Tensor | None, prefix: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Both masks, [T]; a token in both is the student's."""
    for name, mask in (("student_mask_T", student), ("prefix_mask_T", prefix)):
        checks.refuse_mask(name, mask)
        checks.refuse_shape(name, mask, shape)
    prefix_T = torch.zeros(shape.numel(), dtype=torch.bool, device=device) if prefix is None else prefix.reshape(-1)
    student_T = ~prefix_T if student is None else student.reshape(-1)
    return student_T, prefix_T & ~student_T


def _flat_teacher(teacher: TeacherTopK, shape: torch.Size) -> TeacherTopK:
    numbers = {name: getattr(teacher, name) for name in ("logp_T", "entropy_T", "scored_T")}
    checks.refuse_mask("teacher.scored_T", teacher.scored_T)
    flat = _flatten(shape, numbers)
    return TeacherTopK(ids_TK=_rows(teacher.ids_TK, "teacher.ids_TK", shape),
                       logp_TK=_rows(teacher.logp_TK, "teacher.logp_TK", shape), **flat)  # fmt: skip


def _flat_student_topk(own: StudentTopK | None, shape: torch.Size) -> StudentTopK | None:
    if own is None:
        return None
    ids_TL = _rows(own.ids_TL, "student_topk.ids_TL", shape)
    teacher_TL = _rows(own.teacher_logp_TL, "student_topk.teacher_logp_TL", shape)
    assert ids_TL is not None and teacher_TL is not None, "no field of StudentTopK but old_logp_TL may be missing"
    return StudentTopK(ids_TL, teacher_TL, _rows(own.old_logp_TL, "student_topk.old_logp_TL", shape))


def _rows(tensor: Tensor | None, name: str, shape: torch.Size) -> Tensor | None:
    """[T, K] of [*T, K]."""
    checks.refuse_tensors(**{name: tensor})
    checks.refuse_shape(name, tensor, shape, extra=1)
    return None if tensor is None else tensor.reshape(shape.numel(), tensor.shape[-1])


def _teacher(
    teacher: TeacherTopK | TeacherLogits,
    shape: torch.Size,
    target_ids_T: Tensor | None,
    objective: Objective,
    kernel: Kernel,
    vp: VocabParallel,
) -> tuple[TeacherTopK, FullVocabulary | None]:
    """Its numbers, [T] each, and the divergence over the whole vocabulary where the objective is one."""
    if isinstance(teacher, TeacherTopK):
        return _flat_teacher(teacher, shape), None
    source, theirs, _ = source_of(teacher.source, preserve_logits=False)
    if theirs != shape:
        raise LossInputError(f"{checks.CALL}: TeacherLogits have tokens {tuple(theirs)}, the student {tuple(shape)}")
    source = kernel_source.OutputLayer(*(tensor.detach() for tensor in source.tensors)) if isinstance(
        source, kernel_source.OutputLayer) else GivenLogits(source.logits_TW.detach(), preserve=True)  # fmt: skip
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
        return _flat_teacher(teacher.top, shape), term
    asked_T1 = (
        None if target_ids_T is None else target_ids_T.to(torch.int64).clamp(-1, teacher.vp.vocab_size - 1)[:, None]
    )
    top = distributed_topk(source, k=min(teacher.topk, teacher.vp.vocab_size), kernel=its, ids_TJ=asked_T1)
    found = TeacherTopK.of(top, scored_T=None if teacher.scored_T is None else teacher.scored_T.reshape(-1))
    if target_ids_T is not None:
        # A target that only the teacher lacks is not scored.
        has_T = target_ids_T < teacher.vp.vocab_size
        found = replace(found, scored_T=has_T if found.scored_T is None else found.scored_T & has_T)
    return found, term


def _shaped(result: SummedLoss, shape: torch.Size, reduction: Reduction) -> DistillLoss:
    columns = {name: column.reshape(shape) for name, column in result.columns.items()}
    loss_T = None
    if reduction == "none":
        assert result.loss_T is not None, "a loss whose gradient is made of the sum has no loss per token"
        loss_T = result.loss_T.reshape(shape)
    return DistillLoss(result.loss_sum, result.token_count, result.loss_sum.detach().clone(), loss_T, columns)
