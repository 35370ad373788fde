"""A process group of this process and all ranks of one server, through which weights are broadcast.

SGLang joins such a group on request and takes part in a broadcast while a request with the tensors' names is in flight.
This module does not choose tensors or open updates (see `rollout.publisher`). Invariants: no wait is without an end if
the server refuses, dies or never connects; the store of the group listens on the one address that reaches the server.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.errors import ServerError
from tropd_mcore.serving.client import SglangClient

JOIN_S = 60.0
"""Longest wait for the server's ranks to connect."""
SEND_S = 600.0
"""Longest time of the broadcast of one bucket."""
AFTER_S = 10.0
"""Longest time from the server's answer to the end of the broadcast on this side."""
POLL_S = 0.005
"""Seconds between two looks at a request or a broadcast."""


def local_address(url: str) -> str:
    """Return the address of this machine that the server at `url` can reach: the one from which it is reached.

    Raises OSError if the url's host is unknown.
    """
    parts = urlsplit(url)
    kind, _, _, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses a route; nothing is sent
        return str(probe.getsockname()[0])


class WeightGroup:
    """The group of this process (rank 0) and `ranks` ranks of the server behind `client`. `backend`: gloo or nccl."""

    def __init__(self, client: SglangClient, *, ranks: int, backend: str) -> None:
        self.name = f"tropd-{secrets.token_hex(6)}"
        self.backend = backend
        self._client = client
        try:
            address = local_address(client.url)
        except OSError as error:
            raise ServerError(f"{client.key}: {client.url}: {error.strerror or error}") from None
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            address, port, None, True, timedelta(seconds=JOIN_S), wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        empty = self._store.num_keys()
        what = (
            f"the server did not join this process at {address} port {port} within {JOIN_S:g} s to receive weights: "
            "its machine must reach this address. Restart the server, which may still try, and set "
            f"{client.key}.weights=value to send them over HTTP"
        )
        request = _Request(
            lambda: client.join_weight_group(
                address=address, port=port, world_size=ranks + 1, name=self.name, backend=backend, limit_s=2 * JOIN_S
            )
        )
        request.wait_until(lambda: self._store.num_keys() > empty, JOIN_S, f"{client.key}: {what}")
        # As SGLang makes its side (`init_custom_process_group`): with the same function, so that both agree on the keys
        # of the store.
        try:
            self._group: Any = dist.distributed_c10d._new_process_group_helper(
                ranks + 1, 0, [], dist.Backend(backend), dist.PrefixStore(self.name, self._store),
                group_name=self.name, timeout=timedelta(seconds=JOIN_S),
            )[0]  # fmt: skip
        except RuntimeError as error:
            raise ServerError(f"{client.key}: {what} ({str(error).splitlines()[0]})") from None
        dist.distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(ranks + 1)}
        request.wait_until(lambda: False, JOIN_S, f"{client.key}: {what}")

    def broadcast(self, bucket: list[tuple[str, Tensor]], *, version: str) -> None:
        """Send the tensors in one broadcast; returns when the server has loaded them under the label `version`.

        Raises ServerError if the server refuses, ServerDied or ServerHung as any other request.
        """
        # the widest dtype first, so that each tensor begins at a multiple of its element size, as SGLang wants it
        ordered = sorted(bucket, key=lambda item: -item[1].element_size())
        device = torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")
        parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device) for _, tensor in ordered]
        flat = torch.cat(parts)
        request = _Request(
            lambda: self._client.update_weights_from_group(
                [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered],
                group=self.name,
                version=version,
            )
        )
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, timedelta(seconds=SEND_S)
        work = self._group.broadcast([flat], options)
        late = f"{self._client.key}: a broadcast of {flat.nbytes >> 20} MiB did not end within {SEND_S:g} s"
        request.wait_until(lambda: False, SEND_S, late)
        deadline = time.monotonic() + AFTER_S
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self._client.key}: the server reports a broadcast of weights that it took no part in"
                )
            time.sleep(POLL_S)
        try:
            work.wait()
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise ServerError(f"{self._client.key}: the broadcast of weights failed: {said}") from None

    def close(self, *, tell_server: bool = True) -> None:
        """Leave the group, also if a broadcast is under way. With `tell_server`, the server leaves it too."""
        self._group.abort()
        if tell_server:
            with contextlib.suppress(ServerError):  # it is gone, or knows the group no more
                self._client.leave_weight_group(self.name)


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

    def wait_until(self, happened: Callable[[], bool], limit_s: float, late: str) -> None:
        """Return when `happened`, or when the request has ended well.

        Raises the request's error, or ServerError(`late`) after `limit_s`.
        """
        deadline = time.monotonic() + limit_s
        while not happened():
            self._thread.join(POLL_S)
            if not self._thread.is_alive():
                if self._error is not None:
                    raise self._error
                return
            if time.monotonic() > deadline:
                raise ServerError(late)
