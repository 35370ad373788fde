"""TrOPD in slime or miles: --loss-type custom_loss --custom-loss-function-path examples.integrations.slime.tropd_loss

The hook gets logits [1, T, V / TP], float32, packed and unshifted: position p predicts token p + 1. A batch carries the
teacher's log-prob of each response token, but no candidates, so that outliers are masked and not taught by an FKL, and
no uniforms, so that the gate is a threshold. Context parallelism is 1. slime scales what is returned by its own batch.
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


def tropd_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, numbers to report), as slime's `loss_function` calls it."""
    lengths, ends = batch["response_lengths"], torch.tensor(batch["total_lengths"]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in zip(ends, lengths, strict=True)]).to(
        logits.device
    )
    # What slime would multiply each token by: masks, sample means, token counts, whichever was chosen.
    ones = torch.ones(len(rows), device=logits.device, requires_grad=True)
    (weight,) = torch.autograd.grad(sum_of_sample_mean(ones), ones)

    def place(numbers: Tensor) -> Tensor:
        return numbers.new_zeros(logits.shape[:2]).index_put((torch.zeros_like(rows), rows), numbers)

    out = distill_loss(
        logits,
        place(torch.cat([t[-n:] for t, n in zip(batch["unconcat_tokens"], lengths, strict=True)])),
        TeacherTopK(place(torch.cat(batch["teacher_log_probs"]))),
        OBJECTIVE,
        vp=VocabParallel(mpu.get_tensor_model_parallel_group(), args.vocab_size, temperature=args.rollout_temperature),
        student_mask_T=place(weight) != 0,
        weight_T=place(weight),
        old_logp_T=place(torch.cat(batch["log_probs"])),
    )
    return out.loss_sum, {"loss": out.value, "trusted": sum_of_sample_mean(out.columns["trusted"][0, rows])}
