"""Differentiable log-probs of a few vocabulary entries per token, and the entropy, on vocabulary shards.

It serves losses that are not sums over tokens, logits that the caller computed, and scoring without gradients. If the
loss is a sum over tokens, `support_loss` does not need to compute the logits a second time. Invariant: the results are
bit-identical on all ranks of the group, so a decision based on them (trust this token?) cannot differ between ranks.

Shapes: T tokens, C tokens of a chunk, W width of this rank's vocabulary shard, J support ids per token, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel.backend import Kernel, RowGradient, finite_where_live, grad_of_used_slots, rows_with_gradient
from tropd_mcore.kernel.exchange import merge_stats, start_exchange, support_log_probs_of
from tropd_mcore.kernel.gradients import GradientBuffer, WeightGradient
from tropd_mcore.kernel.group import all_reduce
from tropd_mcore.kernel.shard import chunks, math_dtype
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.surroundings import (
    begin_backward,
    refuse_forward_mode,
    refuse_functional_transforms,
    without_autocast,
)


def support_log_probs(
    source: LogitSource,
    ids_TJ: Tensor,
    kernel: Kernel,
    *,
    unique_run_lengths: tuple[int, ...],
    reduce_hidden_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of `ids_TJ` and the entropy, nats, over the whole vocabulary.

    Equals, with all shards side by side, the padding cut off and `scale` the function of `Scaling`,

        logp_TV = log_softmax(scale(logits_TV))
        logp_TJ = logp_TV.gather(1, ids_TJ)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(1)

    but keeps only two numbers per token for the backward pass. Forward: one SUM all-reduce of [C, 3N + J] numbers per
    chunk. Backward, given logits: the gradient is written over them if `GivenLogits.may_be_overwritten`. Backward,
    output layer: the logits are computed again, and one all-reduce sums dH over the ranks unless
    `reduce_hidden_gradient` is False.

    Args: as in `support_loss`; logits float32 or bfloat16 (math and results in float32) or float64 (all in float64).
    A logit of -inf has probability 0. A row whose results get no gradient has gradient 0, whatever its logits are. An
    id outside the vocabulary gives NaN, which no later check can miss; checking here would be a host sync.

    Raises LossInputError if the gradient would be wrong: a second backward pass, create_graph=True, functional
    transforms, two dtypes (docs/autograd.md).

    Source: d logp_j / d z_v = [v = j] - p_v and d H / d z_v = -p_v (log p_v + H).
    """
    check_arguments(source, ids_TJ, kernel, unique_run_lengths)
    call = _Call(source, ids_TJ, kernel, unique_run_lengths, reduce_hidden_gradient)
    with without_autocast(ids_TJ.device):
        result: tuple[Tensor, Tensor] = _SupportLogProbs.apply(*source.tensors, call)
    return result


def check_arguments(source: LogitSource, ids_TJ: Tensor, kernel: Kernel, unique_run_lengths: tuple[int, ...]) -> None:
    """Refuse calls that would give a wrong gradient; assert that logits, ids and shard fit together."""
    refuse_functional_transforms()
    first, weight_WD = source.tensors
    if weight_WD is not None and weight_WD.dtype != first.dtype:
        raise LossInputError(
            f"the output layer has two dtypes: hidden states {first.dtype}, weight {weight_WD.dtype}; expected one. "
            "Under autocast, cast the weight to the dtype of the hidden states"
        )
    width = first.shape[1] if weight_WD is None else weight_WD.shape[0]
    assert width == kernel.shard.width, f"logits have {width} columns, the shard {kernel.shard.width}"
    assert ids_TJ.shape[0] == source.tokens, f"{ids_TJ.shape[0]} rows of ids, {source.tokens} of logits"
    assert sum(unique_run_lengths) == ids_TJ.shape[1], (
        f"unique_run_lengths runs {unique_run_lengths} do not add up to {ids_TJ.shape[1]} slots"
    )


@dataclass(frozen=True)
class _Call:
    source: LogitSource
    ids_TJ: Tensor
    kernel: Kernel
    unique_run_lengths: tuple[int, ...]
    reduce_hidden_gradient: bool


