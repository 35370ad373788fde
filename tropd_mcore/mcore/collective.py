"""Host objects between the ranks of a job, and errors that all ranks meet together.

Objects travel pickled over the job's own control group (gloo), never over a network socket of another origin.
Invariant: every function here is called by all ranks of its group, in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from tropd_mcore.errors import TropdError

Value = TypeVar("Value")


@contextmanager
def shared_fate(control: dist.ProcessGroup) -> Iterator[None]:
    """Run a block without collectives on each rank; an error that any rank met is raised on every rank.

    Cost: one object all-gather of a few bytes a rank.
    """
    error: TropdError | None = None
    try:
        yield
    except TropdError as met:
        error = met
    raise_together(error, control)


def raise_together(error: TropdError | None, control: dist.ProcessGroup) -> None:
    """Raise on every rank the error that the lowest rank met, if any did; a rank that met one raises its own."""
    errors: list[TropdError | None] = [None] * dist.get_world_size(control)
    dist.all_gather_object(errors, error, group=control)
    for met_somewhere in errors:
        if met_somewhere is not None:
            raise error or met_somewhere


def on_rank_zero(function: Callable[[], Value], control: dist.ProcessGroup) -> Value:
    """The value of `function` run on rank 0 alone, on every rank; its error likewise."""
    box: list[Value | None] = [None]
    with shared_fate(control):
        if dist.get_rank(control) == 0:
            box[0] = function()
    dist.broadcast_object_list(box, src=dist.get_global_rank(control, 0), group=control)
    return box[0]  # type: ignore[return-value]


def gather_on_rank_zero(value: Value, control: dist.ProcessGroup) -> list[Value]:
    """Every rank's value in rank order on rank 0, an empty list elsewhere."""
    is_zero = dist.get_rank(control) == 0
    values: list[Value] | None = [value] * dist.get_world_size(control) if is_zero else None
    dist.gather_object(value, values, dst=dist.get_global_rank(control, 0), group=control)
    return values if values is not None else []


def all_agree(flag: bool, control: dist.ProcessGroup) -> bool:
    """True where every rank says so."""
    flags: list[bool] = [False] * dist.get_world_size(control)
    dist.all_gather_object(flags, flag, group=control)
    return all(flags)
