"""Stand-ins for the servers of a fleet. They note their calls, and their ranks join real gloo groups as threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.glue.test_publisher import NotedServer, bits
from tropd_mcore.errors import ServerDied, ServerError, ServerHung


@dataclass
class FleetServer(NotedServer):
    """A server of a fleet. Its ranks join groups like SGLang's, and load what is broadcast there."""

    url: str = "http://127.0.0.1:1"
    joins: bool = True
    dies_in: str | None = None
    """Call in which it dies: its connections close and the call ends with ServerDied."""
    stops_in_broadcast: bool = False
    """Whether it stops in a broadcast: its connections stay open, and the call ends with ServerHung."""
    liar: bool = False
    """Whether it reports success for a broadcast in which it takes no part."""
    joined: list[tuple[int, int, str]] = field(default_factory=list)
    """(first rank, world size, backend) of each group."""
    groups: dict[str, list[Any]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def join_weight_group(
        self, *, address: str, port: int, rank: int, world_size: int, name: str, backend: str, limit_s: float
    ) -> None:
        self._note("join")
        self.joined.append((rank, world_size, backend))
        if not self.joins:
            time.sleep(limit_s)
            raise ServerError(f"{self.key}: no answer of /init_weights_update_group")
        made: list[Any] = [None] * self.tensor_parallel
        errors: list[Exception] = []

        def join(index: int) -> None:
            try:
                store = dist.TCPStore(address, port, None, False, timedelta(seconds=limit_s), wait_for_workers=True)
                inside = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
                made[index] = dist.ProcessGroupGloo(inside, rank + index, world_size, timedelta(seconds=30))
            except RuntimeError as error:
                errors.append(error)

        threads = [threading.Thread(target=join, args=(index,), daemon=True) for index in range(self.tensor_parallel)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise ServerError(f"{self.key}: cannot join: {str(errors[0]).splitlines()[0]}")
        self.groups[name] = made

    def update_weights_from_group(
        self, tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], *, group: str, version: str, limit_s: float
    ) -> None:
        if self.dies_in == "broadcast":
            self.groups.clear()  # its connections close
            raise ServerDied(f"{self.key}: gone")
        self._note("broadcast")
        if self.liar:
            return
        if group not in self.groups:
            raise ServerError(f"{self.key}: Failed to receive weights: group {group} is unknown")
        if self.stops_in_broadcast:
            raise ServerHung(f"{self.key}: hung")
        size = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in tensors)
        received = [torch.zeros(size, dtype=torch.uint8) for _ in range(self.tensor_parallel)]
        works = [made.broadcast(flat, 0) for made, flat in zip(self.groups[group], received, strict=True)]
        try:
            for work in works:
                work.wait(timedelta(seconds=20))
        except RuntimeError as error:
            raise ServerError(f"{self.key}: Failed to receive weights: {str(error).splitlines()[0]}") from error
        assert all(torch.equal(flat, received[0]) for flat in received)
        self.label = version
        self.labels.append(version)
        self.names.append([name for name, _, _ in tensors])
        begin = 0
        for name, dtype, shape in tensors:
            end = begin + torch.Size(shape).numel() * dtype.itemsize
            if name in self.weights and name in self.loads:
                self.weights[name] = bits(received[0][begin:end].clone().view(dtype))
            begin = end

    def leave_weight_group(self, name: str) -> None:
        self.left.append(name)
        self.groups.pop(name, None)


def fleet(*servers: FleetServer) -> list[FleetServer]:
    """The servers under the keys of a list."""
    for index, server in enumerate(servers):
        server.key = f"rollout.servers.{index}"
    return list(servers)


class Slow:
    """A stream that notes how far it has been read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.read: list[str] = []
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors.items():
            self.read.append(name)
            yield name, tensor
