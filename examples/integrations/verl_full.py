"""Full TrOPD in verl's Megatron workers, with patches/verl.patch: distillation.distillation_loss.loss_mode=tropd

The patch adds two columns to the teacher's top-k. One is its log-prob of the sampled token, with the token's id in the
ids' column. The other is a uniform, drawn when the teacher is asked. verl passes both to `token_losses` and reduces the
token losses itself. Settings: use_policy_gradient=false, use_task_rewards=false, loss_max_clamp=null.
The hook has no log-probs of the policy that sampled, so gate and advantage use the current student.
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core import mpu
from torch import Tensor

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives

from .verl import as_the_logits

OBJECTIVE = objectives.tropd()
VOCAB_SIZE: int | None = None
"""None = no column is padding; verl's own log-probs also use all columns"""


def token_losses(
    *, student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any, data_format: str
) -> dict[str, Tensor]:
    """Return loss and trust of each token, in place of `compute_forward_kl_topk`."""
    logp_TC, ids_TC = (as_the_logits(each, data_format) for each in (teacher_topk_log_probs, teacher_topk_ids))
    scored_T = (logp_TC[..., :-1] != 0).any(-1)  # neither padding nor the last token, which predicts none
    teacher = TeacherTopK(logp_TC[..., -2], ids_TC[..., :-2], logp_TC[..., :-2], scored_T=scored_T)
    group = mpu.get_tensor_model_parallel_group()
    vp = VocabParallel(group, VOCAB_SIZE or student_logits.shape[-1] * group.size())
    logits = student_logits.clone()  # Megatron's cross entropy may overwrite the originals
    u_T = logp_TC[..., -1]
    out = distill_loss(logits, ids_TC[..., -2], teacher, OBJECTIVE, vp=vp, trust_u_T=u_T, reduction="none")
    assert out.loss_T is not None
    return {"distillation_losses": out.loss_T, "trusted": out.columns["trusted"].nan_to_num()}


def reduced(*, model_output: dict[str, Tensor], data: Any, **_: Any) -> tuple[Tensor, dict[str, float]]:
    """Return (response losses [B, R], numbers to report) for verl's `distillation_loss`. Nothing is clipped at 0."""
    padding = importlib.import_module("verl.workers.utils.padding")
    losses, trusted = (padding.no_padding_2_padding(model_output[n], data) for n in ("distillation_losses", "trusted"))
    mask = data["response_mask"]
    mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
    return losses, {"distillation/trusted": float(trusted[mask].mean())}
