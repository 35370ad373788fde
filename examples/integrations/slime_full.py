"""Full TrOPD in slime: the teacher's top-k and the uniforms reach the loss through slime's hooks, without a patch.

    --rollout-data-postprocess-path examples.integrations.slime_full.unpack
    --loss-type custom_loss --custom-loss-function-path examples.integrations.slime_full.tropd_loss

and the two settings of slime_teacher.py, which describes `teacher_log_probs` before `unpack` splits it. Do not set
--use-opd, which would read that field earlier. Context parallelism must be 1. R: response tokens of a sample, K: top-k.
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
"""Tensor log q(x) [R] of a sample, by identity -> (log q and ids of its top-k [R, 2 K], uniforms [R]). A batch has the
same tensor objects as its rollout data, and slime passes on no other key."""


def unpack(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Leave log q(x) in the field. Keep the rest in `BESIDE`, with uniforms that differ in each rollout."""
    every = rollout_data["teacher_log_probs"]
    for i, place in enumerate(rollout_data["partition"]):  # index of the sample in the whole rollout
        numbers = torch.arange(len(every[i]), device=every[i].device) + (place << 32)
        u_R = trust_uniforms(numbers.shape, seed=(args.seed << 32) + rollout_id, token_ids=numbers)
        packed, every[i] = every[i], every[i][:, 0].contiguous()
        BESIDE[every[i]] = packed[:, 1:], u_R


def tropd_loss(args: Any, batch: dict[str, Any], logits: Tensor, reduce: Callable[[Tensor], Tensor]) -> Result:
    """Return (loss, numbers to report) to slime's `loss_function`."""
    top, u = zip(*(BESIDE[each] for each in batch["teacher_log_probs"]), strict=True)
    logp_RK, ids_RK = torch.cat(top).chunk(2, dim=1)
    teacher = TeacherTopK(torch.cat(batch["teacher_log_probs"]), ids_RK.long(), logp_RK)
    return loss_of(args, batch, logits, reduce, OBJECTIVE, teacher, torch.cat(u))
