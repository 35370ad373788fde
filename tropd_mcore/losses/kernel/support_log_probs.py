"""Differentiable log-probs of a few vocabulary entries a token, and the entropy, on vocabulary shards.

For losses that are not sums over tokens, for logits that an output layer outside our control has made, and for scoring
without gradients. Where the loss is a sum over tokens, `support_loss` needs no second look at the output layer.
Invariant: what is returned is bit-identical on all ranks of the group, so that a decision taken on it (trust this
token?) cannot differ between ranks.

Shapes: T tokens, C tokens of a chunk, W width of this rank's vocabulary shard, J support ids a token, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tropd_mcore.losses.kernel.backend import Kernel, RowGradient
from tropd_mcore.losses.kernel.exchange import merge_stats, start_exchange, support_log_probs_of
from tropd_mcore.losses.kernel.gradient_buffer import GradientBuffer
from tropd_mcore.losses.kernel.shard import NO_ENTRY, chunks, math_dtype
from tropd_mcore.losses.kernel.source import LogitSource
from tropd_mcore.losses.kernel.weight_gradient import WeightGradient


def support_log_probs(
    source: LogitSource,
    ids_TJ: Tensor,
    kernel: Kernel,
    *,
    distinct: tuple[int, ...],
    reduce_hidden_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probs (nats) of `ids_TJ` and the entropy, over the whole vocabulary.

    Equals, with all shards side by side, the padding cut off and `scale` the function of `Scaling`,

        logp_TV = log_softmax(scale(logits_TV))
        logp_TJ = logp_TV.gather(1, ids_TJ)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(1)

    but keeps two numbers a token for the backward pass. One SUM all-reduce of [C, 3N + J] a chunk in the forward pass.
    Backward: the gradient is written over given logits, so nobody else may need them; of an output layer the logits are
    computed again, and dH is summed over the ranks by one all-reduce unless `reduce_hidden_gradient` is False.

    Args: as of `support_loss`; logits float32 or bfloat16 (math and results in float32) or float64 (all in float64),
    finite. An id outside the vocabulary gives NaN, which no later check can miss, rather than a host sync here.

    Source: d logp_j / d z_v = [v = j] - p_v and d H / d z_v = -p_v (log p_v + H).
    """
    check_arguments(source, ids_TJ, kernel, distinct)
    call = _Call(source, ids_TJ, kernel, distinct, reduce_hidden_gradient)
    result: tuple[Tensor, Tensor] = _SupportLogProbs.apply(*source.tensors, call)
    return result


def check_arguments(source: LogitSource, ids_TJ: Tensor, kernel: Kernel, distinct: tuple[int, ...]) -> None:
    """Assert that logits, ids and shard fit together."""
    first, weight_WD = source.tensors
    width = first.shape[1] if weight_WD is None else weight_WD.shape[0]
    assert width == kernel.shard.width, f"logits have {width} columns, the shard {kernel.shard.width}"
    assert ids_TJ.shape[0] == source.tokens, f"{ids_TJ.shape[0]} rows of ids, {source.tokens} of logits"
    assert sum(distinct) == ids_TJ.shape[1], f"distinct runs {distinct} do not add up to {ids_TJ.shape[1]} slots"


@dataclass(frozen=True)
class _Call:
    source: LogitSource
    ids_TJ: Tensor
    kernel: Kernel
    distinct: tuple[int, ...]
    reduce_hidden_gradient: bool


class _SupportLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, weight_WD: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        """`first` is the hidden states, or the logits where there is no weight."""
        source, ids_TJ, kernel = call.source, call.ids_TJ, call.kernel
        lse_T = first.new_empty(first.shape[0], dtype=math_dtype(first))
        entropy_T = torch.empty_like(lse_T)
        logp_TJ = lse_T.new_empty(ids_TJ.shape)
        buffer = source.buffer(kernel.chunk_tokens)
        for rows in chunks(source.tokens, kernel.chunk_tokens):
            stats_C3, owned_CJ = kernel.backend.stats_and_support(
                source.logits(rows, out=buffer), ids_TJ[rows], kernel.shard, kernel.scaling
            )
            stats_CN3, value_CJ = start_exchange(stats_C3, owned_CJ, kernel.group).wait()
            lse_T[rows], entropy_T[rows] = merge_stats(stats_CN3)
            logp_TJ[rows] = support_log_probs_of(value_CJ, lse_T[rows], ids_TJ[rows], kernel.shard)
        ctx.save_for_backward(first, weight_WD, lse_T, entropy_T)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return logp_TJ, entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp_TJ: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        first, weight_WD, lse_T, entropy_T = ctx.saved_tensors
        source, ids_TJ, kernel = ctx.call.source, ctx.call.ids_TJ, ctx.call.kernel
        if grad_logp_TJ is None:
            grad_logp_TJ = lse_T.new_zeros(ids_TJ.shape)
        grad_logp_TJ = grad_logp_TJ.masked_fill(ids_TJ == NO_ENTRY, 0.0)
        first_gradient = first if weight_WD is None else torch.empty_like(first)
        weight_gradient = WeightGradient(source.weight_WD, folded=True) if ctx.needs_input_grad[1] else None

        gradient_buffer = GradientBuffer(source, kernel.backend)
        buffer = source.buffer(kernel.chunk_tokens)
        for rows in chunks(source.tokens, kernel.chunk_tokens):
            logits_CW = source.logits(rows, out=buffer)
            dz_CW = gradient_buffer.of(logits_CW)
            row = RowGradient(
                ids_CJ=ids_TJ[rows],
                grad_logp_CJ=grad_logp_TJ[rows],
                grad_entropy_C=grad_entropy_T[rows] if grad_entropy_T is not None else None,
                lse_C=lse_T[rows],
                entropy_C=entropy_T[rows],
                distinct=ctx.call.distinct,
            )
            kernel.backend.write_gradient(logits_CW, row, kernel.shard, kernel.scaling, dz_CW)
            if weight_WD is not None:
                torch.mm(dz_CW, weight_WD, out=first_gradient[rows])
            if weight_gradient is not None:
                weight_gradient.add(dz_CW, first[rows])
        if weight_WD is not None and ctx.call.reduce_hidden_gradient:
            dist.all_reduce(first_gradient, group=kernel.group)
        weight = weight_gradient.finish(lse_T.new_ones(())) if weight_gradient is not None else None
        return first_gradient, weight, None
