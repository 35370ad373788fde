"""Sends the student's weights to several rollout servers in one pass: one stream, every route at the same time.

This module does not gather shards (see `mcore.weights_io`). Invariants: a tensor is sent only if it is in the plan
with the same shape and dtype. No server gets the new version label before every tensor of the plan has arrived and the
proofs of all servers have passed. An update that stops half-way leaves a label that no sampler accepts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.errors import GateError, ServerError
from tropd_mcore.progress import progress
from tropd_mcore.rollout.disk_route import DiskRoute
from tropd_mcore.rollout.fleet_update import FleetUpdate, Lane, NobodyLeft
from tropd_mcore.rollout.publication import PublicationLedger, check_equal, tensor_digest
from tropd_mcore.rollout.route_choice import RouteChoice
from tropd_mcore.rollout.weight_plan import WeightPlan
from tropd_mcore.serving.background import at_once
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_routes import Bucket, Errors, Receiver, Route, RouteName, route_of
from tropd_mcore.serving.wire import ServerInfo, WeightChecksums

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

BUCKET_BYTES = 512 * 2**20
"""Tensor bytes per request."""

SERVED_DTYPES = ("float32", "bfloat16", "float16")
"""Values of dtype in /server_info that name the dtype to which the server casts."""


@dataclass
class Target:
    """A server to update.

    `client.key` is its section of the configuration (`rollout.servers.1`). `ledger` remembers its last publication
    across restarts; without one, its updates are not verified (gates.weight_sync=false). `weights` and `folder` are the
    keys `weights` and `weights_folder` of that section.
    """

    client: SglangClient
    ledger: PublicationLedger | None = None
    weights: RouteName | None = None
    folder: Path | None = None

    @property
    def key(self) -> str:
        return self.client.key


@dataclass(frozen=True)
class PublishReport:
    """Summary of one update."""

    version: str
    tensors: int
    gib: float
    buckets: int
    seconds: float


Held = dict[str, WeightChecksums]
"""Key of a server -> its checksums after the update."""


class FleetPublisher:
    """Sends full updates of the tensors in `plan`. Buffers and process groups live until `close`.

    `student_folder` has the files beside the weights, which the route `disk` needs. After a failure a server stays
    paused, unless `resume_failed`. `report` describes the last update.
    """

    def __init__(
        self,
        plan: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
        *,
        bucket_bytes: int = BUCKET_BYTES,
        student_folder: Path | None = None,
        resume_failed: bool = False,
    ) -> None:
        self.plan = WeightPlan(plan)
        self.choice = RouteChoice(self.plan, bucket_bytes)
        self.report: PublishReport | None = None
        self._bucket_bytes = bucket_bytes
        self._student_folder = student_folder
        self._resume_failed = resume_failed
        self._routes: dict[tuple[RouteName, Path | None], Route] = {}

    def broadcasts_to(self, targets: Sequence[Target]) -> bool:
        """Return whether any of the servers is meant to get the weights by broadcast."""
        return any(self.choice.wanted(target.client, target.weights) == "broadcast" for target in targets)

    def publish(self, targets: Sequence[Target], tensors: Iterator[tuple[str, Tensor]], version: str) -> Errors:
        """Replace all weights of the servers by `tensors` (any order, any device) and label them `version`.

        Sampling is paused during the update and the KV caches of the old weights are dropped. Returns the error of each
        server that could not be updated. It does not have the label, and is paused or gone; GroupBroken means that it
        may be sent again. Servers that are not in the result have the weights, and sample again. If every server has
        failed, the rest of `tensors` is not read.

        Raises ServerError if a tensor is unknown, repeated, missing or has another shape or dtype, and GateError if
        checksums show that a server does not hold what was sent. Then no server has the label.
        """

        def check(updated: Sequence[Target], infos: dict[str, ServerInfo], sent: _Sent) -> Errors:
            held, failed = self._held([target for target in updated if target.ledger is not None])
            for target in updated:
                if target.ledger is not None and target.key in held:
                    info = infos[target.key]
                    is_known = info.dtype in SERVED_DTYPES
                    target.ledger.check(
                        sent.as_served(info),
                        held[target.key],
                        by_tensor=info.quantization is None and is_known,
                        may_round=not is_known and self.plan.sends_float32(),
                    )
            check_equal({key: (infos[key], checksums) for key, checksums in held.items()})
            return failed

        return self._replace(targets, tensors, version, check)

    def verify_sync(
        self, targets: Sequence[Target], make_stream: Callable[[], Iterator[tuple[str, Tensor]]], version: str
    ) -> Errors:
        """Prove that an update sets every weight of each server: publish, destroy the weights, publish again, compare.

        SGLang silently ignores unknown names, so a wrong name in the plan would leave an old weight in place. The
        server's checksum over all ranks shows this for every device and layout. At the end the servers have `version`.
        Returns errors like `publish`. Raises GateError if the checksums differ. A server without checksums gets a
        single update that is not verified.
        """
        failed = self._replace(targets, make_stream(), f"{version}:first", _nothing_to_check)
        left = [target for target in targets if target.key not in failed]
        first, errors = self._held(left)
        failed |= errors
        unproven = [target for target in left if target.key not in first and target.key not in failed]
        failed |= at_once({one.key: _label(one, version) for one in unproven})[1]
        left = [target for target in left if target.key in first]
        if not left:
            return failed
        failed |= at_once({target.key: target.client.randomize_weights for target in left})[1]
        left = [target for target in left if target.key not in failed]
        destroyed, errors = self._held(left)
        failed |= errors
        for target in (target for target in left if target.key not in errors):
            if target.key not in destroyed or destroyed[target.key].total == first[target.key].total:
                raise GateError(f"{target.key}: the server kept its weights when asked to destroy them")
        left = [target for target in left if target.key not in failed]
        if not left:
            return failed

        def check(updated: Sequence[Target], infos: dict[str, ServerInfo], sent: _Sent) -> Errors:
            held, lost = self._held(updated)
            for target in (target for target in updated if target.key not in lost):
                if target.key not in held or held[target.key].total != first[target.key].total:
                    raise GateError(
                        f"{target.key}: two updates with the same {len(self.plan)} tensors left different weights: "
                        "the server has weights that no tensor of the plan sets, or an update did not arrive, so "
                        "training would sample from other weights than the student's (gates.weight_sync)"
                    )
            check_equal({key: (infos[key], checksums) for key, checksums in held.items()})
            for target in (target for target in updated if target.key not in lost):
                if target.ledger is not None:
                    target.ledger.record(sent.as_served(infos[target.key]), held[target.key])
            return lost

        return failed | self._replace(left, make_stream(), version, check)

    def check_unchanged(self, targets: Sequence[Target], version: str | None = None) -> Errors:
        """Raise GateError if a server has other weights than after the last publication, under the same label.

        Returns the error of each server that gives no answer, or that has another label than `version`: somebody has
        started it again. Its answers carry the label under which they were sampled, so those of before are good.
        """
        known = [target for target in targets if target.ledger is not None and target.ledger.last is not None]
        held, failed = self._held(known)
        for target in known:
            if target.key not in held or target.ledger is None:
                continue
            try:
                target.ledger.check_unchanged(held[target.key])
            except GateError:
                info, gone = at_once({target.key: target.client.info})
                label = info[target.key].weight_version if info else None
                if version is None or label == version:
                    raise
                failed[target.key] = gone.get(target.key) or ServerError(
                    f"{target.key}: the server has weights {label!r} after it sampled from {version!r}: somebody has "
                    "started it again, or updated it"
                )
        return failed

    def close(self) -> None:
        """Give up what the routes hold here and on the servers. A later update opens them again."""
        for route in self._routes.values():
            route.close()
        self._routes.clear()

    def _replace(
        self,
        targets: Sequence[Target],
        tensors: Iterator[tuple[str, Tensor]],
        version: str,
        check: Callable[[Sequence[Target], dict[str, ServerInfo], _Sent], Errors],
    ) -> Errors:
        """Run one update. `check` gets the digests of the sent tensors before the servers get the new label."""
        started = time.monotonic()
        lanes, infos, unreached = self._lanes(targets)
        if not lanes:
            return unreached
        sent = _Sent({infos[one.key].dtype for one in targets if one.key in infos and one.ledger is not None})
        update = FleetUpdate(lanes, version, sent.note)
        limit = min(lane.route.limit(self._bucket_bytes, lane.receivers) for lane in lanes)
        name = targets[0].key if len(targets) == 1 else "rollout.servers"
        what = f"{name}: publishing weights"
        with progress(log, what, total=len(self.plan), unit="tensors", amount_unit="B") as state:
            try:
                for bucket in self.plan.buckets(tensors, limit, key=name):
                    update.send(bucket)
                    state.advance(len(bucket), amount=sum(tensor.nbytes for _, tensor in bucket))
                update.close()
                there = {one.key for one in update.left}
                update.drop(check([target for target in targets if target.key in there], infos, sent))
                update.finish()
            except NobodyLeft:
                pass
            except BaseException:
                update.abandon()
                raise
        update.undo_failed(resume=self._resume_failed)
        seconds = time.monotonic() - started
        self.report = PublishReport(version, len(self.plan), update.bytes_sent / 2**30, update.buckets, seconds)
        log.debug("%s: weights published: %s; failed: %s", name, self.report, update.failed)
        return {**unreached, **update.failed}

    def _lanes(self, targets: Sequence[Target]) -> tuple[list[Lane], dict[str, ServerInfo], Errors]:
        """Ask the servers for their state and put them on routes: (lanes, states, errors of those without one)."""
        keys = [target.key for target in targets]
        assert len(set(keys)) == len(keys), f"two servers of one key in {keys}"
        infos, failed = at_once({target.key: target.client.info for target in targets})
        lanes: dict[tuple[RouteName, Path | None], Lane] = {}
        routes: dict[str, RouteName] = {}
        for target in targets:
            if target.key in failed:
                continue
            try:
                name = self.choice.of(target.client, target.weights, infos[target.key])
                place = name, target.folder if name == "disk" else None
                if place not in self._routes:
                    self._routes[place] = self._new_route(name, target)
            except ServerError as error:
                failed[target.key] = error
                continue
            routes[target.key] = name
            lane = lanes.setdefault(place, Lane(self._routes[place], []))
            lane.receivers.append(Receiver(target.client, infos[target.key]))
        self.choice.tell(routes)
        return list(lanes.values()), infos, failed

    def _new_route(self, name: RouteName, target: Target) -> Route:
        if name != "disk":
            return route_of(name)
        if target.folder is None or self._student_folder is None:
            raise ServerError(f"{target.key}.weights=disk needs a folder that both machines see; set weights_folder")
        return DiskRoute(target.folder, self._student_folder)

    def _held(self, targets: Sequence[Target]) -> tuple[Held, Errors]:
        """Return the checksums of the servers, and errors. A server without checksums is in neither, with a warning."""
        found, failed = at_once({target.key: target.client.weights_checksum for target in targets})
        held = {key: checksums for key, checksums in found.items() if checksums is not None}
        for target in targets:
            if target.ledger is not None and target.key in found and target.key not in held:
                target.ledger.no_checksum()
        return held, failed


class _Sent:
    """Digests of the sent tensors in the dtypes of the servers. A change that no such dtype can hold does not count."""

    def __init__(self, dtypes: set[str]) -> None:
        self._by_dtype: dict[str, dict[str, bytes]] = {_served(dtype): {} for dtype in dtypes}

    def note(self, bucket: Bucket) -> None:
        """Add the tensors of a bucket."""
        import torch

        for dtype, digests in self._by_dtype.items():
            served = getattr(torch, dtype) if dtype else None
            for name, tensor in bucket:
                digests[name] = tensor_digest(tensor if served is None else tensor.to(served))

    def as_served(self, info: ServerInfo) -> dict[str, bytes]:
        """Return the digests for a server that answered `info`."""
        return self._by_dtype[_served(info.dtype)]


def _served(dtype: str) -> str:
    """The dtype to which a server casts; "" if it is unknown."""
    return dtype if dtype in SERVED_DTYPES else ""


def _nothing_to_check(_updated: Sequence[Target], _infos: dict[str, ServerInfo], _sent: _Sent) -> Errors:
    return {}


def _label(target: Target, version: str) -> Callable[[], None]:
    return lambda: target.client.label_weights(version)
