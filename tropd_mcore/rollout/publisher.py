"""Sends the student's weights to the rollout server: checks them against a plan, sends buckets, labels and verifies.

This module does not gather shards (see `mcore.weights_io`). Invariants: a tensor is sent only if it is in the plan with
the same shape and dtype. The server gets the new version label only after every tensor of the plan has arrived and the
server's checksums agree. An update that stops half-way leaves a label that no sampler accepts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tropd_mcore.errors import GateError, ServerDied, ServerError, ServerHung
from tropd_mcore.progress import progress
from tropd_mcore.rollout.publication import PublicationLedger, tensor_digest
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_payload import shared_memory_room
from tropd_mcore.serving.weight_routes import Route, RouteName, route_of
from tropd_mcore.serving.wire import ScoringRequest, ServerInfo, WeightChecksums
from tropd_mcore.types import FloatArray, IntArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

BUCKET_BYTES = 512 * 2**20
"""Tensor bytes per request."""

SMALL_BYTES = 64 * 2**20
"""Size of a model above which sending it inside the requests gets a warning."""

UNDO_TIMEOUT_S = 30.0
"""Time-out of each of the two requests that clean up after a failed update."""

SERVED_DTYPES = ("float32", "bfloat16", "float16")
"""Values of dtype in /server_info that name the dtype to which the server casts."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that every update must contain: unsharded, with its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PublishReport:
    """Summary of one update."""

    version: str
    tensors: int
    gib: float
    buckets: int
    seconds: float


