"""Log-probs of a few vocabulary entries a token, and the entropy, from logits that are sharded over the vocabulary.

For every loss that needs log p only on a sparse support (a sampled token, a teacher's top-k). Not for losses over the
full vocabulary, and it knows nothing of distillation. Invariant: what it returns is bit-identical on all ranks of the
group, so that a decision taken on it (trust this token?) cannot differ between ranks.

Shapes: T tokens, C tokens of one chunk, W width of this rank's vocabulary shard, R <= W its real (not padded) columns,
J support ids a token, N ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_ENTRY = -1
"""Support id of an unused slot: its log-prob is 0 and it has no gradient."""

EMPTY_SHARD_MAX = -1e30
"""Stands for the maximum of no logits. Finite, because -inf - (-inf) and 0 * inf are NaN."""


@dataclass(frozen=True)
class VocabShard:
    """This rank owns the columns [start, stop) of the logits; columns >= vocab_size are padding."""

    start: int
    stop: int
    vocab_size: int

    @property
    def width(self) -> int:
        """W, the columns of this rank's logits."""
        return self.stop - self.start

    @property
    def real_width(self) -> int:
        """R, the columns that are vocabulary entries; padding comes after them."""
        return max(0, min(self.stop, self.vocab_size) - self.start)


def support_log_probs(
    logits_TW: Tensor,
    ids_TJ: Tensor,
    *,
    shard: VocabShard,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Differentiable log-probs (nats) of `ids_TJ` and the entropy, over the whole vocabulary, at `temperature`.

    Equals, with all shards side by side and the padding cut off,

        logp_TV = log_softmax(logits_TV / temperature)
        logp_TJ = logp_TV.gather(1, ids_TJ)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(1)

    but saves nothing of size [T, V]: it keeps the logits and two numbers a token, and works in chunks of
    `chunk_tokens` rows. One SUM all-reduce of [C, 3N + J] a chunk in the forward, no collective in the backward.

    Args: logits_TW float32 or bfloat16 (math and results in float32) or float64 (all in float64), finite. ids_TJ int64,
    global, the same on every rank; NO_ENTRY (-1) marks an unused slot. Equal ids in one row add up in the gradient.
    chunk_tokens bounds the temporary memory: two buffers of C x W in the math dtype.

    Returns: (logp_TJ, entropy_T). An id outside the vocabulary gives NaN, which no later check can miss, rather than a
    host sync here. Source: d logp_j / d z_v = [v = j] - p_v and d H / d z_v = -p_v (log p_v + H).
    """
    assert group is not None, "a group of None means the whole world to torch.distributed; pass the shard's group"
    assert logits_TW.shape[1] == shard.width, f"logits have {logits_TW.shape[1]} columns, the shard {shard.width}"
    assert ids_TJ.shape[0] == logits_TW.shape[0], f"{ids_TJ.shape[0]} rows of ids, {logits_TW.shape[0]} of logits"
    result: tuple[Tensor, Tensor] = _SupportLogProbs.apply(logits_TW, ids_TJ, shard, group, temperature, chunk_tokens)
    return result


class _SupportLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TW: Tensor,
        ids_TJ: Tensor,
        shard: VocabShard,
        group: dist.ProcessGroup,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        lse_T = logits_TW.new_empty(logits_TW.shape[0], dtype=math_dtype(logits_TW))
        entropy_T = torch.empty_like(lse_T)
        logp_TJ = lse_T.new_empty(ids_TJ.shape)
        for rows in chunks(logits_TW.shape[0], chunk_tokens):
            scaled_CR = scaled_logits(logits_TW[rows], shard, temperature)
            owned_CJ = _gather_owned(scaled_CR, ids_TJ[rows], shard)
            stats_CN3, value_CJ = _exchange(shard_stats(scaled_CR), owned_CJ, group)
            lse_T[rows], entropy_T[rows] = merge_stats(stats_CN3)
            logp_TJ[rows] = _finish(value_CJ, lse_T[rows], ids_TJ[rows], shard)
        ctx.save_for_backward(logits_TW, ids_TJ, lse_T, entropy_T)
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.temperature, ctx.chunk_tokens = shard, temperature, chunk_tokens
        return logp_TJ, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_TJ: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_TW, ids_TJ, lse_T, entropy_T = ctx.saved_tensors
        shard, temperature = ctx.shard, ctx.temperature
        if grad_logp_TJ is None:
            grad_logp_TJ = lse_T.new_zeros(ids_TJ.shape)
        grad_logp_TJ = grad_logp_TJ.masked_fill(ids_TJ == NO_ENTRY, 0.0)

        grad_TW = torch.empty_like(logits_TW)
        grad_TW[:, shard.real_width :] = 0.0  # padding takes no part
        for rows in chunks(logits_TW.shape[0], ctx.chunk_tokens):
            logp_CR = scaled_logits(logits_TW[rows], shard, temperature).sub_(lse_T[rows, None])
            row_sum_C1 = grad_logp_TJ[rows].sum(dim=1, keepdim=True)
            if grad_entropy_T is None:
                grad_CR = logp_CR.exp_().mul_(-row_sum_C1)
            else:
                grad_h_C1 = grad_entropy_T[rows, None]
                dense_CR = (logp_CR + entropy_T[rows, None]).mul_(grad_h_C1).add_(row_sum_C1).neg_()
                grad_CR = logp_CR.exp_().mul_(dense_CR)
            _scatter_owned(grad_CR, ids_TJ[rows], grad_logp_TJ[rows], shard)
            # The sparse part is added before the one rounding to the dtype of the logits: near convergence the
            # gradient on the support is a small difference of large numbers.
            grad_TW[rows, : shard.real_width] = grad_CR.div_(temperature).to(grad_TW.dtype)
        return grad_TW, None, None, None, None, None


def math_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def chunks(rows: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of at most `chunk_tokens` rows; none where there are no rows, on every rank alike."""
    for start in range(0, rows, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, rows))


