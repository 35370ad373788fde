"""One update of several servers: opens it, sends buckets in the background, labels the new weights or abandons them.

This module does not check the stream, choose routes or judge checksums (see `weight_plan`, `route_choice` and
`fleet_publisher`). Invariants: the first bucket opens the update, so an error before that touches no server. A bucket
is sent while the next one is gathered, and at most these two exist. A server that fails drops out, the others go on.
A server that dropped out never gets the new label.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tropd_mcore.errors import GroupBroken, ServerDied, ServerError, ServerHung
from tropd_mcore.serving.background import Background, at_once
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_routes import Bucket, Errors, Receiver, Route

log = logging.getLogger(__name__)

UNDO_TIMEOUT_S = 30.0
"""Time-out of each of the two requests that clean up after a failed update, and longest wait for a bucket that is under
way when this process is interrupted."""


class NobodyLeft(Exception):
    """Every server has dropped out of the update, so no more of the stream is needed."""


@dataclass
class Lane:
    """The servers of one route."""

    route: Route
    receivers: list[Receiver]


@dataclass
class _Session:
    """What has to be undone on one server if the update fails."""

    client: SglangClient
    to_undo: list[Callable[[float], None]] = field(default_factory=list)

    def open(self, *, in_session: bool) -> None:
        self.client.pause()
        self.to_undo.append(self.client.resume)
        if in_session:
            self.client.begin_weight_update()
            self.to_undo.append(self.client.end_weight_update)

    def close(self, *, in_session: bool) -> None:
        """End the session and drop the KV cache of the old weights. Sampling stays paused."""
        if in_session:
            self.client.end_weight_update()
            self.to_undo.pop()
        self.client.flush_cache()

    def finish(self, version: str) -> None:
        """Label the new weights and resume sampling."""
        self.client.label_weights(version)
        self.client.resume()
        self.to_undo.clear()
        reported = self.client.info().weight_version
        if reported != version:
            raise ServerError(f"{self.client.key}: the server reports weights {reported!r} after one to {version!r}")

    def abandon(self, *, resume: bool) -> None:
        """Close what is open. Errors here are logged, so that they do not hide the first error.

        Each request may take UNDO_TIMEOUT_S. If the server is gone, no further request is sent.
        """
        undo, self.to_undo = self.to_undo if resume else self.to_undo[1:], []
        while undo:
            try:
                undo.pop()(UNDO_TIMEOUT_S)
            except ServerError as error:
                log.warning("%s (while an update was abandoned)", error)
                if isinstance(error, ServerDied):
                    return


class FleetUpdate:
    """An update to `version` over `lanes`. `note` is called with each bucket while it is sent.

    `failed` has the error of each server that dropped out.
    """

    def __init__(self, lanes: Sequence[Lane], version: str, note: Callable[[Bucket], None]) -> None:
        self.buckets = 0
        self.bytes_sent = 0
        self.failed: Errors = {}
        self._lanes = lanes
        self._version = version
        self._note = note
        self._sessions = {one.key: _Session(one.client) for lane in lanes for one in lane.receivers}
        self._sending: Background[list[Errors]] | None = None
        self._bucket: Bucket = []

    @property
    def left(self) -> list[Receiver]:
        """The servers that have not failed."""
        return [one for lane in self._lanes for one in self._of(lane)]

    def _of(self, lane: Lane) -> list[Receiver]:
        return [one for one in lane.receivers if one.key not in self.failed]

    def _used(self) -> list[tuple[Lane, list[Receiver]]]:
        return [(lane, left) for lane in self._lanes if (left := self._of(lane))]

    def send(self, bucket: Bucket) -> None:
        """Send one bucket in the background, under a label that marks the update as incomplete.

        Waits for the bucket before. Raises NobodyLeft.
        """
        self._settle()
        if not self.buckets:
            self._open(bucket)
        _settle_devices(bucket)
        self._bucket = bucket
        self._sending = Background(lambda: self._send(bucket))
        self.buckets += 1
        self.bytes_sent += sum(tensor.nbytes for _, tensor in bucket)

    def _open(self, bucket: Bucket) -> None:
        self._at_all(lambda session, lane: session.open(in_session=lane.route.in_session))
        for lane, left in self._used():
            self._drop(lane.route.open(bucket, left, self._incomplete))
        self._check_left()

    def _send(self, bucket: Bucket) -> list[Errors]:
        """Send one bucket on all routes at once. Runs in a thread."""
        running = [Background(partial(lane.route.send, bucket, left, self._incomplete)) for lane, left in self._used()]
        try:
            self._note(bucket)
        finally:
            for route in running:
                route.wait()
        return [route.result() for route in running]

    @property
    def _incomplete(self) -> str:
        return f"{self._version}:incomplete"

    def _settle(self) -> None:
        """Wait until the bucket that is under way has arrived. Raises NobodyLeft."""
        if self._sending is None:
            return
        for failed in self._sending.result():
            self._drop(failed)
        self._sending = None
        for lane, left in self._used():
            self._drop(lane.route.repair(self._bucket, left, self._incomplete))
        self._bucket = []
        self._check_left()

    def close(self) -> None:
        """End the sessions and drop the KV caches of the old weights. Sampling stays paused. Raises NobodyLeft."""
        self._settle()
        for lane, left in self._used():
            self._drop(lane.route.finish(left, self._incomplete))
        self._at_all(lambda session, lane: session.close(in_session=lane.route.in_session))
        self._check_left()

    def finish(self) -> None:
        """Label the new weights and resume sampling."""
        self._at_all(lambda session, _lane: session.finish(self._version))

    def drop(self, failed: Errors) -> None:
        """Leave these servers out from now on. Raises NobodyLeft."""
        self._drop(failed)
        self._check_left()

    def _at_all(self, call: Callable[[_Session, Lane], None]) -> None:
        calls = {one.key: partial(call, self._sessions[one.key], lane) for lane, left in self._used() for one in left}
        self._drop(at_once(calls)[1])

    def _drop(self, failed: Errors) -> None:
        for key, error in failed.items():
            self.failed.setdefault(key, error)

    def _check_left(self) -> None:
        if not self.left:
            raise NobodyLeft

    def undo_failed(self, *, resume: bool) -> None:
        """Clean up on the servers that failed; without `resume` they stay paused."""
        self._abandon([key for key in self._sessions if key in self.failed], resume=resume)

    def abandon(self) -> None:
        """Clean up on all servers, after an error that ends the update. Sampling goes on, under an incomplete label.

        Waits for a bucket that is under way, whose requests have limits of their own.
        """
        if self._sending is not None:
            self._sending.wait()
            try:
                for failed in self._sending.result():
                    self._drop(failed)
            except Exception:  # the first error is the one that is raised
                log.exception("another error, after the one that ends the update")
            self._sending = None
        for key, error in self.failed.items():
            log.warning("%s (while an update was abandoned)", error)
            log.debug("%s dropped out", key)
        self._abandon(list(self._sessions), resume=True)

    def _abandon(self, keys: list[str], *, resume: bool) -> None:
        # one that hangs would hang again, and one that waits in a broadcast would answer nothing
        calls = {
            key: partial(self._sessions[key].abandon, resume=resume)
            for key in keys
            if not isinstance(self.failed.get(key), ServerHung | GroupBroken)
        }
        at_once(calls)
        for lane in self._lanes:
            if any(one.key in keys for one in lane.receivers):
                # what is under way there must not become part of the next update
                lane.route.close(
                    untold=[key for key in keys if isinstance(self.failed.get(key), ServerDied | GroupBroken)]
                )


def _settle_devices(bucket: Bucket) -> None:
    """Let the tensors of a GPU be complete: the thread that sends them does not follow the stream of this one."""
    import torch

    for device in {tensor.device for _, tensor in bucket if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
