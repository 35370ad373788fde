"""Collective access to the rollout server: all ranks call it, and it samples from the student's current weights.

The HTTP client and the server process are on rank 0 only. Gathering the weights needs every rank. Invariants:
- A rollout comes from the weight version of its own step; any other is refused.
- The server's checksums show that the weights arrived and did not change during sampling (`rollout.publication`).
- A server that dies is restarted, receives the same weights again, and is asked only for the missing samples.
- A launch never reuses a version label of an earlier launch.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from tropd_mcore.errors import ServerDied, TropdError
from tropd_mcore.mcore.collective import on_rank_zero, raise_on_all_ranks, raise_the_first
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.weights_io import iterate_hf
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import Collected, SglangSampler
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Rollout, SampleRequest

log = logging.getLogger(__name__)

MakeStream = Callable[[], Iterator[tuple[str, Tensor]]]


class PolicyServer:
    """The rollout server for all ranks. `connect` is called on rank 0 only, when the server is first needed.

    With `release_memory`, the server has its memory only from a publication to the end of the sampling, and the trainer
    returns its cached memory before that. `clock` is the step's clock; it gets the phases `server` (waiting for the
    server) and `publish`.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        server: SupervisedServer | None,
        connect: Callable[[SupervisedServer], tuple[SglangSampler, WeightPublisher]],
        *,
        verify_sync: bool,
        release_memory: bool = False,
        clock: StepClock | None = None,
    ) -> None:
        self._model = model
        self._layout = layout
        self._control = layout.groups.control
        self._server = server
        self._connect = connect
        self._verify_sync = verify_sync
        self._release_memory = release_memory
        self._clock = clock or StepClock()
        self._sampler: SglangSampler | None = None
        self._publisher: WeightPublisher | None = None
        self._launch = on_rank_zero(lambda: uuid.uuid4().hex[:8], self._control)
        self._published: str | None = None
        self._started = False

    def sample(self, requests: list[SampleRequest], *, step: int) -> list[Rollout]:
        """Sample all requests from the student's current weights. Returns the rollouts in order on every rank.

        Collective. Samples without a usable answer are left out (see `SglangSampler`). Raises ServerError (ServerDied
        when all restarts are used up) and GateError (the weights did not arrive).
        """
        version = f"{self._launch}/step-{step:06d}"
        found = Collected()
        while True:
            with self._clock.phase("server"):
                self._start()
                died = self._resume_memory()
            if died is None:
                with self._clock.phase("publish"):
                    died = self._publish(version)
            if died is None:
                collect = partial(self._collect, requests, step, version, found)
                found = on_rank_zero(collect, self._control)
                died = found.died
            if died is None:
                with self._clock.phase("server"):
                    self._give_memory_back()
                return [rollout for request in requests if (rollout := found.rollouts.get(request.sample_id))]
            with self._clock.phase("server"):
                self._recover(died)

    def close(self) -> None:
        """Leave what the publisher holds on the server. Not collective."""
        if self._publisher is not None:
            self._publisher.close()

    def _collect(self, requests: list[SampleRequest], step: int, version: str, found: Collected) -> Collected:
        assert self._sampler is not None and self._publisher is not None
        collected = self._sampler.collect(requests, step=step, expected_version=version, found=found)
        if collected.died is None:
            try:
                self._publisher.check_unchanged()
            except ServerDied as died:
                collected.died = died
        return collected

    def _publish(self, version: str) -> ServerDied | None:
        """Publish the current weights as `version`. If the server dies meanwhile, every rank returns the error."""
        if self._published == version:
            return None
        verify_sync = self._verify_sync
        error: TropdError | None = None
        streams = _Streams(lambda: iterate_hf(self._model, self._layout), expected=2 if verify_sync else 1)
        if self._layout.rank == 0:
            assert self._publisher is not None
            try:
                if verify_sync:
                    self._publisher.verify_sync(streams.next, version)
                else:
                    self._publisher.publish(streams.next(), version)
            except TropdError as met:
                error = met
        streams.exhaust()
        try:
            raise_the_first(error, self._control)
        except ServerDied as died:
            return died
        self._published, self._verify_sync = version, False
        return None

    def _resume_memory(self) -> ServerDied | None:
        """Have the server take its memory back. If it died meanwhile, every rank returns the error."""
        if not self._release_memory:
            return None
        with raise_on_all_ranks(self._control):
            self._model.platform.empty_cache()
        return self._of_server(lambda server: server.resume_memory())

    def _give_memory_back(self) -> None:
        """Have the server give its memory back. One that dies meanwhile is restarted, and asked again."""
        if not self._release_memory:
            return
        self._published = None  # the weights are lost
        while (died := self._of_server(lambda server: server.release_memory())) is not None:
            self._recover(died)

    def _of_server(self, ask: Callable[[SupervisedServer], None]) -> ServerDied | None:
        """Run `ask` on rank 0. If the server died, every rank returns the error."""

        def asked() -> ServerDied | None:
            assert self._server is not None
            try:
                ask(self._server)
            except ServerDied as died:
                return died
            return None

        return on_rank_zero(asked, self._control)

    def _start(self) -> None:
        if self._started:
            return

        def start() -> None:
            assert self._server is not None
            self._server.wait_ready()
            self._sampler, self._publisher = self._connect(self._server)

        on_rank_zero(start, self._control)
        self._started = True

    def _recover(self, died: ServerDied) -> None:
        def recover() -> None:
            assert self._server is not None
            self._server.recover(died)
            self.close()
            self._sampler, self._publisher = self._connect(self._server)

        on_rank_zero(recover, self._control)
        self._published = None


class _Streams:
    """A fixed number of weight streams. Every rank runs each of them to its end, even if the reader fails.

    Each stream is collective, so a rank that stopped early would block the others.
    """

    def __init__(self, make: MakeStream, expected: int) -> None:
        self._make = make
        self._left = expected
        self._current: Iterator[tuple[str, Tensor]] = iter(())

    def next(self) -> Iterator[tuple[str, Tensor]]:
        """Finish the current stream and return the next one."""
        self._drain()
        assert self._left > 0, "more streams were asked for than the other ranks take part in"
        self._left -= 1
        self._current = self._make()
        return self._current

    def exhaust(self) -> None:
        """Run all remaining streams to their end."""
        self._drain()
        while self._left:
            self.next()
            self._drain()

    def _drain(self) -> None:
        for _ in self._current:
            pass
