"""Run a test function on several ranks: real processes, real gloo collectives, on one machine.

For tests of distributed code. Not for launching training (that is `torchrun`). The workers are spawned once and live
until the test session ends, so that each call costs a rendezvous and not an import of torch. Every call gets a fresh
process group; a failure or a hang on one rank ends the call on all of them.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEFAULT_TIMEOUT_S = 300.0
"""Longest call. It is there to end a hang, and many times what a call takes on an idle machine."""
GRACE_S = 5.0
"""Time the other ranks have to end after the first failure, before they are killed."""
STACK_LIMIT_S = 30.0
"""Longest wait for the stacks of ranks that hang."""
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "1"}


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return the results by rank.

    `function` is at the top level of an importable module; arguments and results travel by pickle. Inside,
    `torch.distributed` is initialised with gloo. An exception on any rank is raised here with its rank and traceback as
    a note; a call longer than `timeout_s` raises TimeoutError with the stack of each rank that hangs.
    """
    workers = _workers(world_size)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = pickle.dumps((function, args))
        for rank, worker in enumerate(workers):
            worker.connection.send((call, rank, world_size, f"{folder}/store", timeout_s))
        answers = _collect(workers, timeout_s)
    return [answers[rank] for rank in range(world_size)]


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    stack_file: Path


_POOL: list[_Worker] = []


def _workers(count: int) -> list[_Worker]:
    """The first `count` workers of the pool, which grows on demand."""
    while len(_POOL) < count:
        _POOL.append(_start_worker())
    return _POOL[:count]


def _start_worker() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    handle, stack_file = tempfile.mkstemp(prefix="rank-stack-")
    os.close(handle)
    process = context.Process(target=_serve, args=(theirs, stack_file), daemon=True)
    saved = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)  # read by OpenMP, gloo and Triton when the child loads them
    try:
        process.start()
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    return _Worker(process, ours, Path(stack_file))


def _collect(workers: list[_Worker], timeout_s: float) -> dict[int, Any]:
    """Wait for every rank's answer; the earliest failure is raised, and what still hangs is killed."""
    deadline = time.monotonic() + timeout_s
    answers: dict[int, Any] = {}
    failures: list[_Failure] = []
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = sorted(waiting.values())
            stacks = _kill([workers[rank] for rank in hung])
            if not failures:
                raise TimeoutError(f"ranks {hung} of {len(workers)} gave no answer in {timeout_s} s\n{stacks}")
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            answer = _receive(workers[rank], rank)
            if isinstance(answer, _Failure):
                failures.append(answer)
                deadline = min(deadline, time.monotonic() + GRACE_S)
            else:
                answers[rank] = answer
    if failures:
        raise min(failures, key=lambda failure: failure.at_s).error
    return answers


@dataclass(frozen=True)
class _Failure:
    """What a rank raised, and when: the earliest is the cause, the others are often its consequence."""

    error: BaseException
    at_s: float


def _receive(worker: _Worker, rank: int) -> Any:
    try:
        payload = worker.connection.recv_bytes()
    except EOFError:
        worker.process.join(STACK_LIMIT_S)  # it has closed its pipe, and now it ends
        _kill([worker])
        return _Failure(RuntimeError(f"rank {rank} died with exit code {worker.process.exitcode}"), 0.0)
    return pickle.loads(payload)


def _kill(workers: list[_Worker]) -> str:
    """Take the stacks of these workers, kill them and drop them from the pool; returns the stacks.

    A worker ends by the signal that makes it write its stacks, as soon as they are written (`_serve`).
    """
    for worker in workers:
        if worker.process.is_alive() and worker.process.pid is not None:
            os.kill(worker.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + STACK_LIMIT_S
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    stacks = [worker.stack_file.read_text() for worker in workers]
    for worker in workers:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        worker.stack_file.unlink(missing_ok=True)
        _POOL.remove(worker)
    return "\n".join(stacks)


@atexit.register
def _end_pool() -> None:
    """Closing the pipe ends a worker that waits; one that does not end is killed by its pid."""
    for worker in _POOL:
        worker.connection.close()
    for worker in _POOL:
        worker.process.join(GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.stack_file.unlink(missing_ok=True)
    _POOL.clear()


def _serve(connection: Connection, stack_file: str) -> None:
    """The life of one worker: answer calls until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the test session, which ends us
    torch.set_num_threads(1)
    with open(stack_file, "w", encoding="utf-8") as stacks:
        # chain: what follows the dump is the default action of the signal, which ends the process
        faulthandler.register(signal.SIGUSR1, file=stacks, chain=True)
        while True:
            try:
                call, rank, world_size, store_path, timeout_s = connection.recv()
            except EOFError:
                return
            connection.send_bytes(_answer(call, rank, world_size, store_path, timeout_s))


def _answer(call: bytes, rank: int, world_size: int, store_path: str, timeout_s: float) -> bytes:
    """The pickled result or `_Failure`; whatever the function raises belongs to the test."""
    try:
        function, args = pickle.loads(call)
        store = dist.FileStore(store_path, world_size)
        # Longer than the parent waits: a hang is reported there, with the stacks of all ranks that hang.
        limit = timedelta(seconds=timeout_s + STACK_LIMIT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        dist.barrier()  # all are connected before any can fail
        answer = pickle.dumps(function(*args))
        if dist.is_initialized():
            dist.barrier()  # all have finished before any disconnects
    except BaseException as error:  # the border between processes: nothing may be lost here
        answer = pickle.dumps(_Failure(_portable(error, rank, world_size), time.monotonic()))
    if dist.is_initialized():
        dist.destroy_process_group()
    return answer


def _portable(error: BaseException, rank: int, world_size: int) -> BaseException:
    """The same exception with a note, or a RuntimeError with its text where it cannot be pickled."""
    text = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
    try:
        portable = pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class may fail in any way when it is rebuilt
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(text)
    return portable
