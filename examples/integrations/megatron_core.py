"""TrOPD in a Megatron-Core loop of your own: the model returns hidden states, the loss makes its logits chunk by chunk.

    tap = tap_output_layer(gpt_model, tp_group)          # before the data-parallel wrapper
    forward_step = make_forward_step(tap, VocabParallel(tp_group, vocab_size))
    get_forward_backward_func()(forward_step_func=forward_step, ...)

A batch is a dict of tensors [b, s]: tokens, position_ids, labels (the next token), student_mask (bool), teacher_logp,
teacher_ids and teacher_topk_logp [b, s, K], trust_u; equal on all tensor ranks. With calculate_per_token_loss=True in
the model's configuration Megatron divides the sum once by the count of the whole batch.
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
    """(sum, number of tokens, numbers to report) of hidden states [b, s, D]."""
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
    """What Megatron's schedules call."""

    def forward_step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], attention_mask=None)
        return output, partial(loss_func, tap, vp, batch)

    return forward_step
