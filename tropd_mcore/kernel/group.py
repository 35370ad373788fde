"""The ranks that share a vocabulary: a process group, or one process without torch.distributed.

This module does not make the groups of a training job (`mcore.parallel`). Invariant: a group of one rank does not
communicate.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class OneRank:
    """Takes the place of a process group if one process has the whole vocabulary."""

    def size(self) -> int:
        """1."""
        return 1

    def rank(self) -> int:
        """0."""
        return 0


Group = dist.ProcessGroup | OneRank


def all_reduce(tensor: Tensor, group: Group, *, overlap: bool = False) -> dist.Work | None:
    """Sum over the ranks, in place. With `overlap`, the sum is only started, and the work to wait for is returned."""
    if isinstance(group, OneRank) or group.size() == 1:
        return None
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=overlap)
    # Without overlap there is nothing to wait for. PyTorch 2.11 under torch.compile then returns the tensor, not None.
    return work if overlap else None


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Return `tensor` of every rank, [N, ...]."""
    if isinstance(group, OneRank) or group.size() == 1:
        return tensor[None]
    gathered = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather(list(gathered.unbind(0)), tensor, group=group)
    return gathered
