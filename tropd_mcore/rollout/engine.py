"""The rollout side of a step on one rank: a supervised server, its sampler and its publisher.

Not for the other ranks: they take part in gathering weights only. Invariant: `sample` returns rollouts of the expected
version, all of them, or raises; a server that died is restarted at most `max_restarts` times, gets the current weights
again, and is asked only for the samples that are still missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import ServerDied
from tropd_mcore.rollout.publisher import PublishReport, WeightPublisher
from tropd_mcore.rollout.sampler import Collected, SglangSampler
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Rollout, SampleRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)


class RolloutEngine:
    """Owns the server of `rollout.server`; `start` and `wait_ready` before use, or as a context manager.

    `plan` lists (Hugging Face name, shape, dtype) of every weight. `spec.config` is `config.server`.
    """

    def __init__(
        self,
        spec: ServerSpec,
        config: RolloutConfig,
        *,
        plan: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
        eos_ids: tuple[int, ...],
        vocab_size: int,
        seed: int,
    ) -> None:
        self.server = SupervisedServer(spec)
        self._config = config
        self._plan = list(plan)
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._seed = seed
        self._sampler: SglangSampler | None = None
        self._publisher: WeightPublisher | None = None

    @property
    def sampler(self) -> SglangSampler:
        assert self._sampler is not None, "start() first"
        return self._sampler

    @property
    def publisher(self) -> WeightPublisher:
        assert self._publisher is not None, "start() first"
        return self._publisher

    def start(self) -> None:
        """Start the server and return at once. Raises ServerError."""
        self.server.start()
        client = self.server.client
        self._sampler = SglangSampler(
            client, self._config, eos_ids=self._eos_ids, vocab_size=self._vocab_size, seed=self._seed
        )
        self._publisher = WeightPublisher(client, self._plan)

    def wait_ready(self) -> None:
        """Wait until the server generates. Raises ServerError."""
        self.server.wait_ready()

    def publish(self, tensors: Iterator[tuple[str, Tensor]], version: str) -> PublishReport:
        """Replace the server's weights (see `WeightPublisher.publish`). Raises ServerError, ServerDied.

        A stream can be read once, so a server that dies meanwhile is for the caller: `recover`, then publish again.
        """
        return self.publisher.publish(tensors, version)

    def recover(self, error: ServerDied) -> None:
        """Restart the server, whose weights are then those of the model folder. Raises ServerDied when it may not."""
        self.server.recover(error)

    def sample(
        self, requests: list[SampleRequest], *, step: int, expected_version: str, republish: Callable[[], object]
    ) -> list[Rollout]:
        """Return one rollout a request, in their order, sampled from weights `expected_version`.

        `republish` puts the current weights on a restarted server, under `expected_version`. Raises as
        `SglangSampler.sample`; ServerDied once the restarts are used up.
        """
        collected = Collected()
        while True:
            collected = self.sampler.collect(requests, step=step, expected_version=expected_version, found=collected)
            if collected.died is None:
                return [collected.rollouts[request.sample_id] for request in requests]
            log.warning("%d of %d samples were finished", len(collected.rollouts), len(requests))
            self._recover_with_weights(collected.died, republish)

    def stop(self) -> None:
        """Stop the server that was started."""
        self.server.stop()

    def __enter__(self) -> RolloutEngine:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _recover_with_weights(self, died: ServerDied, republish: Callable[[], object]) -> None:
        while True:
            self.server.recover(died)
            try:
                republish()
            except ServerDied as error:
                died = error
                continue
            return
