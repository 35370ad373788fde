"""Forward KL to the teacher's top-k in verl's Megatron workers. The rest of the vocabulary is one additional event.

    install(vocab_size)          # in each worker, before training

replaces verl.trainer.distillation.megatron.losses.compute_forward_kl_topk (loss_mode forward_kl_topk). verl passes
logits [1, T, V / TP] or [B, S, V / TP] and the teacher's true top-k as jagged tensors [B, S, K], and reduces the token
losses itself. Without the tail event, the divergence ignores the mass outside the top-k and can be negative, where verl
clips it. The loss gets a copy of the logits, because Megatron's cross entropy may overwrite them afterwards.
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
    """Return the rows in the order of the logits, [1, T, ...] for "thd", [B, S, ...] for "bshd"; padding rows are 0."""
    util = importlib.import_module("verl.models.mcore.util")
    found: Tensor = getattr(util, f"preprocess_{data_format}_engine")(jagged, pre_process=True)[0]
    return found


def compute_forward_kl_topk(
    vocab_size: int, *, student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any,
    data_format: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the loss of each token and the top-k masses. `config` is not used."""
    logp_TK, ids_TK = (as_the_logits(each, data_format) for each in (teacher_topk_log_probs, teacher_topk_ids))
    teacher = TeacherTopK(ids_TK=ids_TK, logp_TK=logp_TK, scored_T=(logp_TK != 0).any(-1))  # neither padding nor last
    vp = VocabParallel(mpu.get_tensor_model_parallel_group(), vocab_size)
    out = distill_loss(student_logits.clone(), None, teacher, OBJECTIVE, vp=vp, reduction="none")
    masses = {name: out.columns[name].nan_to_num() for name in ("student_mass", "teacher_mass")}
    return {"distillation_losses": out.loss_T, **masses}  # type: ignore[dict-item]  # there, with reduction="none"


def install(vocab_size: int) -> None:
    """Replace verl's function."""
    losses: Any = importlib.import_module(MODULE)
    losses.compute_forward_kl_topk = partial(compute_forward_kl_topk, vocab_size)
