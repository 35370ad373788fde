"""The exact top-k of a distribution that is sharded over the vocabulary, with true log-probs.

It serves the teacher's scores, the student's own candidates and the overlap metric. It is not differentiable.
Invariant: the same ids on every rank, in the order (logit descending, id ascending), also in case of ties. bfloat16
logits tie often, and `torch.topk` alone breaks ties arbitrarily.

Shapes: T tokens, C tokens of a chunk, B rows of a block, W width of this rank's vocabulary shard, R <= W its real (not
padded) columns, K entries, J requested ids, N ranks of the group, X any number of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.eager import block_rows
from tropd_mcore.kernel.exchange import merge_stats, support_log_probs_of
from tropd_mcore.kernel.group import Group, all_gather
from tropd_mcore.kernel.shard import VocabShard, chunks, math_dtype
from tropd_mcore.kernel.source import LogitSource
from tropd_mcore.kernel.surroundings import without_autocast
from tropd_mcore.sentinels import NO_ENTRY

COLUMN_BITS = 32
LAST_COLUMN = 2**COLUMN_BITS - 1
TILE = 32
"""Columns of a tile. Measured on one CPU core in ms per row, K = 64, for tiles of 16, 32, 64, 128 columns and for the
whole row: 0.17, 0.11, 0.12, 0.15, 0.57 on 75968 columns; 0.09, 0.08, 0.10, 0.14, 0.16 on 18992."""
SMALLEST_CUT = 2
"""Tiles are used if the kept ones have at most 1 / SMALLEST_CUT of the columns."""


@dataclass(frozen=True)
class TopK:
    """The most probable tokens of each row, and what the same pass finds about the whole distribution."""

    ids_TK: Tensor
    """int64, global ids, by (logit descending, id ascending)"""
    logp_TK: Tensor
    """log-probs over the whole vocabulary (not renormalised), nats, float32 (float64 for float64 logits)"""
    tail_mass_T: Tensor
    """1 - sum of the K probabilities, in [0, 1]"""
    lse_T: Tensor
    """logsumexp of the scaled logits"""
    entropy_T: Tensor
    """entropy over the whole vocabulary, nats"""
    logp_TJ: Tensor | None = None
    """log-probs of the requested ids, nats; None if none were requested"""


@torch.no_grad()
def distributed_topk(source: LogitSource, *, k: int, kernel: Kernel, ids_TJ: Tensor | None = None) -> TopK:
    """Return the k most probable entries of the whole vocabulary, and the log-probs of `ids_TJ` from the same pass.

    Equals, with all shards side by side, the padding cut off and `scale` the function of `Scaling`,

        logp_TV = log_softmax(scale(logits_TV))
        ids_TK = logits_TV.sort(dim=1, descending=True, stable=True).indices, cut at K
        logp_TK, logp_TJ = logp_TV.gather(1, ids_TK), logp_TV.gather(1, ids_TJ)

    but holds one chunk of logits at a time, and each rank sends its best min(k, R) candidates instead of its logits.
    That is enough: an entry of the global top-k is in the top-k of its own shard, since k better entries there would
    also be better globally. One all-gather of [C, 2K + 3 + J] numbers per chunk.

    Args: ids_TJ as in `support_log_probs`. Logits must be finite. k may exceed the shard, but not the vocabulary.

    Raises ValueError if k > vocab_size.
    """
    shard = kernel.shard
    if k > shard.vocab_size:
        raise ValueError(
            f"{k} candidates per token were requested (topk or student_topk of the objective) but the vocabulary has "
            f"{shard.vocab_size} tokens; set objective.topk, objective.outlier.topk or objective.student_topk <= "
            f"{shard.vocab_size}"
        )
    first, _ = source.tensors
    asked_TJ = ids_TJ if ids_TJ is not None else torch.empty(source.tokens, 0, dtype=torch.int64, device=first.device)
    lse_T = first.new_empty(source.tokens, dtype=math_dtype(first))
    entropy_T = torch.empty_like(lse_T)
    logp_TK, logp_TJ = lse_T.new_empty(source.tokens, k), lse_T.new_empty(asked_TJ.shape)
    ids_TK = torch.empty(source.tokens, k, dtype=torch.int64, device=first.device)
    buffer = source.buffer(kernel.chunk_tokens)
    with without_autocast(first.device):
        for rows in chunks(source.tokens, kernel.chunk_tokens):
            # Pass 1 over this shard: (m, s, u), the requested logits, and the best k columns.
            logits_CW = source.logits(rows, out=buffer)
            stats_C3, owned_CJ = kernel.backend.stats_and_support(logits_CW, asked_TJ[rows], shard, kernel.scaling)
            # The one all-gather of the chunk.
            float_CNY, id_CX = _all_gather(
                torch.cat([stats_C3, owned_CJ], dim=1), *_shard_candidates(logits_CW, k, shard), kernel.group
            )
            # Merge the shards: normalisation, log-probs, and the best k of N k candidates.
            stats_CN3, owned_CNJ, value_CNK = float_CNY.split([3, asked_TJ.shape[1], k], dim=2)
            lse_T[rows], entropy_T[rows] = merge_stats(stats_CN3)
            logp_TJ[rows] = support_log_probs_of(owned_CNJ.sum(dim=1), lse_T[rows], asked_TJ[rows], shard)
            # Candidates are in rank order, which is id order, so a stable sort keeps ties in id order.
            value_CX, order_CX = value_CNK.flatten(1).sort(dim=1, descending=True, stable=True)
            ids_TK[rows] = id_CX.gather(1, order_CX[:, :k])
            logp_TK[rows] = kernel.scaling.apply_(value_CX[:, :k]) - lse_T[rows, None]
    tail_mass_T = (1.0 - logp_TK.exp().sum(dim=1)).clamp(0.0, 1.0)
    return TopK(ids_TK, logp_TK, tail_mass_T, lse_T, entropy_T, logp_TJ if ids_TJ is not None else None)


def _shard_candidates(logits_CW: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """This shard's best k (logit, global id), [C, K] each; filled up with (-inf, NO_ENTRY) if R < k."""
    real_CR = logits_CW[:, : shard.real_width]
    rows, columns = real_CR.shape
    count = min(k, columns)
    value_CK = real_CR.new_full((rows, k), float("-inf"), dtype=math_dtype(logits_CW))
    id_CK = torch.full((rows, k), NO_ENTRY, device=logits_CW.device)
    for block in chunks(rows, block_rows(logits_CW, columns)):
        column_BK = _best_columns(real_CR[block], count)
        value_CK[block, :count] = real_CR[block].gather(1, column_BK).to(value_CK.dtype)
        id_CK[block, :count] = column_BK + shard.start
    return value_CK, id_CK


