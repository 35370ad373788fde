"""The routes on which weights reach a server: shared memory, a broadcast, or inside the request.

`rollout.publisher` chooses a route and sends its buckets between the begin and the end of an update. Invariant: `send`
returns only when the server has loaded the bucket.
"""

from __future__ import annotations

import atexit
from typing import Literal, Protocol

from torch import Tensor

from tropd_mcore.errors import ServerHung
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_group import WeightGroup
from tropd_mcore.serving.weight_payload import SharedBuffer, by_value
from tropd_mcore.serving.wire import ServerInfo

RouteName = Literal["shared", "broadcast", "value"]
Bucket = list[tuple[str, Tensor]]


class Route(Protocol):
    """Sends buckets of tensors to one server. `info` is what the server has told of itself before the update."""

    def limit(self, bucket_bytes: int, info: ServerInfo) -> int:
        """Return the most tensor bytes of one bucket."""

    def send(self, bucket: Bucket, info: ServerInfo, *, version: str) -> None:
        """Let the server load the bucket and label its weights `version`. Raises ServerError."""

    def close(self) -> None:
        """Give up what the route holds. The next bucket opens it again."""


class SharedMemoryRoute:
    """Handles of one buffer in shared memory, for a server on this machine."""

    def __init__(self, client: SglangClient) -> None:
        self._client = client
        self._buffer = SharedBuffer()

    def limit(self, bucket_bytes: int, info: ServerInfo) -> int:
        """Return `bucket_bytes`: all ranks of the server read the same buffer."""
        return bucket_bytes

    def send(self, bucket: Bucket, info: ServerInfo, *, version: str) -> None:
        """Copy the bucket into the buffer and send its handles."""
        self._client.update_weights(self._buffer.payloads(bucket, copies=info.tensor_parallel), version=version)

    def close(self) -> None:
        """Keep the buffer, which does not depend on the server."""


class ValueRoute:
    """One copy of the tensors per rank of the server, as base64 in the request. For small models."""

    def __init__(self, client: SglangClient) -> None:
        self._client = client

    def limit(self, bucket_bytes: int, info: ServerInfo) -> int:
        """Return `bucket_bytes` divided by the copies."""
        return bucket_bytes // info.tensor_parallel

    def send(self, bucket: Bucket, info: ServerInfo, *, version: str) -> None:
        """Send the bucket in one request."""
        self._client.update_weights(by_value(bucket, copies=info.tensor_parallel), version=version)

    def close(self) -> None:
        """Nothing is held."""


class BroadcastRoute:
    """A process group of this process and the server's ranks, which lives until the first error."""

    def __init__(self, client: SglangClient) -> None:
        self._client = client
        self._group: WeightGroup | None = None

    def limit(self, bucket_bytes: int, info: ServerInfo) -> int:
        """Return `bucket_bytes`: the bucket is sent once, whatever the number of ranks."""
        return bucket_bytes

    def send(self, bucket: Bucket, info: ServerInfo, *, version: str) -> None:
        """Broadcast the bucket; joins the server in a new group before the first one."""
        try:
            if self._group is None:
                on_gpu = info.device == "cuda" and bucket[0][1].is_cuda
                self._group = WeightGroup(
                    self._client, ranks=info.tensor_parallel, backend="nccl" if on_gpu else "gloo"
                )
                atexit.register(self.close)
            self._group.broadcast(bucket, version=version)
        except ServerHung:
            self._leave(tell_server=False)  # it would not answer
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the group."""
        self._leave(tell_server=True)

    def _leave(self, *, tell_server: bool) -> None:
        if self._group is not None:
            atexit.unregister(self.close)
            self._group.close(tell_server=tell_server)
            self._group = None


def route_of(name: RouteName, client: SglangClient) -> Route:
    """Return a new route to the server of `client`."""
    routes: dict[str, type[SharedMemoryRoute | BroadcastRoute | ValueRoute]] = {
        "shared": SharedMemoryRoute,
        "broadcast": BroadcastRoute,
        "value": ValueRoute,
    }
    return routes[name](client)