class _SupportLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, weight_WD: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        """`first` is the hidden states, or the logits if there is no weight."""
        source, ids_TJ, kernel = call.source, call.ids_TJ, call.kernel
        lse_T = first.new_empty(first.shape[0], dtype=math_dtype(first))
        entropy_T = torch.empty_like(lse_T)
        logp_TJ = lse_T.new_empty(ids_TJ.shape)
        buffer = source.buffer(kernel.chunk_tokens)
        for rows in chunks(source.tokens, kernel.chunk_tokens):
            # Pass 1, then the one all-reduce of the chunk, then the merge of the shards. T = 0 rows run no collective.
            stats_C3, owned_CJ = kernel.backend.stats_and_support(
                source.logits(rows, out=buffer), ids_TJ[rows], kernel.shard, kernel.scaling
            )
            stats_CN3, value_CJ = start_exchange(stats_C3, owned_CJ, kernel.group).wait()
            lse_T[rows], entropy_T[rows] = merge_stats(stats_CN3)
            logp_TJ[rows] = support_log_probs_of(value_CJ, lse_T[rows], ids_TJ[rows], kernel.shard)
        # All tensors that the backward pass reads are saved with autograd, which notices changes in place and lets
        # hooks (offload, checkpointing) handle them. `call` is not kept, so it keeps no hidden states or logits alive.
        ctx.save_for_backward(first, weight_WD, ids_TJ, lse_T, entropy_T)
        ctx.set_materialize_grads(False)
        ctx.overwrite = isinstance(source, GivenLogits) and source.may_be_overwritten()
        ctx.parameter = source.weight_WD if isinstance(source, OutputLayer) else None
        ctx.kernel, ctx.unique_run_lengths, ctx.reduce = kernel, call.unique_run_lengths, call.reduce_hidden_gradient
        return logp_TJ, entropy_T

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def backward(
        ctx: Any, grad_logp_TJ: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        begin_backward(ctx, grad_logp_TJ, grad_entropy_T)
        # A hook may return other memory than the forward pass read, so only the tensors unpacked here may be used.
        first, weight_WD, ids_TJ, lse_T, entropy_T = ctx.saved_tensors
        kernel: Kernel = ctx.kernel
        source = GivenLogits(first) if weight_WD is None else OutputLayer(first, weight_WD)
        # The coefficients g_j and g_H of `RowGradient`.
        grad_logp_TJ = grad_of_used_slots(grad_logp_TJ, ids_TJ, lse_T)
        live_T = rows_with_gradient(grad_logp_TJ, grad_entropy_T)
        # Where the gradients go. g_j and g_H contain the factor already, so dW may be added to main_grad (folded).
        needs_first = weight_WD is None or ctx.needs_input_grad[0]
        first_gradient = None
        if needs_first:
            first_gradient = first.detach() if ctx.overwrite else torch.empty_like(first)
        weight_gradient = WeightGradient(ctx.parameter, folded=True) if ctx.needs_input_grad[1] else None

        room = GradientBuffer(source, kernel.backend, first_gradient)
        buffer = source.buffer(kernel.chunk_tokens)
        with without_autocast(first.device):
            for rows in chunks(source.tokens, kernel.chunk_tokens):
                # The logits again: a view, or the output layer's product computed anew.
                logits_CW = source.logits(rows, out=buffer)
                dz_CW = room.of(logits_CW, rows)
                row = RowGradient(
                    ids_CJ=ids_TJ[rows],
                    grad_logp_CJ=grad_logp_TJ[rows],
                    grad_entropy_C=grad_entropy_T[rows] if grad_entropy_T is not None else None,
                    lse_C=lse_T[rows],
                    entropy_C=entropy_T[rows],
                    unique_run_lengths=ctx.unique_run_lengths,
                    live_C=live_T[rows],
                )
                # Pass 2 writes dz; then the two products dH = dz @ weight and dW += dz.T @ hidden.
                kernel.backend.write_gradient(logits_CW, row, kernel.shard, kernel.scaling, dz_CW)
                if weight_WD is not None and first_gradient is not None:
                    torch.mm(dz_CW, weight_WD, out=first_gradient[rows])
                if weight_gradient is not None:
                    weight_gradient.add(dz_CW, finite_where_live(first[rows], live_T[rows]))
        if ctx.overwrite:
            torch.autograd.graph.increment_version(first)  # a Triton kernel does not do it
        # The one all-reduce of the backward pass, of this shard's part of dH. It also runs for T = 0 rows.
        if weight_WD is not None and first_gradient is not None and ctx.reduce:
            all_reduce(first_gradient, kernel.group)
        weight = weight_gradient.finish(lse_T.new_ones(())) if weight_gradient is not None else None
        return first_gradient, weight, None
