"""TrOPD in slime or miles: --loss-type custom_loss --custom-loss-function-path examples.integrations.slime.tropd_loss

The hook gets logits [1, T, V / TP], float32, packed, unshifted (position p predicts token p + 1), padded at the end. A
batch has log q of each response token but no candidates, so outliers are masked and get no FKL. It has no uniforms, so
the gate is a threshold. slime_full.py has both. Context parallelism must be 1. R: response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives

OBJECTIVE = objectives.tropd(
    trust_mode="threshold", outlier_mode="mask", prefix_loss="none", policy=objectives.PolicyGradient(ratio="ppo_clip")
)
Result = tuple[Tensor, dict[str, Tensor]]


def tropd_loss(args: Any, batch: dict[str, Any], logits: Tensor, reduce: Callable[[Tensor], Tensor]) -> Result:
    """Return (loss, numbers to report) to slime's `loss_function`. `reduce` is its masked sum or sum of means."""
    return loss_of(args, batch, logits, reduce, OBJECTIVE, TeacherTopK(torch.cat(batch["teacher_log_probs"])))


def loss_of(
    args: Any, batch: Any, logits: Tensor, reduce: Any, objective: Any, teacher: TeacherTopK, u_R: Tensor | None = None
) -> Result:
    """The same for any objective. `teacher` and uniforms have one row per response token."""
    lengths, ends = batch["response_lengths"], torch.tensor(batch["total_lengths"]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(e - n - 1, e - 1, device=logits.device) for e, n in zip(ends, lengths, strict=True)])
    # The factor by which slime multiplies each token: masks, sample means or token counts, as configured.
    ones = torch.ones(len(rows), device=logits.device, requires_grad=True)
    (weight,) = torch.autograd.grad(reduce(ones), ones)

    def place(values: Tensor | None) -> Any:
        if values is None:
            return None
        return values.new_zeros(logits.shape[1], *values.shape[1:]).index_copy(0, rows, values)[None]

    target = place(torch.cat([t[t.numel() - n :] for t, n in zip(batch["unconcat_tokens"], lengths, strict=True)]))
    vp = VocabParallel(mpu.get_tensor_model_parallel_group(), args.vocab_size, temperature=args.rollout_temperature)
    teacher = TeacherTopK(place(teacher.logp_T), place(teacher.ids_TK), place(teacher.logp_TK))
    given = {"weight_T": place(weight), "old_logp_T": place(torch.cat(batch["log_probs"])), "trust_u_T": place(u_R)}
    out = distill_loss(logits, target, teacher, objective, vp=vp, student_mask_T=place(weight) != 0, **given)
    return out.loss_sum, {"loss": out.value, "trusted": reduce(out.columns["trusted"][0, rows])}
