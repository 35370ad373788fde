"""The exact top-k of logits that are sharded over the vocabulary, with true log-probs.

For what a teacher says of each token, and for the overlap metric. Not differentiable. Invariant: the same ids on every
rank, in the order (value descending, id ascending), which a tie cannot change: bf16 logits tie often, and
`torch.topk` alone breaks ties as it likes.

Shapes: T tokens, C tokens of one chunk, W width of this rank's vocabulary shard, R <= W its real (not padded) columns,
K entries, N ranks of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.losses.support import (
    NO_ENTRY,
    VocabShard,
    chunks,
    math_dtype,
    merge_stats,
    scaled_logits,
    shard_stats,
)

COLUMN_BITS = 32
LAST_COLUMN = 2**COLUMN_BITS - 1


@dataclass(frozen=True)
class TopK:
    """The most probable tokens of each row, and what the same pass knows of the whole distribution."""

    ids_TK: Tensor
    """int64, global ids, by (log-prob descending, id ascending)"""
    logp_TK: Tensor
    """log-probs over the whole vocabulary (not renormalised), nats, float32 (float64 for float64 logits)"""
    tail_mass_T: Tensor
    """1 - sum of the K probabilities, in [0, 1]"""
    lse_T: Tensor
    """logsumexp of logits / temperature"""
    entropy_T: Tensor
    """entropy over the whole vocabulary, nats"""


@torch.no_grad()
def distributed_topk(
    logits_TW: Tensor,
    *,
    k: int,
    shard: VocabShard,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    chunk_tokens: int,
) -> TopK:
    """Top k of the whole vocabulary at `temperature`.

    Equals, with all shards side by side and the padding cut off,

        logp_TV = log_softmax(logits_TV / temperature)
        logp_TK, ids_TK = logp_TV.sort(dim=1, descending=True, stable=True) cut at K

    but sends min(k, R) candidates a rank instead of V logits: an entry of the global top-k is in the top-k of its own
    shard, since k better entries there would also be better globally. One all-gather of [C, 2K + 3] numbers a chunk.

    Args: logits_TW float32 or bfloat16 (math in float32) or float64, finite. k may exceed the shard, not the
    vocabulary. chunk_tokens bounds the temporary memory: C x W keys of 64 bit and two buffers in the math dtype.

    Raises ValueError where k > vocab_size.
    """
    assert group is not None, "a group of None means the whole world to torch.distributed; pass the shard's group"
    assert logits_TW.shape[1] == shard.width, f"logits have {logits_TW.shape[1]} columns, the shard {shard.width}"
    if k > shard.vocab_size:
        raise ValueError(
            f"objective.outlier.topk = {k} but the vocabulary has {shard.vocab_size} tokens; "
            f"set objective.outlier.topk <= {shard.vocab_size}"
        )
    tokens = logits_TW.shape[0]
    lse_T = logits_TW.new_empty(tokens, dtype=math_dtype(logits_TW))
    entropy_T = torch.empty_like(lse_T)
    logp_TK = lse_T.new_empty(tokens, k)
    ids_TK = torch.empty(tokens, k, dtype=torch.int64, device=logits_TW.device)
    for rows in chunks(tokens, chunk_tokens):
        scaled_CR = scaled_logits(logits_TW[rows], shard, temperature)
        value_CK, id_CK = _shard_candidates(scaled_CR, k, shard)
        stats_CN3, value_CX, id_CX = _all_gather(shard_stats(scaled_CR), value_CK, id_CK, group)
        lse_T[rows], entropy_T[rows] = merge_stats(stats_CN3)
        # Candidates lie in rank order, which is id order, so a stable sort keeps ties in id order.
        value_CX, order_CX = value_CX.sort(dim=1, descending=True, stable=True)
        ids_TK[rows] = id_CX.gather(1, order_CX[:, :k])
        logp_TK[rows] = value_CX[:, :k] - lse_T[rows, None]
    tail_mass_T = (1.0 - logp_TK.exp().sum(dim=1)).clamp(0.0, 1.0)
    return TopK(ids_TK, logp_TK, tail_mass_T, lse_T, entropy_T)


def _shard_candidates(scaled_CR: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """This shard's best k (value, global id), [C, K] each; filled up with (-inf, NO_ENTRY) where R < k."""
    count = min(k, shard.real_width)
    columns_CK = _best_columns(scaled_CR, count)
    missing = (0, k - count)
    value_CK = torch.nn.functional.pad(scaled_CR.gather(1, columns_CK), missing, value=float("-inf"))
    return value_CK, torch.nn.functional.pad(columns_CK + shard.start, missing, value=NO_ENTRY)


def _best_columns(value_CR: Tensor, count: int) -> Tensor:
    """The `count` best columns by (value descending, column ascending), [C, count]."""
    if value_CR.dtype == torch.float64:
        return value_CR.sort(dim=1, descending=True, stable=True).indices[:, :count]
    best_key_C = _sortable_key(value_CR).topk(count, dim=1).values
    return LAST_COLUMN - (best_key_C & LAST_COLUMN)


def _sortable_key(value_CR: Tensor) -> Tensor:
    """int64 keys whose order is (float32 value ascending, column descending): value bits above, column below.

    The bits of a non-negative float grow with it; those of a negative one fall, so all but the sign are flipped. Adding
    0.0 turns -0.0 into 0.0, its equal.
    """
    bits_CR = (value_CR + 0.0).view(torch.int32)
    ordered_CR = torch.where(bits_CR < 0, bits_CR ^ 0x7FFFFFFF, bits_CR).to(torch.int64)
    column_R = torch.arange(value_CR.shape[1], device=value_CR.device)
    return (ordered_CR << COLUMN_BITS) + (LAST_COLUMN - column_R)


def _all_gather(
    stats_C3: Tensor, value_CK: Tensor, id_CK: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' stats [C, N, 3] and candidates [C, N*K] (values, ids), by one all-gather of integers.

    Floats travel as their bits, next to the ids in integers of the same size.
    """
    integer = torch.int64 if value_CK.dtype == torch.float64 else torch.int32
    k, ranks = value_CK.shape[1], group.size()
    mine = torch.cat([stats_C3.view(integer), value_CK.view(integer), id_CK.to(integer)], dim=1)
    packed = mine.new_empty(ranks, *mine.shape)
    dist.all_gather(list(packed.unbind(0)), mine, group=group)
    packed_CNX = packed.transpose(0, 1)
    stats_CN3 = packed_CNX[:, :, :3].contiguous().view(value_CK.dtype)
    value_CX = packed_CNX[:, :, 3 : 3 + k].contiguous().view(value_CK.dtype).flatten(1)
    return stats_CN3, value_CX, packed_CNX[:, :, 3 + k :].to(torch.int64).flatten(1)
