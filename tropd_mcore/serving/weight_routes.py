"""The routes on which weights reach a server: shared memory, a broadcast, or inside the request.

`rollout.publisher` chooses a route and sends its buckets between the begin and the end of an update. Invariant: `send`
returns only when the server has loaded the bucket.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from tropd_mcore.errors import ServerError, ServerHung
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_group import WeightGroup
from tropd_mcore.serving.weight_payload import SharedBuffer, by_value
from tropd_mcore.serving.wire import ServerInfo

RouteName = Literal["shared", "broadcast", "value"]
Bucket = list[tuple[str, Tensor]]


class Route(Protocol):
    """Sends buckets of tensors to one server. `info` is what the server has told of itself before the update."""

    def limit(self, bucket_bytes: int, info: ServerInfo) -> int:
        """Return the most tensor bytes of one bucket. Raises ServerError if this server cannot be reached this way."""

    def send(self, bucket: Bucket, info: ServerInfo, *, version: str) -> None:
        """Let the server load the bucket and label its weights `version`. Raises ServerError."""

    def close(self, *, tell_server: bool = True) -> None:
        """Give up what the route holds. The next bucket opens it again. Without `tell_server`, nothing is requested."""


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

    def close(self, *, tell_server: bool = True) -> None:
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

    def close(self, *, tell_server: bool = True) -> None:
        """Nothing is held."""


class BroadcastRoute:
    """A process group of this process and the server's ranks, which lives until `close` or the first error."""

    def __init__(self, client: SglangClient) -> None:
        self._client = client
        self._group: WeightGroup | None = None

    def limit(self, bucket_bytes: int, info: ServerInfo) -> int:
        """Return `bucket_bytes`: the bucket is sent once, whatever the number of ranks.

        Raises ServerError for a server with pipeline stages, whose ranks SGLang would number twice.
        """
        if info.pipeline_parallel > 1:
            raise ServerError(
                f"{self._client.key}: SGLang cannot join a broadcast with {info.pipeline_parallel} pipeline stages; "
                f"set {self._client.key}.weights=value"
            )
        return bucket_bytes

    def send(self, bucket: Bucket, info: ServerInfo, *, version: str) -> None:
        """Broadcast the bucket; joins the server in a new group before the first one."""
        try:
            if self._group is None:
                self._group = WeightGroup(self._client, ranks=info.tensor_parallel)
            self._group.broadcast(bucket, version=version)
        except ServerHung:
            self.close(tell_server=False)  # it would not answer
            raise
        except BaseException:
            self.close()
            raise

    def close(self, *, tell_server: bool = True) -> None:
        """Leave the group."""
        if self._group is not None:
            group, self._group = self._group, None
            group.close(tell_server=tell_server)


def route_of(name: RouteName, client: SglangClient) -> Route:
    """Return a new route to the server of `client`."""
    routes: dict[str, type[SharedMemoryRoute | BroadcastRoute | ValueRoute]] = {
        "shared": SharedMemoryRoute,
        "broadcast": BroadcastRoute,
        "value": ValueRoute,
    }
    return routes[name](client)
