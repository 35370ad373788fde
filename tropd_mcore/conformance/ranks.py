"""Processes that stand for the ranks of a job: spawned once for all experiments of one world size, ended cleanly.

gloo over the loopback device, on a port that the operating system chooses. Not for launching training (that is
`torchrun`). Invariants: a call ends within its limit; where a rank dies, hangs or fails alone, all of them are ended,
because the others may wait for it in a collective; no process outlives its set.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

START_LIMIT_S = 180.0
"""Time that all ranks have to start and to find each other"""
GRACE_S = 5.0
"""Time that the others have to answer after one rank has failed"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}


class RanksLost(Exception):
    """The ranks did not answer, or not all in the same way; the set is gone, and the text says why."""


@dataclass(frozen=True)
class Failure:
    """What a rank raised, as text."""

    kind: str
    """name of the exception's class"""
    summary: str
    detail: str
    """traceback"""


class Ranks:
    """`world_size` processes with a gloo group."""

    def __init__(self, world_size: int, environment: Mapping[str, str] | None = None) -> None:
        self._store = dist.TCPStore(
            "127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=START_LIMIT_S)
        )
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        with _environment({**ENVIRONMENT, **(environment or {})}):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, rank, world_size, self._store.port), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        self.call(_nothing, limit_s=START_LIMIT_S)

    def call(self, function: Callable[..., Any], *args: Any, limit_s: float) -> list[Any] | Failure:
        """Run `function(*args)` on every rank and return the results by rank, or the failure that all ranks had.

        Raises RanksLost where a rank does not answer in `limit_s`, dies, or fails alone.
        """
        answers: dict[int, Any] = {}
        try:
            for connection in self._connections:
                connection.send_bytes(pickle.dumps((function, args)))
        except OSError as error:
            raise self._lost(f"a rank is gone: {error}") from error
        waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + limit_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._lost(self._silence(sorted(waiting.values()), answers, limit_s))
            for answered in ready:
                rank = waiting.pop(answered)
                try:
                    answers[rank] = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, OSError) as error:
                    raise self._lost(f"rank {rank} died") from error
                if isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
        if failures and len(failures) < len(answers):
            raise self._lost(f"only rank {min(failures)} failed: {failures[min(failures)].summary}")
        return failures[0] if failures else [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        """End all processes: those that wait for a call by closing their pipe, the others by their pid."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _silence(self, silent: list[int], answers: dict[int, Any], limit_s: float) -> str:
        failed = [answer.summary for answer in answers.values() if isinstance(answer, Failure)]
        if failed:
            return f"ranks {silent} hang after another failed: {failed[0]}"
        return f"ranks {silent} of {len(self._processes)} gave no answer in {limit_s:g} s"

    def _lost(self, reason: str) -> RanksLost:
        self._kill()
        return RanksLost(reason)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Have these variables in our environment, from where a spawned process takes them before it imports anything."""
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    """The life of one rank: answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us
    torch.set_num_threads(1)
    limit = timedelta(seconds=START_LIMIT_S)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe, or is gone
        while True:
            function, args = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps(_answer(function, args)))
    dist.destroy_process_group()


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except Exception as error:  # the border between processes: the parent reports it
        kind = type(error).__name__
        return Failure(kind, f"{kind}: {error}", traceback.format_exc())


def _nothing() -> None:
    dist.barrier()
