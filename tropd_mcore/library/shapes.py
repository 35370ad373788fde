"""Converts tokens of any shape to tokens in a row, and back.

Invariant: logits and hidden states are viewed, never copied, so that gradients arrive at the caller's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel import source as kernel_source
from tropd_mcore.kernel.source import GivenLogits, LogitSource
from tropd_mcore.kernel.token_losses import SummedLoss
from tropd_mcore.library import checks
from tropd_mcore.library.arguments import DistillLoss, OutputLayer, StudentTopK, TeacherLogits, TeacherTopK


def source_of(student: Tensor | OutputLayer, preserve_logits: bool) -> tuple[LogitSource, torch.Size, dict[str, Any]]:
    """Return the logits of T tokens in a row, their original shape, and keywords for `support_loss`.

    Raises LossInputError.
    """
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
    """View [*T, W] as [T, W], the same memory. Raises LossInputError if that needs a copy."""
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


@dataclass(frozen=True)
class TokenNumbers:
    """The per-token arguments of `distill_loss` besides student and teacher, by their names."""

    target_ids_T: Tensor | None = None
    student_mask_T: Tensor | None = None
    prefix_mask_T: Tensor | None = None
    weight_T: Tensor | None = None
    trust_u_T: Tensor | None = None
    rollout_logp_T: Tensor | None = None
    old_logp_T: Tensor | None = None
    reference_logp_T: Tensor | None = None
    advantage_T: Tensor | None = None
    selected_T: Tensor | None = None
    history_weight_T: Tensor | None = None
    student_topk: StudentTopK | None = None

    def given(self, teacher: TeacherTopK | TeacherLogits) -> dict[str, Any]:
        """Return the arguments by the names of `Objective.needs`; None if not given."""
        own = self.student_topk
        return {**vars(self), "student_topk.old_logp_TL": own and own.old_logp_TL, **_given_by(teacher)}

    def in_a_row(self, shape: torch.Size, device: torch.device) -> TokenNumbers:
        """Return the same for T tokens in a row, with both masks; copied if needed. Raises LossInputError."""
        flat: dict[str, Any] = {}
        for name, number in vars(self).items():
            if name in ("student_mask_T", "prefix_mask_T"):
                checks.refuse_mask(name, number)
            if name != "student_topk":
                flat[name] = _in_a_row(name, number, shape)
        if flat["prefix_mask_T"] is None:
            flat["prefix_mask_T"] = torch.zeros(shape.numel(), dtype=torch.bool, device=device)
        if flat["student_mask_T"] is None:
            flat["student_mask_T"] = ~flat["prefix_mask_T"]
        flat["prefix_mask_T"] = flat["prefix_mask_T"] & ~flat["student_mask_T"]
        return TokenNumbers(**flat, student_topk=_student_topk(self.student_topk, shape))


def teacher_in_a_row(teacher: TeacherTopK, shape: torch.Size) -> TeacherTopK:
    """Return the same for T tokens in a row. Raises LossInputError."""
    checks.refuse_mask("teacher.scored_T", teacher.scored_T)
    checks.refuse_candidates("TeacherTopK", teacher.ids_TK, teacher.logp_TK)
    return TeacherTopK(
        logp_T=_in_a_row("teacher.logp_T", teacher.logp_T, shape),
        ids_TK=_in_rows("teacher.ids_TK", teacher.ids_TK, shape),
        logp_TK=_in_rows("teacher.logp_TK", teacher.logp_TK, shape),
        entropy_T=_in_a_row("teacher.entropy_T", teacher.entropy_T, shape),
        scored_T=_in_a_row("teacher.scored_T", teacher.scored_T, shape),
    )


def as_given(result: SummedLoss, shape: torch.Size, *, each: bool) -> DistillLoss:
    """Return the result in the caller's shape; with `each`, also the loss of every token."""
    columns = {name: column.reshape(shape) for name, column in result.columns.items()}
    loss_T = None
    if each:
        assert result.loss_T is not None, "a loss whose gradient is made of the sum has no loss per token"
        loss_T = result.loss_T.reshape(shape)
    return DistillLoss(result.loss_sum, result.token_count, result.loss_sum.detach().clone(), loss_T, columns)


def _student_topk(own: StudentTopK | None, shape: torch.Size) -> StudentTopK | None:
    if own is None:
        return None
    checks.refuse_candidates("StudentTopK", own.ids_TL, own.teacher_logp_TL)
    ids_TL = _in_rows("student_topk.ids_TL", own.ids_TL, shape)
    teacher_TL = _in_rows("student_topk.teacher_logp_TL", own.teacher_logp_TL, shape)
    assert ids_TL is not None and teacher_TL is not None, "no field of StudentTopK but old_logp_TL may be missing"
    return StudentTopK(ids_TL, teacher_TL, _in_rows("student_topk.old_logp_TL", own.old_logp_TL, shape))


def _given_by(teacher: TeacherTopK | TeacherLogits) -> dict[str, Any]:
    """The teacher's part of `TokenNumbers.given`."""
    if isinstance(teacher, TeacherLogits):
        names = ("teacher.logp_T", "teacher.ids_TK", "teacher.logp_TK", "teacher.entropy_T", "teacher logits")
        return dict.fromkeys(names, teacher)
    if not isinstance(teacher, TeacherTopK):
        raise LossInputError(f"{checks.CALL}: expected TeacherTopK or TeacherLogits, found {type(teacher).__name__}")
    fields = ("logp_T", "ids_TK", "logp_TK", "entropy_T")
    return {f"teacher.{name}": getattr(teacher, name) for name in fields}


def _in_a_row(name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Check and reshape [*T] to [T]."""
    checks.refuse_tensors(**{name: tensor})
    checks.refuse_kind(name, tensor)
    checks.refuse_shape(name, tensor, shape)
    return None if tensor is None else tensor.reshape(-1)


def _in_rows(name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Check and reshape [*T, K] to [T, K]."""
    checks.refuse_tensors(**{name: tensor})
    checks.refuse_kind(name, tensor)
    checks.refuse_shape(name, tensor, shape, extra=1)
    return None if tensor is None else tensor.reshape(shape.numel(), tensor.shape[-1])
