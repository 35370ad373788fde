"""Sends the student's weights to one rollout server: the form of `fleet_publisher` for a single one.

Invariants: those of `fleet_publisher`. Any failure is raised, and the server samples again under a label that no
sampler accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from tropd_mcore.errors import ServerError
from tropd_mcore.rollout.fleet_publisher import BUCKET_BYTES, FleetPublisher, PublishReport, Target
from tropd_mcore.rollout.publication import PublicationLedger
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_routes import Errors, RouteName
from tropd_mcore.serving.wire import ScoringRequest
from tropd_mcore.types import FloatArray, IntArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class WeightPublisher:
    """Sends full updates of the tensors in `plan` through `client`.

    `transport` names the route (`serving.weight_routes`). None means `shared` for a server that we started. For any
    other it means `value` up to `route_choice.SMALL_BYTES` of weights and `broadcast` above. If the shared memory is
    too small for a bucket, weights go by value, with a warning. `ledger` remembers the last publication across server
    restarts. Without a ledger, updates are not verified (gates.weight_sync=false).
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
        self._fleet = FleetPublisher(plan, bucket_bytes=bucket_bytes, resume_failed=True)
        self._target = Target(client, ledger, transport)
        self.route = self._fleet.choice.wanted(client, transport)
        """Name of the route."""

    def publish(self, tensors: Iterator[tuple[str, Tensor]], version: str) -> PublishReport:
        """Replace all weights of the server by `tensors` (any order, any device) and label them `version`.

        Sampling is paused during the update and the KV cache of the old weights is dropped. Raises ServerError if a
        tensor is unknown, repeated, missing or has another shape or dtype, or if the server refuses or does not report
        the new label. Raises GateError if its checksums show that it does not hold what was sent. After any error the
        server's label is not `version`.
        """
        _raise(self._fleet.publish([self._target], tensors, version))
        assert self._fleet.report is not None
        return self._fleet.report

    def close(self) -> None:
        """Give up what the route holds here and on the server. A later update opens it again."""
        self._fleet.close()

    def check_unchanged(self) -> None:
        """Raise GateError if the server's weights are not those after the last publication."""
        _raise(self._fleet.check_unchanged([self._target]))

    def probe(self, token_ids: IntArray) -> FloatArray:
        """Return the server's log-probs of token_ids[1:] (float32, nats, temperature 1), to compare with the trainer's.

        Raises ServerError.
        """
        (scores,) = self._client.score([ScoringRequest(token_ids, first=1)])
        if isinstance(scores, ServerError):
            raise scores
        return scores.logp_N

    def verify_sync(self, make_stream: Callable[[], Iterator[tuple[str, Tensor]]], version: str) -> None:
        """Prove that an update sets every weight of the server, as `FleetPublisher.verify_sync` does.

        Raises GateError if the checksums differ, and ServerError like `publish`.
        """
        _raise(self._fleet.verify_sync([self._target], make_stream, version))


def _raise(errors: Errors) -> None:
    """Raise the error of the only server, if it has one."""
    for error in errors.values():
        raise error
