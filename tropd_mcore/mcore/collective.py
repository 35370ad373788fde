"""Host objects between the ranks of a job, and errors that all ranks meet together.

Objects travel pickled over the job's own control group (gloo), never over a network socket of another origin.
Invariants: every function here is called by all ranks of its group, in the same order; each rank counts the meetings
that it came to, so that one which is waited for can be named (`train.watch`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from tropd_mcore import stopping
from tropd_mcore.errors import StopRequested, TropdError

Value = TypeVar("Value")


class Meetings:
    """How many collectives of the control group this process has come to, and since when it has waited in one."""

    def __init__(self) -> None:
        self.count = 0
        self.since: float | None = None
        """`time.monotonic` when it came; None while it is in none."""

    @contextmanager
    def attend(self) -> Iterator[None]:
        self.count += 1
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None


meetings = Meetings()
"""Of this process."""


@contextmanager
def raise_on_all_ranks(control: dist.ProcessGroup) -> Iterator[None]:
    """Run a block without collectives on each rank; an error that any rank met is raised on every rank.

    Cost: one object all-gather of a few bytes a rank.
    """
    error: TropdError | None = None
    try:
        yield
    except TropdError as met:
        error = met
    raise_the_first(error, control)


def raise_the_first(error: TropdError | None, control: dist.ProcessGroup) -> None:
    """Raise on every rank the error that the lowest rank met, if any did; a rank that met one raises its own.

    A request to stop is raised where no rank met anything else, so that all ranks do the same about it.
    """
    met = [found for found in _of_every_rank(error, control) if found is not None]
    failures = [found for found in met if not isinstance(found, StopRequested)]
    if failures:
        raise error if error is not None and not isinstance(error, StopRequested) else failures[0]
    if met:
        raise met[0]


def stop_together(control: dist.ProcessGroup) -> None:
    """Raise StopRequested on every rank where any of them was asked to stop. Collective."""
    with raise_on_all_ranks(control):
        stopping.check()


def asked_to_stop(control: dist.ProcessGroup) -> str | None:
    """Return on every rank why the job shall stop, held back or not; None where no rank was asked. Collective."""
    reasons = _of_every_rank(stopping.requested(), control)
    return next((reason for reason in reasons if reason is not None), None)


def on_rank_zero(function: Callable[[], Value], control: dist.ProcessGroup) -> Value:
    """The value of `function` run on rank 0 alone, on every rank; its error likewise."""
    box: list[Value | None] = [None]
    with raise_on_all_ranks(control):
        if dist.get_rank(control) == 0:
            box[0] = function()
    with meetings.attend():
        dist.broadcast_object_list(box, src=dist.get_global_rank(control, 0), group=control)
    return box[0]  # type: ignore[return-value]


def union(values: set[Value], group: dist.ProcessGroup) -> set[Value]:
    """Return what any rank of `group` has. Collective over the group."""
    if dist.get_world_size(group) == 1:
        return values
    parts: list[set[Value]] = [set()] * dist.get_world_size(group)
    dist.all_gather_object(parts, values, group=group)
    return set().union(*parts)


def gather_on_rank_zero(value: Value, control: dist.ProcessGroup) -> list[Value]:
    """Every rank's value in rank order on rank 0, an empty list elsewhere."""
    is_zero = dist.get_rank(control) == 0
    values: list[Value] | None = [value] * dist.get_world_size(control) if is_zero else None
    with meetings.attend():
        dist.gather_object(value, values, dst=dist.get_global_rank(control, 0), group=control)
    return values if values is not None else []


def all_agree(flag: bool, control: dist.ProcessGroup) -> bool:
    """True where every rank says so."""
    return all(_of_every_rank(flag, control))


def _of_every_rank(value: Value, control: dist.ProcessGroup) -> list[Value]:
    """Every rank's value in rank order, on every rank."""
    values = [value] * dist.get_world_size(control)
    with meetings.attend():
        dist.all_gather_object(values, value, group=control)
    return values
