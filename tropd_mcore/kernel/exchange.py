"""The one collective of a chunk: every rank learns all shards' statistics and all support logits.

Invariant: the same bits on every rank. Each number is non-zero on one rank only, so the SUM is exact and does not
depend on the order of the ranks. This holds in float32 and float64, but not in a reduced-precision all-reduce.

Shapes: C tokens of a chunk, J support ids per token, N ranks, M numbers of a shard's statistics.
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
    """An all-reduce that has started."""

    packed_CX: Tensor
    ranks: int
    slot: int
    work: dist.Work | None

    def wait(self) -> tuple[Tensor, Tensor]:
        """Wait, and return (all shards' statistics [C, N, M], all support logits [C, J])."""
        if self.work is not None:
            self.work.wait()
        width = self.ranks * self.slot
        return self.packed_CX[:, :width].unflatten(1, (self.ranks, self.slot)), self.packed_CX[:, width:]


def start_exchange(stats_CM: Tensor, owned_CJ: Tensor, group: Group, *, overlap: bool = False) -> Exchange:
    """Send this shard's statistics and the support logits that it owns (0 for the others). One SUM all-reduce.

    Every rank of the group must call this for every chunk, in the same order.
    """
    # Row layout: N slots of M statistics, one per rank, then J support logits. All zeros but this rank's numbers.
    ranks, slot = group.size(), stats_CM.shape[1]
    packed_CX = stats_CM.new_zeros(stats_CM.shape[0], slot * ranks + owned_CJ.shape[1])
    packed_CX[:, slot * group.rank() : slot * (group.rank() + 1)] = stats_CM
    packed_CX[:, slot * ranks :] = owned_CJ
    return Exchange(packed_CX, ranks, slot, all_reduce(packed_CX, group, overlap=overlap))


def merge_stats(stats_CN3: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and entropy [C] from (m, s, u) of all N shards: m = max z, s = sum e^(z-m), u = sum e^(z-m) (z-m).

    u is relative to m so that the entropy is not a difference of large numbers.
    """
    # With M = max m_n and d_n = m_n - M, moving shard n from m_n to M gives
    #     s = sum_n e^d_n s_n   and   u = sum_n e^d_n (u_n + d_n s_n).
    # Then logsumexp = M + log s. log p = z - M - log s, so the entropy -sum p log p is log s - u / s.
    # A shard without real columns has m_n = LEAST_LOGIT: e^d_n is 0, and d_n is finite, so its terms are 0.
    max_CN, sum_CN, moment_CN = stats_CN3.unbind(dim=2)
    max_C1 = max_CN.amax(dim=1, keepdim=True)
    shift_CN = max_CN - max_C1
    weight_CN = shift_CN.exp()
    sum_C = (weight_CN * sum_CN).sum(dim=1)
    moment_C = (weight_CN * (moment_CN + shift_CN * sum_CN)).sum(dim=1)
    log_sum_C = sum_C.log()
    return max_C1[:, 0] + log_sum_C, log_sum_C - moment_C / sum_C


def support_log_probs_of(value_CJ: Tensor, lse_C: Tensor, ids_CJ: Tensor, shard: VocabShard) -> Tensor:
    """Logits to log-probs. 0 in unused slots, NaN for ids that no shard owns."""
    logp_CJ = (value_CJ - lse_C[:, None]).masked_fill(ids_CJ == NO_ENTRY, 0.0)
    return logp_CJ.masked_fill((ids_CJ < NO_ENTRY) | (ids_CJ >= shard.vocab_size), torch.nan)
