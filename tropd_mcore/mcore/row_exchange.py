"""Numbers of the same tokens in two packings of one replica: from the rows of the one to the rows of the other.

For a teacher that reads other contexts than the student, so that its packs are other packs. Not between data ranks.
Invariants: in each packing a token is a row of one context rank; what arrives is what was sent, bit for bit.

Shapes: S samples, R rows that this context rank has in the packing that sends, Q in the one that receives, X any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.types import MicroBatch


def row_samples(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return the sample of each row of the micro-batches in order, int64 [R]."""
    return torch.cat([micro_batch.sample_index_T for micro_batch in micro_batches])


def row_keys(micro_batches: Sequence[MicroBatch], first_S: Tensor) -> Tensor:
    """Return first_S[sample] + token_index of each row, int64 [R]."""
    token_R = torch.cat([micro_batch.token_index_T for micro_batch in micro_batches])
    return first_S[row_samples(micro_batches)] + token_R


@dataclass(frozen=True)
class RowExchange:
    """The way of columns between rows that have the same place."""

    sent_R: Tensor
    """int64 [R], the place of each row that is sent: in [0, places), each once over all ranks of `group`"""
    wanted_Q: Tensor
    """int64 [Q], the places that this rank wants"""
    places: int
    group: ProcessGroup
    """The context ranks of the replica; each calls the same methods in the same order."""

    def send(self, column_RX: Tensor) -> Tensor:
        """Return the column at the wanted places, [Q, X]; 0 where nobody sent one.

        One all-reduce of [places, X] over the group where it has several ranks: all but one add zeros, so it is exact.
        """
        if column_RX.dtype is torch.bool:  # which collectives do not add
            return self.send(column_RX.to(torch.uint8)).bool()
        table = column_RX.new_zeros(self.places, *column_RX.shape[1:])
        table[self.sent_R] = column_RX
        if self.group.size() > 1:
            dist.all_reduce(table, group=self.group)
        return table[self.wanted_Q]

    def reversed(self) -> RowExchange:
        """The same way in the other direction."""
        return RowExchange(self.wanted_Q, self.sent_R, self.places, self.group)
