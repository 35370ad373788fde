"""The two passes over the logits in plain PyTorch: the definition that the other backends are held to.

On a CPU the passes go through the chunk in blocks of rows whose temporaries stay in the cache; the temporary memory is
three blocks. On other devices the chunk is one block, and the memory is three buffers [C, R] in the math dtype.

Shapes as in `backend`; B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tropd_mcore.kernel.backend import RowGradient
from tropd_mcore.kernel.shard import (
    Scaling,
    VocabShard,
    chunks,
    local_ids,
    math_dtype,
    scaled_logits,
    support_logits,
)
from tropd_mcore.sentinels import LEAST_LOGIT

BLOCK_ELEMENTS = 2**19
"""Elements of a block per CPU thread; three such buffers are 6 MiB in float32. Measured: a quarter of the time that
one block of 1024 rows takes (docs/kernel.md)."""


class EagerBackend:
    """Any device, any dtype."""

    name = "eager"
    shrinks_in_place = True

    def stats_and_support(
        self, logits_CW: Tensor, ids_CJ: Tensor, shard: VocabShard, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        # Pass 1. Over the columns v < R of this shard, with z' the scaled logits:
        #     m = max z'_v,  s = sum_v e^(z'_v - m),  u = sum_v e^(z'_v - m) (z'_v - m).
        # Of all shards together these give logsumexp = m + log s and the entropy log s - u / s (`merge_stats`).
        owned_CJ = support_logits(logits_CW, ids_CJ, shard, scaling)
        if shard.real_width == 0:
            return empty_shard_stats(owned_CJ), owned_CJ
        stats_C3 = owned_CJ.new_empty(owned_CJ.shape[0], 3)
        for rows, (first_BR, second_BR, _) in _blocks(logits_CW, shard):
            scaled_BR = scaled_logits(logits_CW[rows], shard, scaling, out=first_BR)
            max_B = scaled_BR.amax(dim=1)
            shifted_BR = scaled_BR.sub_(max_B[:, None])
            exp_BR = torch.exp(shifted_BR, out=second_BR)
            stats_C3[rows, 0] = max_B
            stats_C3[rows, 1] = exp_BR.sum(dim=1)
            stats_C3[rows, 2] = exp_BR.mul_(shifted_BR).sum(dim=1)
        return stats_C3, owned_CJ

    def write_gradient(
        self, logits_CW: Tensor, row: RowGradient, shard: VocabShard, scaling: Scaling, out_CW: Tensor
    ) -> None:
        """See `Backend`."""
        # Pass 2, the gradient of `RowGradient` in this order of operations, with G = sum_j g_j:
        #     dL/dz'_v = -p_v (G + g_H (log p_v + H)) + dense_v + sum_j g_j [v = ids_j],   then dL/dz by the chain rule.
        # G counts the slots of all shards, because each of them moves every p_v. The last sum has this shard's slots.
        real = shard.real_width
        row_sum_C = row.grad_logp_CJ.sum(dim=1)
        local_CJ, here_CJ = local_ids(row.ids_CJ, shard)
        owned_CJ = row.grad_logp_CJ.masked_fill(~here_CJ, 0.0)
        for rows, (first_BR, second_BR, third_BR) in _blocks(logits_CW, shard):
            # z' is a copy, so the rows of the output may lie over the logits they are computed from.
            scaled_BR = scaled_logits(logits_CW[rows], shard, scaling, out=first_BR)
            grad_BR = torch.sub(scaled_BR, row.lse_C[rows, None], out=second_BR)
            if row.grad_entropy_C is None:
                grad_BR.exp_().mul_(-row_sum_C[rows, None])
            else:
                factor_BR = torch.add(grad_BR, row.entropy_C[rows, None], out=third_BR)
                factor_BR.mul_(row.grad_entropy_C[rows, None]).add_(row_sum_C[rows, None]).neg_()
                grad_BR.exp_().mul_(factor_BR)
            if row.dense_CR is not None:
                grad_BR.add_(row.dense_CR[rows])
            # The support, before the one rounding to an output narrower than the math dtype.
            add_support_(grad_BR, local_CJ[rows], owned_CJ[rows], row.unique_run_lengths)
            out_CW[rows, :real] = scaling.chain_(grad_BR, scaled_BR)
        # Padding last: in a narrower output over the logits, its bytes are logits that the loop still had to read.
        out_CW[:, real:] = 0.0
        # A row without a gradient may have computed NaN from its logits. It is replaced, not multiplied by 0.
        if row.live_C is not None:
            _clear_dead_rows_(out_CW, row.live_C)


def _clear_dead_rows_(out_CW: Tensor, live_C: Tensor) -> None:
    """Write 0 to rows without a gradient, in place. A GPU writes to all rows, because looking would be a host sync."""
    if live_C.device.type != "cpu":
        out_CW.masked_fill_(~live_C[:, None], 0.0)
    elif not bool(live_C.all()):
        out_CW[~live_C] = 0.0


def empty_shard_stats(owned_CJ: Tensor) -> Tensor:
    """(m, s, u) of a shard without real columns, [C, 3]."""
    nothing_C = owned_CJ.new_zeros(owned_CJ.shape[0])
    return torch.stack([nothing_C + LEAST_LOGIT, nothing_C, nothing_C], dim=1)


def add_support_(grad_BR: Tensor, local_BJ: Tensor, owned_BJ: Tensor, unique_run_lengths: tuple[int, ...]) -> None:
    """Add the gradient of each support entry to its column, in place. Entries of other shards add 0 to column 0.

    Each run of unique ids is added separately. Then at most one non-zero number is added to a column at a time, and the
    result does not depend on the order of the additions, which a GPU does not fix.
    """
    for local, owned in zip(local_BJ.split(unique_run_lengths, 1), owned_BJ.split(unique_run_lengths, 1), strict=True):
        grad_BR.scatter_add_(1, local, owned)


def _blocks(logits_CW: Tensor, shard: VocabShard) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield the rows of each block and three buffers [B, R] that all blocks share; nothing without real columns."""
    rows, columns = logits_CW.shape[0], shard.real_width
    if rows == 0 or columns == 0:
        return
    height = block_rows(logits_CW, columns)
    buffers = torch.empty(3, height, columns, dtype=math_dtype(logits_CW), device=logits_CW.device)
    for block in chunks(rows, height):
        yield block, buffers[:, : block.stop - block.start].unbind()


def block_rows(logits_CW: Tensor, columns: int) -> int:
    """Rows of a block of `columns` columns: on a CPU as many as stay in the cache, on other devices all."""
    rows = max(1, logits_CW.shape[0])
    if logits_CW.device.type != "cpu":
        return rows
    return min(rows, max(1, BLOCK_ELEMENTS * torch.get_num_threads() // max(1, columns)))
