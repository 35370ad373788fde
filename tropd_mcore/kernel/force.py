"""The force of each token's loss: the L1 norm of its gradient in the scaled logits, from numbers of the support alone.

This module computes no gradient that trains. All tokens outside the support are taken together as one. The entries of a
gradient through a softmax add up to 0, so the entry of these tokens follows from the others and no pass over the
vocabulary is needed. The sum of absolute values is the norm itself for a loss of log-probs, whose entries outside the
support have one sign, and a lower bound for a loss of the entropy or of a divergence over the whole vocabulary.

Shapes: C tokens of a chunk, J support ids per token, R real columns of this rank's vocabulary shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.kernel.backend import rows_with_gradient
from tropd_mcore.kernel.group import Group, all_reduce
from tropd_mcore.kernel.shard import Scaling, VocabShard, support_logits
from tropd_mcore.sentinels import NO_ENTRY


@torch.no_grad()
def force_of(
    ids_CJ: Tensor,
    logp_CJ: Tensor,
    grad_logp_CJ: Tensor,
    entropy_C: Tensor,
    grad_entropy_C: Tensor | None = None,
    dense_CJ: Tensor | None = None,
) -> Tensor:
    """Return sum_v |dL/dz'_v| of each token, [C], with the tokens outside the support as one v.

    Args as in `RowGradient`, with the log-probs of the ids; `dense_CJ` are the entries of its dense part at the ids.
    Cost: a sort of J numbers per token. No collective, no host sync.
    """
    # An id may be in several slots, and its entry is one sum over them. After sorting, equal ids are neighbours, and
    # the slots of one id are added up in the slot `place`.
    live_C = rows_with_gradient(grad_logp_CJ, grad_entropy_C)
    ids_CJ, order_CJ = ids_CJ.sort(dim=1)
    begins_CJ = torch.ones_like(ids_CJ, dtype=torch.bool)
    begins_CJ[:, 1:] = ids_CJ[:, 1:] != ids_CJ[:, :-1]
    place_CJ = begins_CJ.cumsum(dim=1) - 1
    unused_CJ = ids_CJ == NO_ENTRY

    def at_ids(number_CJ: Tensor) -> Tensor:
        """A number that is the same in all slots of an id, once per id; 0 in unused slots."""
        sorted_CJ = number_CJ.gather(1, order_CJ).masked_fill(unused_CJ, 0.0)
        return torch.zeros_like(sorted_CJ).scatter_(1, place_CJ, sorted_CJ)

    p_CJ = at_ids(logp_CJ.exp())
    pushed_CJ = torch.zeros_like(p_CJ).scatter_add_(1, place_CJ, grad_logp_CJ.gather(1, order_CJ))
    entry_CJ = pushed_CJ - grad_logp_CJ.sum(dim=1, keepdim=True) * p_CJ
    if grad_entropy_C is not None:
        moment_CJ = torch.xlogy(p_CJ, p_CJ) + p_CJ * entropy_C[:, None]
        entry_CJ = entry_CJ - grad_entropy_C[:, None] * moment_CJ
    if dense_CJ is not None:
        live_C = live_C | (dense_CJ != 0).any(dim=1)
        entry_CJ = entry_CJ + at_ids(dense_CJ)
    entry_CJ = entry_CJ.masked_fill(~live_C[:, None], 0.0)  # a row without a gradient may hold NaN
    return entry_CJ.abs().sum(dim=1) + entry_CJ.sum(dim=1).abs()


@torch.no_grad()
def dense_at_support(dense_CR: Tensor, ids_CJ: Tensor, shard: VocabShard, group: Group) -> Tensor:
    """Return the entries [C, J] of a dense gradient at `ids_CJ`. One SUM all-reduce of [C, J] numbers."""
    dense_CJ = support_logits(dense_CR, ids_CJ, shard, Scaling())
    all_reduce(dense_CJ, group)
    return dense_CJ
