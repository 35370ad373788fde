"""What each rank of the check of collectives runs: sums whose results are known, and the speed of a large one.

Started by torchrun: `python -m tropd_mcore.selftest.collectives cpu|cuda`. Rank 0 prints a line of JSON, and so
does a rank that fails.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

LARGE = 2**24
"""Float32 numbers of the timed sum: 64 MiB."""
REPEATS = 5
LIMIT = timedelta(seconds=60)
RESULT = "result: "
"""Begins the line with the result of a rank: figures from rank 0, or the error of any rank."""


class WrongSum(Exception):
    """A collective returned other numbers than it should."""


def main(device_kind: str) -> None:
    """Check broadcast, all-reduce and all-gather on all ranks, then time a large all-reduce."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_kind, int(os.environ["LOCAL_RANK"])) if device_kind == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LIMIT)
    ones = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(ones)
    _expect("all_reduce", ones, world * (world + 1) / 2)
    told = torch.full((1000,), float(rank), device=device)
    dist.broadcast(told, src=world - 1)
    _expect("broadcast", told, world - 1)
    parts = [torch.empty(10, device=device) for _ in range(world)]
    dist.all_gather(parts, torch.full((10,), float(rank), device=device))
    for index, part in enumerate(parts):
        _expect("all_gather", part, index)
    seconds = _time(torch.ones(LARGE, device=device), device)
    moved = 2 * (world - 1) / world * 4 * LARGE  # bytes that each rank sends in a ring
    if rank == 0:
        _tell({"ranks": world, "backend": dist.get_backend(), "gigabytes_per_second": moved / seconds / 1e9})
    dist.destroy_process_group()


def _tell(result: dict[str, float | str]) -> None:
    sys.stdout.write(f"{RESULT}{json.dumps(result)}\n")  # at once, so that ranks do not mix their lines
    sys.stdout.flush()


def _expect(name: str, found: torch.Tensor, value: float) -> None:
    if not bool((found == value).all()):
        raise WrongSum(f"{name} over {dist.get_world_size()} ranks gave {found.flatten()[0].item()}, not {value}")


def _time(numbers: torch.Tensor, device: torch.device) -> float:
    """Return the median seconds of an all-reduce, the first one not counted."""
    taken = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[REPEATS // 2]


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:  # torchrun prints its own account after it, without the reason
        _tell({"error": f"{type(error).__name__}: {error}"})
        raise
