"""Runs micro-batches of packed samples through a model with Megatron's schedules, and calls one function at the end.

That function (`loss`, `scoring`) receives the output layer. This module does not know what it computes, and it does not
run the optimizer. Invariants: every data rank runs the same number of micro-batches, so collectives stay in step even
if a pack is empty. After a training run the gradients of all parameters are those of
(sum of the losses) / (token count), both taken over all ranks.

Legend: P positions on this context rank, T rows, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.mcore.head import nothing_of
from tropd_mcore.mcore.model import Model
from tropd_mcore.progress import progress
from tropd_mcore.types import MicroBatch

log = logging.getLogger(__name__)

Result = TypeVar("Result")

Loss = Callable[[OutputLayer, MicroBatch, int], tuple[Tensor, Tensor, Result]]
"""(output layer of the rows, micro-batch, its index) -> (loss sum, token count, result), on the last stage."""

Measure = Callable[[OutputLayer, MicroBatch, int], Result]
"""(output layer of the rows, micro-batch, its index) -> result, on the last stage."""


def run_pipeline(
    model: Model, micro_batches: list[MicroBatch], pack_length: int, *, loss: Loss[Result], forward_only: bool
) -> list[Result | None]:
    """Run forward, and unless `forward_only` also backward, of all micro-batches.

    `pack_length` counts positions over all context ranks. The loss sum is differentiated. The token count (integer
    scalar, 0 for an empty pack) is summed over micro-batches, data ranks and context ranks, and divides all gradients
    once. Gradients are zeroed before a backward run. Returns the third value of each loss call in micro-batch order;
    None on all but the last stage.
    """
    assert micro_batches, "a step has at least one micro-batch, even if it is empty"
    if forward_only:
        with torch.no_grad():
            return _run(model, micro_batches, pack_length, loss, forward_only=True)
    assert model.trainable, "gradients need a model built with trainable=True"
    zero_gradients(model)
    return _run(model, micro_batches, pack_length, loss, forward_only=False)


def only_measure(measure: Measure[Result]) -> Loss[Result]:
    """Wrap `measure` as the loss of a forward-only run, in which nothing is differentiated."""

    def loss(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> tuple[Tensor, Tensor, Result]:
        nothing = torch.zeros((), device=layer.hidden_TD.device)
        return nothing, nothing.int(), measure(layer, micro_batch, index)

    return loss


def zero_gradients(model: Model) -> None:
    """Set the gradients of a trainable model to zero."""
    for chunk in model.model_chunks:
        chunk.zero_grad_buffer()


def _run(
    model: Model, micro_batches: list[MicroBatch], pack_length: int, loss: Loss[Result], *, forward_only: bool
) -> list[Result | None]:
    """Drive Megatron's schedule. It calls `forward_step` per micro-batch and chunk, and `finish` on the last stage."""
    results: list[Result | None] = [None] * len(micro_batches)
    padded = _fill_interleaved(model, micro_batches)
    begun: list[int] = []

    # Phase 2, last stage only: hidden states of the rows -> loss sum and token count. The schedule differentiates the
    # sum. It also adds up the counts, and `finalize_model_grads` divides the gradients by their total.
    def finish(index: int, micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert model.head is not None, "the last stage has the output layer"
        layer = model.head.output_layer(output.flatten(0, 1))
        if index >= len(micro_batches):  # filler: no loss, but a graph, so collectives of the backward stay in step
            return nothing_of(layer), torch.zeros((), dtype=torch.int32, device=output.device), {}
        loss_sum, token_count, results[index] = loss(layer, micro_batch, index)
        return loss_sum, token_count.to(torch.int32), {}

    # Phase 1, every stage and chunk: forward pass. Megatron calls the returned function only on the last stage.
    def forward_step(batches: Iterator[tuple[int, MicroBatch]], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        index, micro_batch = next(batches)
        begun.append(index)
        if len(begun) > 1:  # progress: the previous micro-batch has left this chunk
            state.advance()
        return _forward(model, chunk, micro_batch), partial(finish, index, micro_batch)

    schedule = get_forward_backward_func(
        pp_size=model.layout.pp_size, vp_size=model.config.virtual_pipeline_model_parallel_size
    )
    what, total = "forward pass" if forward_only else "forward and backward", len(padded) * len(model.model_chunks)
    with progress(log, what, total=total, unit="micro-batches") as state:
        schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(enumerate(padded)) for _ in model.model_chunks],  # one per chunk: each reads all of it
            model=model.model_chunks,
            num_microbatches=len(padded),
            seq_length=pack_length,  # sizes the buffers between stages, so all packs of a step have this length
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return results


def _forward(model: Model, chunk: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return hidden states: of all positions [P, 1, D], or on the last stage of the rows only [1, T, D]."""
    if model.head is not None:
        model.head.rows = micro_batch.rows_T
    output: Tensor = chunk(
        input_ids=micro_batch.input_ids_P[None],
        position_ids=micro_batch.position_ids_P[None],
        attention_mask=None,
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",  # packed samples; attention stays inside each sample, bounded by cu_seqlens
            cu_seqlens_q=micro_batch.cu_seqlens,
            cu_seqlens_kv=micro_batch.cu_seqlens,
            max_seqlen_q=micro_batch.max_seqlen,
            max_seqlen_kv=micro_batch.max_seqlen,
        ),
    )
    return output


def _fill_interleaved(model: Model, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """Append empty micro-batches up to a multiple of the pipeline size, which the interleaved schedule requires."""
    if model.config.virtual_pipeline_model_parallel_size is None:
        return micro_batches
    missing = -len(micro_batches) % model.layout.pp_size
    return micro_batches + [micro_batches[0].without_rows()] * missing
