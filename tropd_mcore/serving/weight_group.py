"""A process group of this process and all ranks of one server, through which weights are broadcast.

SGLang joins such a group on request. It takes part in a broadcast while a request with the tensors' names is in flight.
This module does not choose tensors or open updates (see `rollout.publisher`). Invariants: no wait is without an end if
the server refuses, dies or never connects, and every failure is a ServerError. The store of the group listens on the
one address of this machine that reaches the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.errors import ServerError
from tropd_mcore.foreign_text import one_line
from tropd_mcore.serving.client import SglangClient

BACKEND = "gloo"
JOIN_S = 60.0
"""Longest wait for the server's ranks to connect."""
SEND_S = 600.0
"""Longest time of the broadcast of one bucket."""
AFTER_S = 10.0
"""Longest time from the server's answer to the end of the broadcast on this side."""
POLL_S = 0.005
"""Seconds between two looks at a request or a broadcast."""
INTERFACE = "GLOO_SOCKET_IFNAME"


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
    """The gloo group of this process (rank 0) and `ranks` ranks of the server behind `client`."""

    def __init__(self, client: SglangClient, *, ranks: int) -> None:
        self.name = f"tropd-{secrets.token_hex(6)}"
        self._client = client
        self._work: Any = None
        name, failed = self.name, ""
        try:
            address = local_address(client.url)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, 0), family=family)
            port = listener.getsockname()[1]
            self._store = dist.TCPStore(
                address, port, None, True, timedelta(seconds=JOIN_S), wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )  # fmt: skip
            empty = self._store.num_keys()
        except (OSError, RuntimeError) as error:
            failed = one_line(error)
        if failed:  # outside of the handler: torch's error as a context would look like a lost rank of the job
            raise ServerError(f"{client.key}: no port for the weights of {client.url}: {failed}")
        late = (
            f"{client.key}: the server did not join this process at {address} port {port} within {JOIN_S:g} s to "
            "receive weights: its machine must reach this address. Restart the server, which may still try, and set "
            f"{client.key}.weights=value to send them over HTTP"
        )
        request = _Request(
            lambda: client.join_weight_group(
                address=address, port=port, world_size=ranks + 1, name=name, backend=BACKEND, limit_s=JOIN_S
            )
        )
        request.wait_until(lambda: self._store.num_keys() > empty, JOIN_S, late)
        request.raise_error()
        # SGLang makes its side with this function of torch (`init_custom_process_group`), so both agree on the keys
        try:
            with _gloo_at(address):
                self._group: Any = dist.distributed_c10d._new_process_group_helper(
                    ranks + 1, 0, [], dist.Backend(BACKEND), dist.PrefixStore(name, self._store),
                    group_name=name, timeout=timedelta(seconds=JOIN_S),  # type: ignore[arg-type]
                )[0]  # fmt: skip
        except (RuntimeError, ValueError) as error:
            failed = one_line(error)
        if failed:
            request.raise_error()
            raise ServerError(f"{late} ({failed})")
        dist.distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(ranks + 1)}
        try:
            request.wait_until(lambda: False, JOIN_S, late)
        except BaseException:
            self.close()
            raise

    def broadcast(self, bucket: list[tuple[str, Tensor]], *, version: str) -> None:
        """Send the tensors in one broadcast; returns when the server has loaded them under the label `version`.

        Raises ServerError; ServerDied and ServerHung as any other request.
        """
        key, name = self._client.key, self.name
        # the widest dtype first, so that each tensor begins at a multiple of its element size, as SGLang wants it
        ordered = sorted(bucket, key=lambda item: -item[1].element_size())
        described = [(each, tensor.dtype, tuple(tensor.shape)) for each, tensor in ordered]
        flat = torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu() for _, tensor in ordered])
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, timedelta(seconds=SEND_S)
        client = self._client
        request = _Request(
            lambda: client.update_weights_from_group(described, group=name, version=version, limit_s=SEND_S)
        )
        failed = ""
        try:
            self._work = self._group.broadcast([flat], options)
        except RuntimeError as error:
            failed = one_line(error)
        if failed:
            request.raise_error()
            raise ServerError(f"{key}: the broadcast of weights failed: {failed}")
        late = f"{key}: a broadcast of {flat.nbytes >> 20} MiB did not end within {SEND_S:g} s"
        request.wait_until(lambda: False, SEND_S + AFTER_S, late)
        deadline = time.monotonic() + AFTER_S
        while not self._work.is_completed():
            if time.monotonic() > deadline:
                raise ServerError(f"{key}: the server took no part in a broadcast of weights that it reports as loaded")
            time.sleep(POLL_S)
        try:
            self._work.wait()
        except RuntimeError as error:
            failed = one_line(error)
        if failed:
            raise ServerError(f"{key}: the broadcast of weights failed: {failed}")

    def close(self, *, tell_server: bool = True) -> None:
        """Leave the group, also if a broadcast is under way. With `tell_server`, the server leaves it too.

        The server then closes its connections, which ends a broadcast on this side.
        """
        if tell_server:
            with contextlib.suppress(ServerError):  # it is gone, or knows the group no more
                self._client.leave_weight_group(self.name)
        deadline = time.monotonic() + (AFTER_S if tell_server else 0.0)
        while self._work is not None and not self._work.is_completed():
            if time.monotonic() > deadline:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))  # its destructor would wait for the broadcast
                return
            time.sleep(POLL_S)
        if self._group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(self._group)


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


class _Request:
    """A request that runs in a thread, while this thread takes part in what the server does for it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="weights", daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # raised again in the waiting thread
            self._error = error

    def raise_error(self) -> None:
        """Raise the request's error, if it has ended with one."""
        if self._error is not None:
            raise self._error

    def wait_until(self, happened: Callable[[], bool], limit_s: float, late: str) -> None:
        """Return when `happened`, or when the request has ended well.

        Raises the request's error, or ServerError(`late`) after `limit_s`.
        """
        deadline = time.monotonic() + limit_s
        while not happened():
            self._thread.join(POLL_S)
            if not self._thread.is_alive():
                self.raise_error()
                return
            if time.monotonic() > deadline:
                raise ServerError(late)
