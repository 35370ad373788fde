"""What the ranks of tests/dist/test_gather.py do: gather values of very different sizes, and count what is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist

from tropd_mcore.mcore.collective import RECORD_BYTES, gather_on_rank_zero, meetings
from tropd_mcore.records.token_table import merge_columns

ROWS = {1: 37, 3: 50_000}
"""Rank -> rows of its table. The others have none."""


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Bytes of each message that this rank sends or receives, by operation. Object collectives are not expected."""
    sizes: dict[str, list[int]] = {"gather": [], "send": [], "recv": []}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            sizes[name].append(tensor.numel() * tensor.element_size())
            return call(tensor, *args, **kwargs)

        return counted_call

    with (
        mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in sizes}),
        mock.patch.object(dist, "gather_object", side_effect=AssertionError("it pads to the largest")),
    ):
        yield sizes


def columns_of(rank: int) -> dict[str, np.ndarray]:
    """The columns of a rank with rows, as int32 and float32; {} for one without."""
    rows = ROWS.get(rank, 0)
    if not rows:
        return {}
    order = np.random.default_rng(rank).permutation(rows).astype(np.int32)
    return {
        "sample_index": np.full(rows, rank, np.int32),
        "token_index": order,
        "epoch": np.zeros(rows, np.int32),
        "loss": order.astype(np.float32) + rank,
    }


def gather_uneven() -> tuple[dict[str, list[int]], int, Any]:
    """Gather the columns of all ranks. Returns the bytes, the number of meetings, and the merged table on rank 0."""
    rank, before = dist.get_rank(), meetings.count
    with counted() as sizes:
        parts = gather_on_rank_zero(columns_of(rank), dist.group.WORLD)  # type: ignore[arg-type]
    return sizes, meetings.count - before, dict(merge_columns(parts).columns) if rank == 0 else parts


def gather_around_the_limit() -> Any:
    """Gather texts whose pickles are just below, at and above what a record holds, and a None."""
    values = [None, "x" * (RECORD_BYTES - 30), "x" * (RECORD_BYTES - 19), "x" * RECORD_BYTES]
    return gather_on_rank_zero(values[dist.get_rank()], dist.group.WORLD)  # type: ignore[arg-type]
