"""Moves per-token values between two packings of the same tokens within one replica.

It is needed if the teacher reads a different context than the student, because its samples then have other lengths and
other packs. It works between the context ranks of one replica, not between data ranks. Invariants: in each packing a
token is a row of exactly one context rank. Values arrive bit for bit as they were sent.

Both packings give each token the same key (`row_keys`). A rank sends its values by key, and each rank picks the keys of
its rows in the other packing.

Shapes: S samples, R rows of this context rank in the sending packing, Q in the receiving packing, X any.
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
    """Return the key of each row, first_S[sample] + token_index, int64 [R]."""
    token_R = torch.cat([micro_batch.token_index_T for micro_batch in micro_batches])
    return first_S[row_samples(micro_batches)] + token_R


@dataclass(frozen=True)
class RowExchange:
    """Sends columns from the rows of one packing to the rows with the same key in the other."""

    sent_R: Tensor
    """int64 [R], key of each row that this rank sends: in [0, places), each key once over all ranks of `group`"""
    wanted_Q: Tensor
    """int64 [Q], keys of the rows that this rank receives"""
    places: int
    """Number of keys, the same on all ranks of `group`."""
    group: ProcessGroup
    """Context ranks of the replica. All of them call the same methods in the same order."""

    def send(self, column_RX: Tensor) -> Tensor:
        """Return the values of the wanted keys, [Q, X]; 0 for a key that no rank sent.

        If the group has several ranks, this costs one all-reduce of [places, X], which is also the memory of the table.
        Only one rank adds a value per key and the others add zeros, so the sum is exact.
        """
        if column_RX.dtype is torch.bool:  # collectives cannot sum bool
            return self.send(column_RX.to(torch.uint8)).bool()
        # Phase 1: scatter this rank's rows into a table indexed by key.
        table = column_RX.new_zeros(self.places, *column_RX.shape[1:])
        table[self.sent_R] = column_RX
        # Phase 2: share the table. Every rank of the group must get here, also one without rows.
        if self.group.size() > 1:
            dist.all_reduce(table, group=self.group)
        # Phase 3: gather the rows of this rank in the other packing.
        return table[self.wanted_Q]

    def reversed(self) -> RowExchange:
        """Return the exchange in the other direction."""
        return RowExchange(self.wanted_Q, self.sent_R, self.places, self.group)
