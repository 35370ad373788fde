"""A process group of this process and all ranks of one or more servers, through which weights are broadcast.

SGLang joins such a group on request. It takes part in a broadcast while a request with the tensors' names is in flight.
This module does not choose tensors, open updates or make a second group (see `weight_routes`). Invariants: no wait is
without an end if a server refuses, dies, stops or never connects. A failure closes the group and is a GroupFailed,
which says of each server whether it is the cause. The store of the group listens on the one address of this machine
that reaches the servers.

The backend is gloo, and NCCL if the tensors and the servers are on GPUs. NCCL was not run: the code follows torch's
ProcessGroupNCCL and SGLang 0.5.23 (`init_custom_process_group`, `update_weights_from_distributed`). SGLang gives no
`device_id`, so its communicator begins with the first broadcast, and ours must too: one that began with the group would
wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.errors import GroupBroken, ServerDied, ServerError
from tropd_mcore.foreign_text import one_line
from tropd_mcore.serving.background import POLL_S, Background, at_once, wait_until
from tropd_mcore.serving.client import SglangClient

GPU = "cuda"
"""Kind of device on which NCCL works."""
JOIN_S = 60.0
"""Longest wait for the servers' ranks to connect."""
SEND_S = 600.0
"""Longest time of the broadcast of one bucket."""
APART_S = 60.0
"""Longest time between the first and the last answer about one bucket. One that answers at once took no part in it."""
AFTER_S = 10.0
"""Longest time from the servers' answers, or from a failure, to the end of a broadcast."""
INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Member:
    """A server in a group."""

    client: SglangClient
    ranks: int
    """Its number of ranks."""

    @property
    def key(self) -> str:
        return self.client.key


class GroupFailed(Exception):
    """A group could not be made, or a broadcast failed. The group must be closed.

    The group is closed. `failed` holds the error of each server that cannot be sent to again now; the others are
    healthy. With `unclear`, any of those others may be the cause.
    """

    def __init__(self, failed: dict[str, ServerError], *, unclear: ServerError | None = None) -> None:
        super().__init__("; ".join(map(str, failed.values())) or str(unclear))
        self.failed = failed
        self.unclear = unclear


def local_address(url: str) -> str:
    """Return the address of this machine that the server at `url` can reach: the one from which it is reached.

    Raises OSError if the url's host is unknown or unreachable.
    """
    parts = urlsplit(url)
    kind, _, _, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses a route; nothing is sent
        return str(probe.getsockname()[0])


