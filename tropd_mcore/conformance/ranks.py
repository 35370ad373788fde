"""Processes on this machine that act as the ranks of a job: one thread each, gloo over the loopback device.

`Pool` gives every call a new process group. Tests share one pool; a measurement has its own (`on_fresh_ranks`). `Ranks`
keeps one group for all calls, for the conformance matrix. Training is launched by `torchrun` instead. Invariants: a
call ends within its limit; a rank that hangs writes its stacks and is killed by its pid; no process outlives its pool.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 300.0
"""Default limit of a call. It is there to end a hang."""
MEASUREMENT_TIMEOUT_S = 86400.0
START_TIMEOUT_S = 180.0
"""Limit for the ranks of a kept group to start and to connect"""
GRACE_S = 5.0
"""Limit for the other ranks to answer after the first failure, and for all to end when the pool is closed"""
STACKS_S = 30.0
"""Longest wait for the stacks of ranks that hang"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
"""Environment variables that every rank has before any import"""


class RanksLost(Exception):
    """The ranks did not all answer in the same way, and have been ended. Tracebacks and stacks are a note."""


@dataclass(frozen=True)
class Failure:
    """Why a rank has no result, in a form that every process can read."""

    kind: str
    """name of the exception's class"""
    summary: str
    detail: str
    """rank and traceback; the stacks of ranks that hung or crashed"""
    pickled: bytes
    """the exception; empty if it cannot be pickled"""
    at_s: float
    """time of the failure: the earliest is the cause, the others are often its consequence"""
    gone: bool = False
    """the rank died or hung without raising an exception"""

    def exception(self) -> BaseException:
        """Return the exception, or a RuntimeError with its text if it cannot be rebuilt. The detail is a note."""
        try:
            error: BaseException = pickle.loads(self.pickled)
        except Exception:  # an exception class may fail in any way when it is rebuilt
            error = RuntimeError(self.summary)
        error.add_note(self.detail)
        return error


@dataclass(frozen=True)
class _Rank:
    process: SpawnProcess
    connection: Connection


class Pool:
    """Processes that are started when a call needs them and then kept. `environment` is added to ENVIRONMENT.

    With `keeps_group`, all calls have the same number of ranks.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *, keeps_group: bool = False) -> None:
        self._environment = {**ENVIRONMENT, **(environment or {})}
        self._keeps_group = keeps_group
        self._ranks: list[_Rank] = []
        self._folder = ""  # of stacks and stores; made with the first rank
        self._groups = count()

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call `function(*args)` on `world_size` ranks and return the results by rank.

        `function` must be at the top level of an importable module; arguments and results are pickled. The earliest
        exception of any rank is raised here with its rank and traceback as a note. Raises RuntimeError if a rank dies,
        and TimeoutError, with the stacks of the ranks that hang as a note, after `timeout_s`.
        """
        answers = self.ask(function, world_size, args, timeout_s)
        if failures := failures_of(answers):
            raise failures[0].exception()
        return answers

    def ask(
        self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout_s: float
    ) -> list[Any | Failure]:
        """Call `function(*args)` on `world_size` ranks and return, by rank, the result or the failure."""
        while len(self._ranks) < world_size:
            self._start()
        ranks = self._ranks[:world_size]
        call = pickle.dumps((function, args))
        store = f"{self._folder}/store-{0 if self._keeps_group else next(self._groups)}"
        for number, rank in enumerate(ranks):
            with contextlib.suppress(OSError):  # it has died, which is found below
                rank.connection.send((call, number, world_size, store, self._keeps_group, timeout_s))
        answers: dict[int, Any] = {}
        waiting: dict[Any, int] = {rank.connection: number for number, rank in enumerate(ranks)}
        deadline = time.monotonic() + timeout_s
        try:
            while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
                for connection in ready:
                    number = waiting.pop(connection)
                    answers[number] = self._receive(ranks[number], number)
                    if isinstance(answers[number], Failure):
                        deadline = min(deadline, time.monotonic() + GRACE_S)
        finally:  # also if the caller is interrupted: a late answer would be taken for that of the next call
            stacks = self._end([ranks[number] for number in waiting.values()])
        silence = f"ranks {sorted(waiting.values())} of {world_size} gave no answer in {timeout_s:g} s"
        hung = Failure("TimeoutError", silence, stacks, pickle.dumps(TimeoutError(silence)), math.inf, gone=True)
        return [answers.get(number, hung) for number in range(world_size)]

    def close(self) -> None:
        """End all ranks: idle ones by closing their pipe, the others by their pid."""
        for rank in self._ranks:
            rank.connection.close()
        deadline = time.monotonic() + GRACE_S
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self._end(list(self._ranks))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._folder = self._folder or tempfile.mkdtemp(prefix="ranks-")
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._folder), daemon=True)
        saved = {name: os.environ[name] for name in self._environment if name in os.environ}
        os.environ.update(self._environment)  # OpenMP, gloo and Triton read it when the child loads them
        try:
            process.start()
        finally:
            for name in self._environment:
                del os.environ[name]
            os.environ.update(saved)
        theirs.close()
        self._ranks.append(_Rank(process, ours))

    def _receive(self, rank: _Rank, number: int) -> Any | Failure:
        try:
            payload = rank.connection.recv_bytes()
        except (EOFError, OSError):
            rank.process.join(STACKS_S)  # it has closed its pipe and is ending
            death = f"rank {number} died with exit code {rank.process.exitcode}"
            return Failure("RuntimeError", death, self._end([rank]), b"", 0.0, gone=True)
        return pickle.loads(payload)

    def _end(self, ranks: list[_Rank]) -> str:
        """End these ranks and return the stacks of those that hung or crashed.

        The signal that makes a rank write its stacks ends it as soon as they are written (`_serve`).
        """
        for rank in ranks:
            if rank.process.is_alive() and rank.process.pid is not None:
                os.kill(rank.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + STACKS_S
        stacks = []
        for rank in ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
            rank.process.kill()
            rank.process.join()
            rank.connection.close()
            self._ranks.remove(rank)
            file = _stack_file(self._folder, rank.process.pid)
            stacks.append(file.read_text(encoding="utf-8") if file.exists() else "")
        return "\n".join(stacks)


class Ranks:
    """`world_size` processes that keep their process group, and everything built on it, from call to call."""

    def __init__(self, world_size: int, environment: Mapping[str, str] | None = None) -> None:
        self._world_size = world_size
        self._pool = Pool({"PYTHONWARNINGS": "ignore", **(environment or {})}, keeps_group=True)
        self.call(dist.barrier, timeout_s=START_TIMEOUT_S)

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any] | Failure:
        """Call `function(*args)` on every rank and return the results by rank, or the failure that all ranks had.

        Raises RanksLost if a rank does not answer in `timeout_s`, dies or fails alone. The others may then wait for it
        in a collective, so all are ended.
        """
        answers = self._pool.ask(function, self._world_size, args, timeout_s)
        failures = failures_of(answers)
        if not failures:
            return answers
        if len(failures) == self._world_size and not any(failure.gone for failure in failures):
            return failures[0]
        self.close()
        cause = failures[0]
        rank = [answer is cause for answer in answers].index(True)
        lost = RanksLost(cause.summary if cause.gone else f"only rank {rank} failed: {cause.summary}")
        lost.add_note("\n".join(dict.fromkeys(failure.detail for failure in failures)))
        raise lost

    def close(self) -> None:
        """End all processes."""
        self._pool.close()