class WeightPublisher:
    """Sends full updates of the tensors in `plan` through `client`.

    `transport` names the route (`serving.weight_routes`). None means `shared` for a server that we started and `value`
    otherwise. If the shared memory is too small for a bucket, weights go by value, with a warning. `ledger` remembers
    the last publication across server restarts. Without a ledger, updates are not verified (gates.weight_sync=false).
    """

    def __init__(
        self,
        client: SglangClient,
        plan: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
        *,
        ledger: PublicationLedger | None = None,
        transport: RouteName | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._client = client
        self._plan = {name: PlannedTensor(name, tuple(shape), dtype) for name, shape, dtype in plan}
        self._ledger = ledger
        self._bucket_bytes = bucket_bytes
        assert self._plan, "a plan without tensors"
        self._sizes = [math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self._plan.values()]
        self._told_bytes = False
        self.route = self._usable(transport or ("shared" if client.same_host else "value"))
        """Name of the route."""
        self._route = route_of(self.route, client)

    def publish(self, tensors: Iterator[tuple[str, Tensor]], version: str) -> PublishReport:
        """Replace all weights of the server by `tensors` (any order, any device) and label them `version`.

        Sampling is paused during the update and the KV cache of the old weights is dropped. Raises ServerError if a
        tensor is unknown, repeated, missing or has another shape or dtype, or if the server refuses or does not report
        the new label. Raises GateError if its checksums show that it does not hold what was sent. After any error the
        server's label is not `version`.
        """
        ledger = self._ledger

        def check(sent: dict[str, bytes], info: ServerInfo) -> None:
            held = self._held() if ledger is not None else None
            if ledger is not None and held is not None:
                is_known = info.dtype in SERVED_DTYPES
                ledger.check(
                    sent,
                    held,
                    by_tensor=info.quantization is None and is_known,
                    may_round=not is_known and self._sends_float32(),
                )

        return self._replace(tensors, version, check)

    def close(self) -> None:
        """Give up what the route holds here and on the server. A later update opens it again."""
        self._route.close()

    def check_unchanged(self) -> None:
        """Raise GateError if the server's weights are not those after the last publication."""
        if self._ledger is not None and self._ledger.last is not None and (held := self._held()) is not None:
            self._ledger.check_unchanged(held)

    def _replace(
        self,
        tensors: Iterator[tuple[str, Tensor]],
        version: str,
        check: Callable[[dict[str, bytes], ServerInfo], None],
    ) -> PublishReport:
        """Run one update. `check` gets the digests of the sent tensors before the server gets its new label."""
        started = time.monotonic()
        info = self._client.info()
        self._tell_bytes(info)
        update = _Update(self._client, self._route, info, version=version)
        limit = self._route.limit(self._bucket_bytes, info)
        sent: dict[str, bytes] = {}
        what = f"{self._client.key}: publishing weights"
        with progress(log, what, total=len(self._plan), unit="tensors", amount_unit="B") as state:
            try:
                for bucket in self._buckets(tensors, limit):
                    update.send(bucket)
                    sent |= self._digests(bucket, info)
                    state.advance(len(bucket), amount=sum(tensor.nbytes for _, tensor in bucket))
                update.close()
                check(sent, info)
                update.finish()
            except ServerHung:
                # the server will be killed or the run ends; any further request would hang as well
                self._route.close(tell_server=False)
                raise
            except BaseException:
                update.abandon()
                self._route.close()  # what is under way there must not become part of the next update
                raise
        reported = self._client.info().weight_version
        if reported != version:
            raise ServerError(f"{self._client.key}: the server reports weights {reported!r} after one to {version!r}")
        seconds = time.monotonic() - started
        report = PublishReport(version, len(self._plan), update.bytes_sent / 2**30, update.buckets, seconds)
        log.debug("%s: weights published: %s", self._client.key, report)
        return report

    def _digests(self, bucket: list[tuple[str, Tensor]], info: ServerInfo) -> dict[str, bytes]:
        """Digests of the tensors in the server's dtype. A change that this dtype cannot hold does not count."""
        import torch

        if self._ledger is None:
            return {}
        served = getattr(torch, info.dtype) if info.dtype in SERVED_DTYPES else None
        return {name: tensor_digest(tensor if served is None else tensor.to(served)) for name, tensor in bucket}

    def _sends_float32(self) -> bool:
        return any(str(tensor.dtype) == "torch.float32" for tensor in self._plan.values())

    def _held(self) -> WeightChecksums | None:
        """The server's checksums. If it has none, None and one warning per launch."""
        held = self._client.weights_checksum()
        if held is None and self._ledger is not None:
            self._ledger.no_checksum()
        return held

    def probe(self, token_ids: IntArray) -> FloatArray:
        """Return the server's log-probs of token_ids[1:] (float32, nats, temperature 1), to compare with the trainer's.

        Raises ServerError.
        """
        (scores,) = self._client.score([ScoringRequest(token_ids, first=1)])
        if isinstance(scores, ServerError):
            raise scores
        return scores.logp_N

    def verify_sync(self, make_stream: Callable[[], Iterator[tuple[str, Tensor]]], version: str) -> None:
        """Prove that an update sets every weight of the server: publish, destroy the weights, publish again, compare.

        SGLang silently ignores unknown names, so a wrong name in the plan would leave an old weight in place. The
        server's checksum over all ranks shows this for every device and layout. At the end the server has `version`.
        Raises GateError if the checksums differ. A server without checksums gets a single update that is not verified.
        """
        self._replace(make_stream(), f"{version}:first", lambda _sent, _info: None)
        first = self._held()
        if first is None:
            self._client.label_weights(version)
            return
        self._client.randomize_weights()
        destroyed = self._held()
        if destroyed is None or destroyed.total == first.total:
            raise GateError(f"{self._client.key}: the server kept its weights when asked to destroy them")

        def check(sent: dict[str, bytes], _info: ServerInfo) -> None:
            held = self._held()
            if held is None or held.total != first.total:
                raise GateError(
                    f"{self._client.key}: two updates with the same {len(self._plan)} tensors left different weights: "
                    "the server has weights that no tensor of the plan sets, or an update did not arrive, so training "
                    "would sample from other weights than the student's (gates.weight_sync)"
                )
            if self._ledger is not None:
                self._ledger.record(sent, held)

        self._replace(make_stream(), version, check)

    def _usable(self, wanted: RouteName) -> RouteName:
        """The wanted route, or `value` if the shared memory is too small for a bucket."""
        if wanted != "shared":
            return wanted
        needed = max(*self._sizes, min(self._bucket_bytes, sum(self._sizes)))
        if needed <= shared_memory_room():
            return "shared"
        log.warning(
            "%s: weight updates need %d MiB of /dev/shm but %d are usable; weights go through HTTP by value, about a "
            "hundred times slower (docker: --shm-size)",
            self._client.key,
            needed >> 20,
            shared_memory_room() >> 20,
        )
        return "value"

    def _tell_bytes(self, info: ServerInfo) -> None:
        """Warn once per launch if a large model goes by value to a server that runs elsewhere."""
        if self._client.same_host or self.route != "value" or sum(self._sizes) <= SMALL_BYTES or self._told_bytes:
            return
        self._told_bytes = True
        log.warning(
            "%s: each publication sends %.1f GB over HTTP (%d copies of the weights in base64); %s.weights=broadcast "
            "sends the weights once",
            self._client.key,
            sum(self._sizes) * info.tensor_parallel * 4 / 3 / 1e9,
            info.tensor_parallel,
            self._client.key,
        )

    def _buckets(self, tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield checked buckets. The last one is yielded only if all tensors of the plan were seen."""
        missing = dict(self._plan)
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in tensors:
            self._check(name, tensor, missing)
            del missing[name]
            if bucket and size + tensor.nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if missing:
            raise ServerError(
                f"{self._client.key}: {len(missing)} of {len(self._plan)} tensors are missing from the weights to "
                f"publish, the first is {next(iter(missing))}"
            )
        yield bucket

    def _check(self, name: str, tensor: Tensor, missing: dict[str, PlannedTensor]) -> None:
        planned = self._plan.get(name)
        if planned is None:
            raise ServerError(f"{self._client.key}: {name} is not a tensor of the plan ({len(self._plan)} tensors)")
        if name not in missing:
            raise ServerError(f"{self._client.key}: {name} comes twice in one update")
        if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
            raise ServerError(
                f"{self._client.key}: {name} is {tensor.dtype} {list(tensor.shape)}; the plan says "
                f"{planned.dtype} {list(planned.shape)}"
            )


class _Update:
    """One update session. The first bucket opens it, so an error before that does not touch the server."""

    def __init__(self, client: SglangClient, route: Route, info: ServerInfo, *, version: str) -> None:
        self.buckets = 0
        self.bytes_sent = 0
        self._client = client
        self._route = route
        self._info = info
        self._version = version
        self._to_undo: list[Callable[[float], None]] = []

    def send(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Load one bucket, under a label that marks the update as incomplete."""
        if not self._to_undo:
            self._client.pause()
            self._to_undo.append(self._client.resume)
            self._client.begin_weight_update()
            self._to_undo.append(self._client.end_weight_update)
        self._route.send(bucket, self._info, version=f"{self._version}:incomplete")
        self.buckets += 1
        self.bytes_sent += sum(tensor.nbytes for _, tensor in bucket)

    def close(self) -> None:
        """End the session and drop the KV cache of the old weights. Sampling stays paused."""
        self._client.end_weight_update()
        self._to_undo.pop()
        self._client.flush_cache()

    def finish(self) -> None:
        """Label the new weights and resume sampling."""
        self._client.label_weights(self._version)
        self._client.resume()
        self._to_undo.pop()

    def abandon(self) -> None:
        """Close a session that `finish` did not end. Errors here are logged, so that they do not hide the first error.

        Each request may take UNDO_TIMEOUT_S. If the server is gone, no further request is sent.
        """
        while self._to_undo:
            try:
                self._to_undo.pop()(UNDO_TIMEOUT_S)
            except ServerError as error:
                log.warning("%s (while an update was abandoned)", error)
                if isinstance(error, ServerDied):
                    return