class WeightGroup:
    """The group of this process (rank 0) and the ranks of `members`, one server after the other.

    `address` is that of this machine which all members reach. Raises GroupFailed.
    """

    def __init__(self, members: Sequence[Member], *, address: str, backend: str) -> None:
        self.name = f"tropd-{secrets.token_hex(6)}"
        self.members = tuple(members)
        self.address = address
        self.backend = backend
        self._group: Any = None
        self._work: Any = None
        self._store: Any = None
        self._closed = False
        self._world = 1 + sum(member.ranks for member in members)
        self._port = self._listen()
        joining, rank = {}, 1
        for member in members:
            joining[member.key] = self._join_request(member, rank)
            rank += member.ranks
        try:
            self._join(joining)
        except GroupFailed as error:
            stuck = self._dropped(joining, untold=error.failed)
            raise GroupFailed({**stuck, **error.failed}) from None

    def _listen(self) -> int:
        """Open the store and return its port."""
        failed = ""
        try:
            family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
            listener = socket.create_server((self.address, 0), family=family)
            port = int(listener.getsockname()[1])
            self._store = dist.TCPStore(
                self.address, port, None, True, timedelta(seconds=JOIN_S), wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            failed = one_line(error)
        if failed:  # outside of the handler: torch's error as a context would look like a lost rank of the job
            raise _of_all(self.members, lambda key: f"{key}: no port for its weights at {self.address}: {failed}")
        return port

    def _join_request(self, member: Member, rank: int) -> Background[None]:
        return Background(
            lambda: member.client.join_weight_group(
                address=self.address, port=self._port, rank=rank, world_size=self._world, name=self.name,
                backend=self.backend, limit_s=JOIN_S + AFTER_S,
            )
        )  # fmt: skip

    def _join(self, joining: dict[str, Background[None]]) -> None:
        """Join as rank 0 when the ranks of all servers are there. Raises GroupFailed."""
        lazy = self.backend == "nccl"  # whose ranks meet only in the first broadcast

        def may_go_on() -> bool:
            # not before all are there, even if one has refused: without a store they would try to connect for minutes
            absent = set(joining) if lazy else self._absent()
            return all(request.ended or key not in absent for key, request in joining.items())

        wait_until(may_go_on, JOIN_S)
        _raise_errors(joining)
        if not lazy and (absent := self._absent()):
            raise GroupFailed(self._late(absent))
        failed = ""
        # SGLang makes its side with this function of torch (`init_custom_process_group`), so both agree on the keys
        try:
            with _gloo_at(self.address):
                self._group = dist.distributed_c10d._new_process_group_helper(
                    self._world, 0, [], dist.Backend(self.backend), dist.PrefixStore(self.name, self._store),
                    group_name=self.name, timeout=timedelta(seconds=JOIN_S if not lazy else 2 * SEND_S),  # type: ignore[arg-type]
                )[0]  # fmt: skip
        except (RuntimeError, ValueError) as error:
            failed = one_line(error)
        if failed:
            _raise_errors(joining)
            raise GroupFailed(self._late({member.key for member in self.members}, failed))
        dist.distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self._world)}
        wait_until(lambda: all(request.ended for request in joining.values()), JOIN_S)
        _raise_errors(joining)
        if late := {key for key, request in joining.items() if not request.ended}:
            raise GroupFailed(self._late(late))

    def _absent(self) -> set[str]:
        """The servers of which a rank has not come to gloo's store, in which each rank leaves a key with its number.

        A torch that cannot list the keys only tells whether some rank is missing, so then it is all servers or none.
        """
        if not hasattr(self._store, "list_keys"):
            return {member.key for member in self.members} if self._store.num_keys() < self._world - 1 else set()
        there = {key.rpartition("/")[2] for key in self._store.list_keys() if self.name in key}
        absent, rank = set(), 1
        for member in self.members:
            if not there.issuperset(map(str, range(rank, rank + member.ranks))):
                absent.add(member.key)
            rank += member.ranks
        return absent

    def _late(self, keys: Collection[str], why: str = "") -> dict[str, ServerError]:
        ended = f" ({why})" if why else ""
        return {
            key: ServerError(
                f"{key}: the server did not join this process at {self.address} port {self._port} within {JOIN_S:g} s "
                "to receive weights: its machine must reach this address. Restart the server, which may still try, and "
                f"set {key}.weights=value to send them over HTTP{ended}"
            )
            for key in keys
        }

    def broadcast(self, bucket: list[tuple[str, Tensor]], *, version: str) -> None:
        """Send the tensors in one broadcast; returns when all servers have loaded them under the label `version`.

        With NCCL the bytes stay on their device. Raises GroupFailed.
        """
        # the widest dtype first, so that each tensor begins at a multiple of its element size, as SGLang wants it
        ordered = sorted(bucket, key=lambda item: -item[1].element_size())
        described = [(each, tensor.dtype, tuple(tensor.shape)) for each, tensor in ordered]
        pieces = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in ordered)
        flat = torch.cat([piece if self.backend == "nccl" else piece.cpu() for piece in pieces])

        def request_of(member: Member) -> Background[None]:
            return Background(
                lambda: member.client.update_weights_from_group(
                    described, group=self.name, version=version, limit_s=SEND_S
                )
            )

        requests = {member.key: request_of(member) for member in self.members}
        sending = Background(lambda: self._start(flat))  # NCCL's first broadcast returns only when all ranks are there
        self._wait(requests, sending)
        self._raise_failures(requests, sending, flat.nbytes)

    def _start(self, flat: Tensor) -> None:
        """Begin the broadcast. Raises RuntimeError."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, timedelta(seconds=SEND_S)
        self._work = self._group.broadcast([flat], options)

    def _wait(self, requests: dict[str, Background[None]], sending: Background[None]) -> None:
        """Wait until all requests have ended, but not for those that wait for a server that is gone or took no part."""
        deadline = time.monotonic() + SEND_S + AFTER_S
        while not all(request.ended for request in requests.values()):
            if any(isinstance(request.error, ServerDied) for request in requests.values()) or sending.error is not None:
                deadline = min(deadline, time.monotonic() + AFTER_S)
            elif any(request.ended for request in requests.values()):
                deadline = min(deadline, time.monotonic() + APART_S)
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if all(request.ended and request.error is None for request in requests.values()):
            wait_until(lambda: sending.error is not None or self._is_done(), AFTER_S)

    def _is_done(self) -> bool:
        return self._work is not None and self._work.is_completed()

    def _raise_failures(self, requests: dict[str, Background[None]], sending: Background[None], nbytes: int) -> None:
        """Raise GroupFailed, unless the broadcast has ended well on all sides."""
        errors = _errors(requests)
        gone = {key: error for key, error in errors.items() if isinstance(error, ServerDied)}
        if errors:
            stuck = self._dropped(requests, untold=gone)  # a refusal of one that was released names no cause of its own
            raise GroupFailed({**stuck, **(gone or errors)})
        own = ""
        if not all(request.ended for request in requests.values()):
            own = "not all servers answered"
        elif sending.error is not None:
            own = one_line(sending.error)
        elif self._is_done():
            try:
                self._work.wait()
                self._work = None  # it holds the bytes
                return
            except RuntimeError as error:
                own = one_line(error)
        stuck = self._dropped(requests, untold=())
        keys = " and ".join(requests)
        if own:
            unclear = ServerError(f"{keys}: the broadcast of weights failed: {own}")
        else:
            what = "the server took" if len(requests) == 1 else "one of the servers took"
            unclear = ServerError(
                f"{keys}: {what} no part in a broadcast of weights ({nbytes >> 20} MiB) that it reports as loaded"
            )
        if len(requests) == 1:
            raise GroupFailed({keys: unclear})
        raise GroupFailed(stuck, unclear=unclear)

    def _dropped(self, requests: dict[str, Background[None]], *, untold: Collection[str]) -> dict[str, ServerError]:
        """Close this side, then return an error for each server whose request does not end even so."""
        self.close(untold={*untold, *(key for key, request in requests.items() if not request.ended)})
        wait_until(lambda: all(request.ended or key in untold for key, request in requests.items()), AFTER_S)
        causes = " and ".join(untold) or "another server"
        return {
            key: GroupBroken(
                f"{key}: it waits in a broadcast of weights for {causes} and may be sent to again when that one has "
                "been stopped"
            )
            for key, request in requests.items()
            if not request.ended and key not in untold
        }

    def close(self, *, untold: Collection[str] = ()) -> None:
        """Leave the group, also if a broadcast is under way. All servers but `untold` are asked to leave it too.

        A server that leaves closes its connections, which ends a broadcast on this side.
        """
        if self._closed:
            return
        self._closed = True
        leaving = {
            member.key: partial(member.client.leave_weight_group, self.name)
            for member in self.members
            if member.key not in untold
        }
        at_once(leaving)  # errors do not matter: it is gone, or knows the group no more
        group, self._group, self._store = self._group, None, None  # without a store, nobody waits for rank 0 in it
        if group is None:
            return
        if self.backend == "nccl":  # waits for no peer; also ends a communicator that is still being made
            Background(lambda: dist.distributed_c10d._abort_process_group(group)).wait(AFTER_S)
            return
        if not wait_until(lambda: self._work is None or self._work.is_completed(), AFTER_S if leaving else 0.0):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # its destructor would wait for the broadcast
            return
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def _errors(requests: dict[str, Background[None]]) -> dict[str, ServerError]:
    """The errors of ended requests. An error of another kind is a bug and is raised."""
    found: dict[str, ServerError] = {}
    for key, request in requests.items():
        if isinstance(request.error, ServerError):
            found[key] = request.error
        elif request.error is not None:
            raise request.error
    return found


def _raise_errors(requests: dict[str, Background[None]]) -> None:
    """Raise GroupFailed with the errors of ended requests, if there are any."""
    if errors := _errors(requests):
        gone: dict[str, ServerError] = {key: error for key, error in errors.items() if isinstance(error, ServerDied)}
        raise GroupFailed(gone or errors)


def _of_all(members: Sequence[Member], line: Callable[[str], str]) -> GroupFailed:
    return GroupFailed({member.key: ServerError(line(member.key)) for member in members})


@contextlib.contextmanager
def _gloo_at(address: str) -> Iterator[None]:
    """Let gloo listen on the interface of `address`. Torch reads the variable when it makes a group; without it, gloo
    takes the address of the host's name, which is often a loopback address."""
    found = (
        name
        for name, given in psutil.net_if_addrs().items()
        if any(one.address.partition("%")[0] == address for one in given)
    )
    before, name = os.environ.get(INTERFACE), next(found, None)
    if name is not None:
        os.environ[INTERFACE] = name
    try:
        yield
    finally:
        if name is not None:
            del os.environ[INTERFACE]
            if before is not None:
                os.environ[INTERFACE] = before
