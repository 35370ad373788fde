"""TrOPD in full in slime: the teacher's top-k and the uniforms reach the loss by hooks that slime has, without a patch.

    --rollout-data-postprocess-path examples.integrations.slime_full.unpack
    --loss-type custom_loss --custom-loss-function-path examples.integrations.slime_full.tropd_loss

and the two settings of slime_teacher.py, which says what `teacher_log_probs` holds until `unpack` takes it apart. Leave
out --use-opd, which would read that field before. Context parallelism is 1. R response tokens of a sample, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tropd_mcore import TeacherTopK, objectives, trust_uniforms

from .slime import Result, loss_of

OBJECTIVE = objectives.tropd(policy=objectives.PolicyGradient(ratio="ppo_clip"))
BESIDE: Any = WeakTensorKeyDictionary()
"""The tensor log q(x) [R] of a sample, by identity -> (log q and ids of its top-k [R, 2 K], uniforms [R]). A batch has
the same tensors as the rollout data that it is made of, and no other key that slime would hand on."""


def unpack(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Leave log q(x) in the field, and keep the rest and uniforms beside it, other ones in each rollout."""
    every = rollout_data["teacher_log_probs"]
    for i, place in enumerate(rollout_data["partition"]):  # of the sample in the whole rollout
        numbers = torch.arange(len(every[i]), device=every[i].device) + (place << 32)
        u_R = trust_uniforms(numbers.shape, seed=(args.seed << 32) + rollout_id, token_ids=numbers)
        packed, every[i] = every[i], every[i][:, 0].contiguous()
        BESIDE[every[i]] = packed[:, 1:], u_R


def tropd_loss(args: Any, batch: dict[str, Any], logits: Tensor, reduce: Callable[[Tensor], Tensor]) -> Result:
    """(loss, numbers to report), as slime's `loss_function` calls it."""
    top, u = zip(*(BESIDE[each] for each in batch["teacher_log_probs"]), strict=True)
    logp_RK, ids_RK = torch.cat(top).chunk(2, dim=1)
    teacher = TeacherTopK(torch.cat(batch["teacher_log_probs"]), ids_RK.long(), logp_RK)
    return loss_of(args, batch, logits, reduce, OBJECTIVE, teacher, torch.cat(u))
