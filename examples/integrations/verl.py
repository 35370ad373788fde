"""Forward KL to the teacher's top-k in verl's Megatron workers, with the rest of the vocabulary as one more event.

    install(vocab_size)          # in each worker, before training

takes the place of verl.trainer.distillation.megatron.losses.compute_forward_kl_topk (loss_mode forward_kl_topk). verl
hands over logits [1, T, V / TP] or [B, S, V / TP] and the teacher's true top-k as jagged tensors [B, S, K], and reduces
the loss of each token itself. Without a tail the divergence can be below 0, where verl cuts it off, and leaves the mass
outside the top-k alone. The loss has a copy of the logits, because Megatron's cross entropy may write over them next.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from megatron.core import mpu
from torch import Tensor

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives

OBJECTIVE = objectives.gkd(divergence="fkl", norm="tail")
MODULE = "verl.trainer.distillation.megatron.losses"


def as_the_logits(jagged: Tensor, data_format: str) -> Tensor:
    """Rows in the order of the logits, [1, T, ...] for "thd", [B, S, ...] for "bshd"; zeros where these are padding."""
    util = importlib.import_module("verl.models.mcore.util")
    found: Tensor = getattr(util, f"preprocess_{data_format}_engine")(jagged, pre_process=True)[0]
    return found


def compute_forward_kl_topk(
    vocab_size: int, *, student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any,
    data_format: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Loss and masses on the top-k of each token; `config` has nothing that this loss needs."""
    logp_TK, ids_TK = (as_the_logits(each, data_format) for each in (teacher_topk_log_probs, teacher_topk_ids))
    teacher = TeacherTopK(ids_TK=ids_TK, logp_TK=logp_TK, scored_T=(logp_TK != 0).any(-1))  # not padding, nor the last
    vp = VocabParallel(mpu.get_tensor_model_parallel_group(), vocab_size)
    out = distill_loss(student_logits.clone(), None, teacher, OBJECTIVE, vp=vp, reduction="none")
    masses = {name: out.columns[name].nan_to_num() for name in ("student_mass", "teacher_mass")}
    return {"distillation_losses": out.loss_T, **masses}  # type: ignore[dict-item]  # there, with reduction="none"


def install(vocab_size: int) -> None:
    """Put the function in the place of verl's."""
    losses: Any = importlib.import_module(MODULE)
    losses.compute_forward_kl_topk = partial(compute_forward_kl_topk, vocab_size)