def on_fresh_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`Pool.run` in processes that end with the call, so that a measurement does not inherit a memory peak."""
    with contextlib.closing(Pool()) as pool:
        return pool.run(function, world_size, *args, timeout_s=MEASUREMENT_TIMEOUT_S)


def failures_of(answers: list[Any | Failure]) -> list[Failure]:
    """The failures among the answers, the earliest first."""
    return sorted((answer for answer in answers if isinstance(answer, Failure)), key=lambda failure: failure.at_s)


def _stack_file(folder: str, pid: int | None) -> Path:
    return Path(folder, f"stacks-{pid}")


def _serve(connection: Connection, folder: str) -> None:
    """The main loop of a rank: answer calls until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us
    torch.set_num_threads(1)
    with open(_stack_file(folder, os.getpid()), "w", encoding="utf-8") as stacks:
        faulthandler.enable(stacks)  # for a crash
        # chain: after the dump comes the default action of the signal, which ends the process
        faulthandler.register(signal.SIGUSR1, file=stacks, chain=True)
        with contextlib.suppress(EOFError, OSError):
            while True:
                connection.send_bytes(_answer(*connection.recv()))
    if dist.is_initialized():
        dist.destroy_process_group()


def _answer(call: bytes, rank: int, world_size: int, store_path: str, keeps_group: bool, timeout_s: float) -> bytes:
    """The pickled result or `Failure`. Any exception of the function is sent to the caller."""
    try:
        function, args = pickle.loads(call)
        if not dist.is_initialized():
            # Longer than the parent waits, so that the parent reports a hang, with the stacks of all ranks that hang.
            limit = timedelta(seconds=timeout_s + STACKS_S)
            store = dist.FileStore(store_path, world_size)
            store.set_timeout(limit)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
            dist.barrier()  # all are connected before any can fail
        answer = pickle.dumps(function(*args))
        if not keeps_group and dist.is_initialized():
            dist.barrier()  # all have finished before any disconnects
    except BaseException as error:  # the border between processes: no exception may be lost here
        answer = pickle.dumps(_failure(error, rank, world_size))
    if not keeps_group and dist.is_initialized():
        dist.destroy_process_group()
    return answer


def _failure(error: BaseException, rank: int, world_size: int) -> Failure:
    kind, pickled = type(error).__name__, b""
    with contextlib.suppress(Exception):  # an exception may carry anything
        pickled = pickle.dumps(error)
    detail = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
    return Failure(kind, f"{kind}: {error}", detail, pickled, time.monotonic())
