"""`loss_from_log_probs`: the objectives for stacks that provide log-probs, by plain autograd.

For logits see `loss`. Invariant: no group and no communication; the equations are those of `distill_loss`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel.shard import math_dtype
from tropd_mcore.kernel.surroundings import outside_compile
from tropd_mcore.kernel.token_losses import SummedLoss
from tropd_mcore.library import checks
from tropd_mcore.library.arguments import DistillLoss, StudentTopK, TeacherTopK
from tropd_mcore.library.inputs import Constants
from tropd_mcore.library.loss import Loss, Reduction, as_objective
from tropd_mcore.library.shapes import TokenNumbers, as_given, teacher_in_a_row
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.registry import function_of


@outside_compile
@checks.speaks_as("loss_from_log_probs")
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
    """Return the loss of an objective from log-probs that the caller computed: plain autograd, no group, no logits.

    Args: student_logp_T [*T], log p(x), differentiable; student_topk_logp_TK [*T, K], log p of `teacher.ids_TK`;
    student_own_logp_TL [*T, L], log p of `student_topk.ids_TL`; student_entropy_T [*T], for the columns. The others are
    as in `distill_loss`. Only `lsm` and `rethinking` read the ids of candidates. Without ids, every entry of
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
        student_topk=student_topk if student_own_logp_TL is not None else None,
    )
    given = numbers.given(teacher)
    checks.refuse_what_does_not_fit(
        chosen, {**given, "target_ids_T": student_logp_T, "teacher.ids_TK": student_topk_logp_TK}
    )
    numbers, found = numbers.in_a_row(shape, first.device), teacher_in_a_row(teacher, shape)
    if found.logp_TK is not None and found.ids_TK is None:
        slots_K = torch.arange(found.logp_TK.shape[1], device=first.device)
        found = replace(found, ids_TK=slots_K.expand_as(found.logp_TK))
    tokens, dtype = shape.numel(), math_dtype(first)
    constants = Constants.of(found, numbers, vocab_size=torch.iinfo(torch.int64).max, dtype=dtype)

    def log_probs(tensor: Tensor | None, name: str) -> Tensor:
        if tensor is None:
            return torch.zeros(tokens, 0, dtype=dtype, device=first.device)
        checks.refuse_shape(name, tensor, shape, extra=1)
        return tensor.reshape(tokens, tensor.shape[-1]).to(dtype)

    unknown_T = torch.full((tokens,), torch.nan, dtype=dtype, device=first.device)
    # 0 and not NaN: an objective that reads no target multiplies it by an advantage of 0.
    logp_T = torch.zeros_like(unknown_T) if student_logp_T is None else student_logp_T.reshape(tokens).to(dtype)
    own_TL = log_probs(student_own_logp_TL, "student_own_logp_TL")
    inputs = TokenInputs(
        student_logp_T=logp_T,
        student_topk_logp_TK=log_probs(student_topk_logp_TK, "student_topk_logp_TK"),
        student_own_logp_TL=own_TL,
        student_entropy_T=unknown_T if student_entropy_T is None else student_entropy_T.reshape(tokens).to(dtype),
        divergence_T=None,
        **{"old_logp_T": logp_T.detach(), "old_own_logp_TL": own_TL.detach(), **constants.columns},
    )
    if first.device.type == "cpu":  # a look at the numbers of a GPU would wait for it
        given_by_caller = ("student_logp_T", "student_topk_logp_TK", "student_own_logp_TL")
        checks.refuse_impossible_numbers(
            constants.columns, {name: getattr(inputs, name).detach() for name in given_by_caller}
        )
    output = function_of(chosen)(inputs)
    known_T = unknown_T if student_logp_T is None else logp_T.detach()
    student = {"student_logp": known_T, "student_entropy": inputs.student_entropy_T.detach()}
    result = SummedLoss(output.loss_sum, output.token_count, {**output.columns, **student}, output.loss_T)
    return as_given(result, shape, each=reduction == "none")
