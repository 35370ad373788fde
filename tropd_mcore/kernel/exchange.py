"""The one collective of a chunk: every rank learns all shards' statistics and all support logits.

Invariant: the same bits on every rank. Each number is non-zero on one rank only, in a slot of its own, so the SUM is
exact and in any order the same; this holds in float32 and float64, never in a reduced-precision all-reduce.

Shapes: C tokens of a chunk, J support ids a token, N ranks, M numbers of a shard's statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.kernel.group import Group, all_reduce
from tropd_mcore.kernel.shard import VocabShard
from tropd_mcore.sentinels import NO_ENTRY


@dataclass(frozen=True)
class Exchange:
    """An all-reduce under way."""

    packed_CX: Tensor
    ranks: int
    slot: int
    work: dist.Work | None

    def wait(self) -> tuple[Tensor, Tensor]:
        """(all shards' statistics [C, N, M], all support logits [C, J])."""
        if self.work is not None:
            self.work.wait()
        width = self.ranks * self.slot
        return self.packed_CX[:, :width].unflatten(1, (self.ranks, self.slot)), self.packed_CX[:, width:]


def start_exchange(stats_CM: Tensor, owned_CJ: Tensor, group: Group, *, overlap: bool = False) -> Exchange:
    """Send this shard's statistics and the support logits it owns (0 for the others). One SUM all-reduce."""
    ranks, slot = group.size(), stats_CM.shape[1]
    packed_CX = stats_CM.new_zeros(stats_CM.shape[0], slot * ranks + owned_CJ.shape[1])
    packed_CX[:, slot * group.rank() : slot * (group.rank() + 1)] = stats_CM
    packed_CX[:, slot * ranks :] = owned_CJ
    return Exchange(packed_CX, ranks, slot, all_reduce(packed_CX, group, overlap=overlap))


def merge_stats(stats_CN3: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and entropy [C] from (m, s, u) of all N shards: m = max z, s = sum e^(z-m), u = sum e^(z-m) (z-m).

    u is kept relative to m so that the entropy is not a difference of large numbers.
    """
    max_CN, sum_CN, moment_CN = stats_CN3.unbind(dim=2)
    max_C1 = max_CN.amax(dim=1, keepdim=True)
    shift_CN = max_CN - max_C1
    weight_CN = shift_CN.exp()
    sum_C = (weight_CN * sum_CN).sum(dim=1)
    moment_C = (weight_CN * (moment_CN + shift_CN * sum_CN)).sum(dim=1)
    log_sum_C = sum_C.log()
    return max_C1[:, 0] + log_sum_C, log_sum_C - moment_C / sum_C


def support_log_probs_of(value_CJ: Tensor, lse_C: Tensor, ids_CJ: Tensor, shard: VocabShard) -> Tensor:
    """Logits to log-probs; 0 in unused slots, NaN for ids that nobody owns."""
    logp_CJ = (value_CJ - lse_C[:, None]).masked_fill(ids_CJ == NO_ENTRY, 0.0)
    return logp_CJ.masked_fill((ids_CJ < NO_ENTRY) | (ids_CJ >= shard.vocab_size), torch.nan)
