"""TrOPD as the forward step of Megatron-LM's `pretrain` or Megatron-Bridge's, of logits.

    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, make_forward_step(vocab_size))    # Megatron-LM
    pretrain(config, make_forward_step(vocab_size))                                                    # Megatron-Bridge

The batches are yours (dataloader type `external`): `get_batch` of these has fixed keys, without a teacher. Each is a
dict of tensors [b, s]: tokens, position_ids, labels (the next token), student_mask (bool), teacher_logp, teacher_ids
and teacher_topk_logp [b, s, K], trust_u. Tensor ranks must get the same one (on GPUs: tensor_parallel.broadcast_data,
once for each dtype). Context ranks get the whole one: it is cut here. A model called without labels returns logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives

OBJECTIVE = objectives.tropd()
HYBRID = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters  # newer Megatron-Core asks for it


def loss_func(vocab_size: int, batch: dict[str, Tensor], output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum, number of tokens, what is reported) of logits [b, s, V / TP]; Megatron divides."""
    teacher = TeacherTopK(batch["teacher_logp"], batch["teacher_ids"], batch["teacher_topk_logp"])
    vp = VocabParallel(mpu.get_tensor_model_parallel_group(), vocab_size)
    given: Any = {"student_mask_T": batch["student_mask"], "trust_u_T": batch["trust_u"]}
    out = distill_loss(output, batch["labels"], teacher, OBJECTIVE, vp=vp, **given)
    return out.loss_sum, out.token_count.int(), {"tropd loss": torch.stack([out.value, out.token_count])}


def make_forward_step(vocab_size: int) -> Callable[[Iterator[dict[str, Tensor]], Any], tuple[Tensor, Any]]:
    """What the schedules call; `vocab_size` is the real one, without Megatron's padding."""

    def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        options = {"is_hybrid_cp": False} if HYBRID else {}
        cp_group = mpu.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(dict(next(data_iterator)), cp_group=cp_group, **options)
        output = model(batch["tokens"], batch["position_ids"], attention_mask=None)
        return output, partial(loss_func, vocab_size, batch)

    return forward_step
