"""Forward KL to the teacher's top-k in verl's Megatron workers, with the rest of the vocabulary as one more event.

    install(vocab_size)          # in each worker, before training

takes the place of verl.trainer.distillation.megatron.losses.compute_forward_kl_topk. verl hands over logits
[..., V / TP] and the teacher's true top-k log-probs [..., K], and reduces the loss of each token itself. Without a tail
the divergence can be below 0 and leaves the mass outside the top-k alone. The logits are kept, because Megatron's cross
entropy runs on them next.
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


def compute_forward_kl_topk(
    vocab_size: int, student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_indices: Tensor, config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, student's mass on the top-k, teacher's mass) of each token; `config` has nothing that this loss needs."""
    out = distill_loss(
        student_logits,
        None,
        TeacherTopK(ids_TK=teacher_topk_indices, logp_TK=teacher_topk_log_probs),
        OBJECTIVE,
        vp=VocabParallel(mpu.get_tensor_model_parallel_group(), vocab_size),
        reduction="none",
        preserve_logits=True,
    )
    assert out.loss_T is not None
    return out.loss_T, out.columns["student_mass"], out.columns["teacher_mass"]


def install(vocab_size: int) -> None:
    """Put the function in the place of verl's."""
    losses: Any = importlib.import_module(MODULE)
    losses.compute_forward_kl_topk = partial(compute_forward_kl_topk, vocab_size)
