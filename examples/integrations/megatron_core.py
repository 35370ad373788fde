"""TrOPD in your own Megatron-Core loop. The model returns hidden states; the loss computes logits chunk by chunk.

    tap = tap_output_layer(gpt_model, tp_group)          # before the data-parallel wrapper
    forward_step = make_forward_step(tap, VocabParallel(tp_group, vocab_size))
    get_forward_backward_func()(forward_step_func=forward_step, ...)

A batch is a dict of tensors [b, s]: tokens, position_ids, labels (the next token), student_mask (bool), teacher_logp,
trust_u, and [b, s, K]: teacher_ids, teacher_topk_logp. All tensor ranks must have the same batch. With
calculate_per_token_loss=True in the model's configuration, Megatron divides the sum once by the whole batch's count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives
from tropd_mcore.megatron import HiddenStates

OBJECTIVE = objectives.tropd()


def loss_func(tap: HiddenStates, vp: VocabParallel, batch: dict[str, Tensor], output: Tensor) -> tuple[Any, ...]:
    """Return (loss sum, number of tokens, numbers to report) for hidden states [b, s, D]."""
    out = distill_loss(
        tap.output_layer(output),
        batch["labels"],
        TeacherTopK(batch["teacher_logp"], batch["teacher_ids"], batch["teacher_topk_logp"]),
        OBJECTIVE,
        vp=vp,
        student_mask_T=batch["student_mask"],
        trust_u_T=batch["trust_u"],
    )
    return out.loss_sum, out.token_count.int(), {"distill": torch.stack([out.value, out.token_count])}


def make_forward_step(tap: HiddenStates, vp: VocabParallel) -> Callable[..., tuple[Tensor, Any]]:
    """Return the forward step for Megatron's schedules."""

    def forward_step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], attention_mask=None)
        return output, partial(loss_func, tap, vp, batch)

    return forward_step
