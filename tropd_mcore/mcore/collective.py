"""Exchanges host objects between the ranks of a job, and raises the error of one rank on all ranks.

Objects are pickled and sent over the job's own control group (gloo), never over any other network socket. Invariants:
every function here is called by all ranks of its group, in the same order. Each rank counts the collectives of the
control group that it has entered, so `train.watch` can name a rank that the others wait for.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from tropd_mcore import stopping
from tropd_mcore.errors import StopRequested, TropdError

Value = TypeVar("Value")

RECORD_BYTES = 128
"""Bytes that each rank contributes to a gathering: the size of its value, and the value itself if it fits."""
_SIZE_BYTES = 8


class Meetings:
    """Counts the collectives of the control group that this process has entered, and since when it waits in one."""

    def __init__(self) -> None:
        self.count = 0
        self.since: float | None = None
        """`time.monotonic` at the entry of the current collective; None outside of one."""

    @contextmanager
    def attend(self) -> Iterator[None]:
        self.count += 1
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None


meetings = Meetings()
"""The counter of this process."""


@contextmanager
def raise_on_all_ranks(control: dist.ProcessGroup) -> Iterator[None]:
    """Run a block on each rank; if it fails on any rank, raise on every rank. The block must not use collectives.

    Cost: one object all-gather of a few bytes per rank.
    """
    error: TropdError | None = None
    try:
        yield
    except TropdError as met:
        error = met
    raise_the_first(error, control)


def raise_the_first(error: TropdError | None, control: dist.ProcessGroup) -> None:
    """Raise on every rank if any rank has an error: a failed rank raises its own, the others that of the lowest rank.

    A request to stop is raised only if no rank has another error. All ranks then react to it in the same way.
    """
    met = [found for found in _of_every_rank(error, control) if found is not None]
    failures = [found for found in met if not isinstance(found, StopRequested)]
    if failures:
        raise error if error is not None and not isinstance(error, StopRequested) else failures[0]
    if met:
        raise met[0]


def stop_together(control: dist.ProcessGroup) -> None:
    """If any rank was asked to stop, raise StopRequested on every rank. Collective."""
    with raise_on_all_ranks(control):
        stopping.check()


def asked_to_stop(control: dist.ProcessGroup) -> str | None:
    """Return on every rank why the job should stop, also while stops are held back; None if no rank was asked.

    Collective.
    """
    reasons = _of_every_rank(stopping.requested(), control)
    return next((reason for reason in reasons if reason is not None), None)


def on_rank_zero(function: Callable[[], Value], control: dist.ProcessGroup) -> Value:
    """Run `function` on rank 0 only; returns its value, or raises its error, on every rank."""
    box: list[Value | None] = [None]
    with raise_on_all_ranks(control):
        if dist.get_rank(control) == 0:
            box[0] = function()
    with meetings.attend():
        dist.broadcast_object_list(box, src=dist.get_global_rank(control, 0), group=control)
    return box[0]  # type: ignore[return-value]


def union(values: set[Value], group: dist.ProcessGroup) -> set[Value]:
    """Return the union of the sets of all ranks of `group`. Collective over the group."""
    if dist.get_world_size(group) == 1:
        return values
    parts: list[set[Value]] = [set()] * dist.get_world_size(group)
    dist.all_gather_object(parts, values, group=group)
    return set().union(*parts)


def gather_on_rank_zero(value: Value, control: dist.ProcessGroup) -> list[Value]:
    """Return every rank's value in rank order on rank 0, and an empty list on the other ranks.

    Cost: RECORD_BYTES per rank. A value that does not fit in there is sent on its own, in its exact size. Rank 0
    receives these one after the other, so it holds one of them in pickled form at a time. `gather_object` would pad
    every rank to the largest: most ranks have no rows of a token table.
    """
    rank, world = dist.get_rank(control), dist.get_world_size(control)
    zero = dist.get_global_rank(control, 0)
    pickled = _pickled(value) if rank else torch.empty(0, dtype=torch.uint8)
    record = torch.zeros(RECORD_BYTES, dtype=torch.uint8)
    record[:_SIZE_BYTES].view(torch.int64)[0] = len(pickled)
    if len(pickled) <= RECORD_BYTES - _SIZE_BYTES:
        record[_SIZE_BYTES : _SIZE_BYTES + len(pickled)] = pickled
    with meetings.attend():
        records = [torch.empty_like(record) for _ in range(world)] if rank == 0 else None
        dist.gather(record, records, dst=zero, group=control)
        if records is None:
            if len(pickled) > RECORD_BYTES - _SIZE_BYTES:
                dist.send(pickled, dst=zero, group=control)
            return []
        values = [value]
        for other, found in enumerate(records[1:], start=1):
            size = int(found[:_SIZE_BYTES].view(torch.int64)[0])
            content = found[_SIZE_BYTES : _SIZE_BYTES + size]
            if size > RECORD_BYTES - _SIZE_BYTES:
                content = torch.empty(size, dtype=torch.uint8)
                dist.recv(content, src=dist.get_global_rank(control, other), group=control)
            values.append(pickle.loads(content.numpy().data))
    return values


def _pickled(value: object) -> torch.Tensor:
    """The pickle of a value as bytes."""
    buffer = io.BytesIO()
    pickle.dump(value, buffer, protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def all_agree(flag: bool, control: dist.ProcessGroup) -> bool:
    """Return True if `flag` is true on every rank."""
    return all(_of_every_rank(flag, control))


def _of_every_rank(value: Value, control: dist.ProcessGroup) -> list[Value]:
    """Return every rank's value in rank order, on every rank."""
    values = [value] * dist.get_world_size(control)
    with meetings.attend():
        dist.all_gather_object(values, value, group=control)
    return values
