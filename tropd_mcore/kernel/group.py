"""The ranks that share a vocabulary: a process group, or one process without torch.distributed.

Not for groups of a training job (`mcore.parallel`). Invariant: a group of one rank communicates nothing.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class OneRank:
    """Stands for a process group where one process has the whole vocabulary."""

    def size(self) -> int:
        """1."""
        return 1

    def rank(self) -> int:
        """0."""
        return 0


Group = dist.ProcessGroup | OneRank


def all_reduce(tensor: Tensor, group: Group, *, overlap: bool = False) -> dist.Work | None:
    """Sum over the ranks, in place. With `overlap`, returns what to wait for; else it is done."""
    if isinstance(group, OneRank) or group.size() == 1:
        return None
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=overlap)
    # without overlap it is done; PyTorch 2.11 under torch.compile then returns the tensor where others return None
    return work if overlap else None


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """[N, ...]: `tensor` of every rank."""
    if isinstance(group, OneRank) or group.size() == 1:
        return tensor[None]
    gathered = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather(list(gathered.unbind(0)), tensor, group=group)
    return gathered
