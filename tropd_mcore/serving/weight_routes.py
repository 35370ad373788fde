"""The routes on which weights reach servers: shared memory, a broadcast, or inside the request.

A route sends to all of its servers at once. `rollout.fleet_publisher` chooses the routes and sends their buckets
between the begin and the end of an update. The route by files is in `rollout.disk_route`. Invariants: `send` returns
only when every server has loaded the bucket or has an error. An error of one server does not keep the others from
loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from tropd_mcore.errors import GroupBroken, ServerDied, ServerError
from tropd_mcore.foreign_text import one_line
from tropd_mcore.serving.background import at_once
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_group import GPU, GroupFailed, Member, WeightGroup, local_address
from tropd_mcore.serving.weight_payload import SharedBuffer, by_value
from tropd_mcore.serving.wire import ServerInfo

RouteName = Literal["shared", "broadcast", "value", "disk"]
Bucket = list[tuple[str, Tensor]]
Errors = dict[str, ServerError]
"""Key of a server -> why it has not loaded the bucket."""


@dataclass(frozen=True)
class Receiver:
    """A server that takes part in an update. `info` is what it has told of itself before."""

    client: SglangClient
    info: ServerInfo

    @property
    def key(self) -> str:
        return self.client.key


Receivers = Sequence[Receiver]


class Route(Protocol):
    """Sends buckets of tensors to servers. Only `send` is called outside of the main thread."""

    in_session: bool
    """Whether SGLang takes the buckets between the begin and the end of a weight-update session."""

    def limit(self, bucket_bytes: int, receivers: Receivers) -> int:
        """Return the most tensor bytes of one bucket."""

    def open(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Get ready for the first bucket of an update to `version`."""

    def send(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Let the servers load the bucket and label their weights `version`."""

    def repair(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """After `send`: send again to those that were kept from loading the bucket by another server's failure."""

    def finish(self, receivers: Receivers, version: str) -> Errors:
        """Let the servers load what they have not loaded bucket by bucket."""

    def close(self, untold: Collection[str] = ()) -> None:
        """Give up what the route holds. The next update opens it again. The servers `untold` are not asked for it."""


class _Plain:
    """What a route without state does between the buckets: nothing."""

    in_session = True

    def open(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Nothing is needed."""
        return {}

    def repair(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """No server keeps another from loading."""
        return {}

    def finish(self, receivers: Receivers, version: str) -> Errors:
        """Everything is loaded."""
        return {}

    def close(self, untold: Collection[str] = ()) -> None:
        """Nothing is held on the servers."""


class SharedMemoryRoute(_Plain):
    """Handles of one buffer in shared memory, for all servers on this machine: one copy of the bytes."""

    def __init__(self) -> None:
        self._buffer = SharedBuffer()

    def limit(self, bucket_bytes: int, receivers: Receivers) -> int:
        """Return `bucket_bytes`: all ranks of all servers read the same buffer."""
        return bucket_bytes

    def send(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Copy the bucket into the buffer and send its handles."""
        ranks = [receiver.info.tensor_parallel for receiver in receivers]
        try:
            payloads = self._buffer.payloads(bucket, copies=sum(ranks))
        except ServerError as error:  # too little shared memory
            return {receiver.key: error for receiver in receivers}
        shares = [payloads[sum(ranks[:index]) : sum(ranks[: index + 1])] for index in range(len(ranks))]
        return _requests(
            {
                receiver.key: partial(receiver.client.update_weights, share, version=version)
                for receiver, share in zip(receivers, shares, strict=True)
            }
        )


class ValueRoute(_Plain):
    """One copy of the tensors per rank of each server, as base64 in the request. For small models."""

    def limit(self, bucket_bytes: int, receivers: Receivers) -> int:
        """Return `bucket_bytes` divided by the copies."""
        return bucket_bytes // sum(receiver.info.tensor_parallel for receiver in receivers)

    def send(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Send the bucket in one request to each server."""
        payloads = by_value(bucket, copies=max(receiver.info.tensor_parallel for receiver in receivers))
        return _requests(
            {
                receiver.key: partial(
                    receiver.client.update_weights, payloads[: receiver.info.tensor_parallel], version=version
                )
                for receiver in receivers
            }
        )


def _requests(calls: dict[str, Callable[[], None]]) -> Errors:
    return at_once(calls)[1]


class BroadcastRoute:
    """Process groups of this process and the servers' ranks: one for all servers that reach the same address of ours.

    A group lives until `close`, the first error, or an update with other servers. If one server fails, the others get
    the bucket again in a new group without it.
    """

    in_session = True

    def __init__(self) -> None:
        self._groups: list[WeightGroup] = []
        self._made: set[str] = set()
        """Names of the groups that were made in this update."""
        self._broken: list[tuple[WeightGroup, GroupFailed]] = []

    def limit(self, bucket_bytes: int, receivers: Receivers) -> int:
        """Return `bucket_bytes`: the bucket is sent once, whatever the number of ranks."""
        return bucket_bytes

    def open(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Join the servers in groups, unless those of the last update are the same."""
        failed: Errors = {}
        wanted: dict[tuple[str, str], list[Member]] = {}
        for receiver in receivers:
            try:
                address = local_address(receiver.client.url)
            except OSError as error:
                url = receiver.client.url
                failed[receiver.key] = ServerError(
                    f"{receiver.key}: no port for the weights of {url}: {one_line(error)}"
                )
                continue
            backend = backend_of(receiver.info, [tensor for _, tensor in bucket])
            member = Member(receiver.client, receiver.info.tensor_parallel)
            wanted.setdefault((address, backend), []).append(member)
        self._made.clear()
        kept = {(group.address, group.backend): list(group.members) for group in self._groups}
        if kept == wanted:
            return failed
        self.close()
        for (address, backend), members in wanted.items():
            failed |= self._join(members, address, backend)
        return failed

    def _join(self, members: list[Member], address: str, backend: str) -> Errors:
        """Make a group of the members, without those that do not join."""
        failed: Errors = {}
        while members:
            try:
                group = WeightGroup(members, address=address, backend=backend)
            except GroupFailed as error:
                failed |= error.failed
                members = [member for member in members if member.key not in failed]
                continue
            self._groups.append(group)
            self._made.add(group.name)
            break
        return failed

    def send(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Broadcast the bucket in every group. `repair` goes on where that fails."""
        failed: Errors = {}
        for group in list(self._groups):
            failed |= self._send(group, bucket, version)
        return failed

    def _send(self, group: WeightGroup, bucket: Bucket, version: str) -> Errors:
        try:
            group.broadcast(bucket, version=version)
        except GroupFailed as error:
            self._groups.remove(group)
            self._broken.append((group, error))
            stale = group.name not in self._made  # one that a server left, for example because it was started again
            final = (ServerDied, GroupBroken) if stale else ServerError
            return {key: found for key, found in error.failed.items() if isinstance(found, final)}
        except BaseException:
            group.close()
            self._groups.remove(group)
            raise
        return {}

    def repair(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Join the servers that did not fail in a new group and send the bucket again.

        If it is unclear which one fails, each gets a group of its own, and those that fail alone are the cause.
        """
        failed: Errors = {}
        healthy = {receiver.key for receiver in receivers}
        while self._broken:
            group, error = self._broken.pop()
            members = [member for member in group.members if member.key in healthy - failed.keys()]
            alone = error.unclear is not None
            for part in [[member] for member in members] if alone else [members]:
                before = len(self._groups)
                failed |= self._join(part, group.address, group.backend)
                for made in self._groups[before:]:
                    failed |= self._send(made, bucket, version)
        return failed

    def finish(self, receivers: Receivers, version: str) -> Errors:
        """Everything is loaded."""
        return {}

    def close(self, untold: Collection[str] = ()) -> None:
        """Leave all groups."""
        groups, self._groups = self._groups, []
        self._broken.clear()
        for group in groups:
            group.close(untold=untold)


def backend_of(info: ServerInfo, tensors: list[Tensor]) -> str:
    """Return the backend of a broadcast: `nccl` if server and tensors are on GPUs, else `gloo`."""
    on_gpu = info.device == GPU and all(tensor.device.type == GPU for tensor in tensors)
    return "nccl" if on_gpu else "gloo"


def route_of(name: RouteName) -> Route:
    """Return a new route. That of `disk` needs a folder (`rollout.disk_route`)."""
    routes: dict[str, type[SharedMemoryRoute | BroadcastRoute | ValueRoute]] = {
        "shared": SharedMemoryRoute,
        "broadcast": BroadcastRoute,
        "value": ValueRoute,
    }
    return routes[name]()