def scaled_logits(logits_CW: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """logits / temperature of the real columns, [C, R] in the math dtype: a copy, which the caller may overwrite."""
    return logits_CW[:, : shard.real_width].to(math_dtype(logits_CW), copy=True).div_(temperature)


def shard_stats(scaled_CR: Tensor) -> Tensor:
    """(m, s, u) of one shard, [C, 3]: m = max z, s = sum e^(z-m), u = sum e^(z-m) (z-m).

    u is kept relative to m so that the entropy is not a difference of large numbers. Overwrites its argument.
    """
    if scaled_CR.shape[1] == 0:
        nothing_C = scaled_CR.new_zeros(scaled_CR.shape[0])
        return torch.stack([nothing_C + EMPTY_SHARD_MAX, nothing_C, nothing_C], dim=1)
    max_C = scaled_CR.amax(dim=1)
    shifted_CR = scaled_CR.sub_(max_C[:, None])
    exp_CR = shifted_CR.exp()
    return torch.stack([max_C, exp_CR.sum(dim=1), exp_CR.mul_(shifted_CR).sum(dim=1)], dim=1)


def merge_stats(stats_CN3: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and entropy [C] from the (m, s, u) of all N shards; the same bits on every rank."""
    max_CN, sum_CN, moment_CN = stats_CN3.unbind(dim=2)
    max_C1 = max_CN.amax(dim=1, keepdim=True)
    shift_CN = max_CN - max_C1
    weight_CN = shift_CN.exp()
    sum_C = (weight_CN * sum_CN).sum(dim=1)
    moment_C = (weight_CN * (moment_CN + shift_CN * sum_CN)).sum(dim=1)
    log_sum_C = sum_C.log()
    return max_C1[:, 0] + log_sum_C, log_sum_C - moment_C / sum_C


def _exchange(stats_C3: Tensor, owned_CJ: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Give every rank all shards' stats [C, N, 3] and all support logits [C, J], by one SUM all-reduce.

    Each number is non-zero on one rank only, its stats in a slot of their own, so the sum is exact and in any order the
    same. This holds in float32 and float64, never in a reduced-precision all-reduce.
    """
    ranks = group.size()
    packed = stats_C3.new_zeros(stats_C3.shape[0], 3 * ranks + owned_CJ.shape[1])
    packed[:, 3 * group.rank() : 3 * group.rank() + 3] = stats_C3
    packed[:, 3 * ranks :] = owned_CJ
    dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
    return packed[:, : 3 * ranks].unflatten(1, (ranks, 3)), packed[:, 3 * ranks :]


def _finish(value_CJ: Tensor, lse_C: Tensor, ids_CJ: Tensor, shard: VocabShard) -> Tensor:
    """Logits to log-probs; 0 in unused slots, NaN for ids that nobody owns."""
    logp_CJ = (value_CJ - lse_C[:, None]).masked_fill(ids_CJ == NO_ENTRY, 0.0)
    return logp_CJ.masked_fill((ids_CJ < NO_ENTRY) | (ids_CJ >= shard.vocab_size), float("nan"))


def _local_ids(ids_CJ: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Column of each id in this shard and whether it is here; column 0 stands in for those that are not."""
    local_CJ = ids_CJ - shard.start
    here_CJ = (local_CJ >= 0) & (local_CJ < shard.real_width)
    return local_CJ.masked_fill(~here_CJ, 0), here_CJ


def _gather_owned(scaled_CR: Tensor, ids_CJ: Tensor, shard: VocabShard) -> Tensor:
    """Scaled logits [C, J] of the ids in this shard, 0 for the others."""
    if shard.real_width == 0:
        return scaled_CR.new_zeros(ids_CJ.shape)
    local_CJ, here_CJ = _local_ids(ids_CJ, shard)
    return scaled_CR.gather(1, local_CJ).masked_fill(~here_CJ, 0.0)


def _scatter_owned(grad_CR: Tensor, ids_CJ: Tensor, grad_logp_CJ: Tensor, shard: VocabShard) -> None:
    """Add the gradient of each support entry to its column, in place; entries of other shards add 0 to column 0.

    The first entry goes alone: a row whose other ids are distinct (top-k plus one sampled token) then never adds two
    non-zero numbers to a column in one launch, which makes the result deterministic on a GPU as well.
    """
    if shard.real_width == 0:
        return
    local_CJ, here_CJ = _local_ids(ids_CJ, shard)
    owned_CJ = grad_logp_CJ.masked_fill(~here_CJ, 0.0)
    grad_CR.scatter_add_(1, local_CJ[:, :1], owned_CJ[:, :1])
    grad_CR.scatter_add_(1, local_CJ[:, 1:], owned_CJ[:, 1:])
