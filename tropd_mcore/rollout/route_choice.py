"""Chooses the route on which the weights reach each server, and tells what that costs.

The routes themselves are in `serving.weight_routes` and `disk_route`. Invariant: a route that the configuration names
is used or refused; only shared memory that is too small is replaced, with a warning.
"""

from __future__ import annotations

import logging

from tropd_mcore.errors import ServerError
from tropd_mcore.rollout.weight_plan import WeightPlan
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_payload import shared_memory_room
from tropd_mcore.serving.weight_routes import RouteName
from tropd_mcore.serving.wire import ServerInfo

log = logging.getLogger(__name__)

SMALL_BYTES = 64 * 2**20
"""Size of the weights up to which they go inside the requests to a server that runs elsewhere, and above which that
gets a warning."""


class RouteChoice:
    """The routes of an update of `plan` in buckets of `bucket_bytes`. Each warning is given once per server."""

    def __init__(self, plan: WeightPlan, bucket_bytes: int) -> None:
        self._plan = plan
        self._needed = max(plan.largest, min(bucket_bytes, plan.nbytes))
        self._warned: set[tuple[str, str]] = set()
        self._told: dict[str, RouteName] = {}

    def wanted(self, client: SglangClient, asked: RouteName | None) -> RouteName:
        """Return the route before the server was asked: `asked`, or what suits the place of the server and the size."""
        elsewhere: RouteName = "value" if self._plan.nbytes <= SMALL_BYTES else "broadcast"
        name = asked or ("shared" if client.same_host else elsewhere)
        if name != "shared" or self._needed <= shared_memory_room():
            return name
        if self._is_first(client, "room"):
            log.warning(
                "%s: weight updates need %d MiB of /dev/shm but %d are usable; weights go through HTTP by value, about "
                "a hundred times slower (docker: --shm-size)",
                client.key,
                self._needed >> 20,
                shared_memory_room() >> 20,
            )
        return "value"

    def of(self, client: SglangClient, asked: RouteName | None, info: ServerInfo) -> RouteName:
        """Return the route to a server that answered `info`. Raises ServerError if it cannot be reached that way."""
        name = self.wanted(client, asked)
        if name == "broadcast" and info.pipeline_parallel > 1:
            if asked is not None:
                raise ServerError(
                    f"{client.key}: SGLang cannot join a broadcast with {info.pipeline_parallel} pipeline stages; set "
                    f"{client.key}.weights=value"
                )
            name = "value"
        if name == "value" and not client.same_host and self._plan.nbytes > SMALL_BYTES:
            self._tell_bytes(client, info)
        return name

    def tell(self, routes: dict[str, RouteName]) -> None:
        """Log the routes in one line, if they are others than the last time."""
        if routes != self._told:
            self._told = dict(routes)
            log.info(
                "weights (%.2f GB) go to %s",
                self._plan.nbytes / 1e9,
                ", ".join(f"{key} by {name}" for key, name in routes.items()),
            )

    def _tell_bytes(self, client: SglangClient, info: ServerInfo) -> None:
        if self._is_first(client, "bytes"):
            log.warning(
                "%s: each publication sends %.1f GB over HTTP (%d copies of the weights in base64); "
                "%s.weights=broadcast sends the weights once",
                client.key,
                self._plan.nbytes * info.tensor_parallel * 4 / 3 / 1e9,
                info.tensor_parallel,
                client.key,
            )

    def _is_first(self, client: SglangClient, what: str) -> bool:
        first = (client.key, what) not in self._warned
        self._warned.add((client.key, what))
        return first
