"""Runs a measuring function in fresh processes, one a rank, that talk over gloo on the loopback device."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank with one thread each; results by rank. Raises RuntimeError if one fails."""
    context = multiprocessing.get_context("spawn")
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_work, args=(pipes[rank][1], f"{folder}/store", rank, world_size, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()  # so that a rank that dies ends the wait for it
        try:
            return [_answer(reader, rank) for rank, (reader, _) in enumerate(pipes)]
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _answer(reader: Connection, rank: int) -> Any:
    try:
        failure, result = reader.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} ended without an answer (out of memory?)") from None
    if failure is not None:
        raise RuntimeError(f"rank {rank} failed:\n{failure}")
    return result


def _work(
    writer: Connection, store: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        writer.send((None, function(*args)))
        dist.barrier()
    except Exception:
        writer.send((traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