def _best_columns(value_BR: Tensor, count: int) -> Tensor:
    """The `count` best columns by (value descending, column ascending), [B, count].

    It is enough to look into the `count` best tiles by (maximum descending, index ascending). Proof: let x be in
    another tile. The maximum of each of those `count` tiles comes before x in the order, because it is larger than the
    maximum of x's tile, or equal to it and further left. So `count` entries precede x, and x is not among the best.
    """
    columns = value_BR.shape[1]
    if SMALLEST_CUT * count * TILE > columns:
        return _best(value_BR, count)
    # The maximum of every tile; the last tile may be shorter.
    tiles = columns // TILE
    max_BX = value_BR[:, : tiles * TILE].unflatten(1, (tiles, TILE)).amax(dim=2)
    if tiles * TILE < columns:
        max_BX = torch.cat([max_BX, value_BR[:, tiles * TILE :].amax(dim=1, keepdim=True)], dim=1)
    # The columns of the best tiles, in ascending order, so that candidates with equal values are in column order.
    first_BK = _best(max_BX, count).sort(dim=1).values * TILE
    column_BX = (first_BK[:, :, None] + torch.arange(TILE, device=value_BR.device)).flatten(1)
    candidate_BX = value_BR.gather(1, column_BX.clamp_max(columns - 1))
    # Columns past the end of a shorter last tile never win.
    candidate_BX.masked_fill_(column_BX >= columns, float("-inf"))
    return column_BX.gather(1, _best(candidate_BX, count))


def _best(value_BX: Tensor, count: int) -> Tensor:
    """The same as `_best_columns`, by looking at every column."""
    # float64 does not fit into a key beside its column, so it pays for a stable sort of the whole row.
    if value_BX.dtype == torch.float64:
        return value_BX.sort(dim=1, descending=True, stable=True).indices[:, :count]
    best_key_BK = _sortable_key(value_BX.to(torch.float32)).topk(count, dim=1).values
    return LAST_COLUMN - (best_key_BK & LAST_COLUMN)


def _sortable_key(value_BX: Tensor) -> Tensor:
    """int64 keys whose order is (float32 value ascending, column descending): value bits above, column below.

    No two keys of a row are equal, so `topk` has no ties to break. As integers, the bits of non-negative floats ascend
    with the value, and those of negative floats descend; flipping all bits but the sign makes these ascend too. Adding
    0.0 turns -0.0 into 0.0, so that both have the same bits.
    """
    bits_BX = (value_BX + 0.0).view(torch.int32)
    ordered_BX = torch.where(bits_BX < 0, bits_BX ^ 0x7FFFFFFF, bits_BX).to(torch.int64)
    column_X = torch.arange(value_BX.shape[1], device=value_BX.device)
    return (ordered_BX << COLUMN_BITS) + (LAST_COLUMN - column_X)


def _all_gather(number_CX: Tensor, value_CK: Tensor, id_CK: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """All ranks' numbers and values side by side, [C, N, X + K], and their ids, [C, N*K]. One all-gather of integers.

    Floats are sent as their bits, next to the ids, in integers of the same size.
    """
    integer = torch.int64 if value_CK.dtype == torch.float64 else torch.int32
    floats = number_CX.shape[1] + value_CK.shape[1]
    mine = torch.cat([number_CX.view(integer), value_CK.view(integer), id_CK.to(integer)], dim=1)
    packed_CNY = all_gather(mine, group).transpose(0, 1)
    float_CNX = packed_CNY[:, :, :floats].contiguous().view(value_CK.dtype)
    return float_CNX, packed_CNY[:, :, floats:].to(torch.int64).flatten(1)
