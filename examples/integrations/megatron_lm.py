"""TrOPD as the forward step of `pretrain` in Megatron-LM or Megatron-Bridge, computed from logits.

    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, make_forward_step(vocab_size))    # Megatron-LM
    pretrain(config, make_forward_step(vocab_size))                                                    # Megatron-Bridge

You provide the batches (dataloader type `external`): the `get_batch` of both has fixed keys, without a teacher. Each is
a dict of tensors [b, s]: tokens, position_ids, labels (the next token), student_mask (bool), teacher_logp, trust_u; and
[b, s, K]: teacher_ids, teacher_topk_logp. Tensor ranks must get the same batch (tensor_parallel.broadcast_data on GPUs,
once per dtype). Context ranks get the whole batch, which is cut here. Without labels, the model returns logits.
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
HYBRID = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters  # required by newer Megatron-Core


def loss_func(vocab_size: int, batch: dict[str, Tensor], output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss sum, number of tokens, numbers to report) for logits [b, s, V / TP]; Megatron divides."""
    teacher = TeacherTopK(batch["teacher_logp"], batch["teacher_ids"], batch["teacher_topk_logp"])
    vp = VocabParallel(mpu.get_tensor_model_parallel_group(), vocab_size)
    given: Any = {"student_mask_T": batch["student_mask"], "trust_u_T": batch["trust_u"]}
    out = distill_loss(output, batch["labels"], teacher, OBJECTIVE, vp=vp, **given)
    return out.loss_sum, out.token_count.int(), {"tropd loss": torch.stack([out.value, out.token_count])}


def make_forward_step(vocab_size: int) -> Callable[[Iterator[dict[str, Tensor]], Any], tuple[Tensor, Any]]:
    """Return the forward step for the schedules. `vocab_size` is the tokenizer's, without Megatron's padding."""

    def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        options = {"is_hybrid_cp": False} if HYBRID else {}
        cp_group = mpu.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(dict(next(data_iterator)), cp_group=cp_group, **options)
        output = model(batch["tokens"], batch["position_ids"], attention_mask=None)
        return output, partial(loss_func, vocab_size, batch)

    return forward_step
