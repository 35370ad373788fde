"""Rollout servers, a publisher and a sampler that only record their calls, for tests of the policy server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.glue.stubs import make_rollout, make_student, one_rank
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.rollout import policy_server as policy_server_module
from tropd_mcore.rollout.policy_server import PolicyServer, PolicyServers
from tropd_mcore.rollout.sampler import Collected
from tropd_mcore.types import SampleRequest

SAMPLES, TENSORS = 4, 3
Event = tuple[Any, ...]
Stream = Iterator[tuple[str, Tensor]]


Faults = list[Exception | dict[int, ServerError] | None]
"""Faults of one call after the other: an exception of the first server, or of the servers in the places given."""


@dataclass
class PolicySite:
    """Servers, a publisher and a sampler that only record their calls, and the weight streams of this rank.

    `faults` are raised one after the other by the next calls of `publish`, `verify_sync` or `collect`
    (None: no error).
    """

    layout: Layout
    verify_sync: bool = False
    publish_faults: Faults = field(default_factory=list)
    sample_faults: Faults = field(default_factory=list)
    unchanged_faults: Faults = field(default_factory=list)
    """Of the question after sampling whether the servers' weights are unchanged."""
    release: bool = False
    """Whether the servers give their memory back (release_memory)."""
    memory_faults: list[Exception | None] = field(default_factory=list)
    """Raised by the requests that move memory."""
    read_before_fault: int = 0
    """Tensors that the publisher takes before it fails."""
    servers: int = 1
    restarts: int = 10
    """How often each server can be started again."""
    starting: dict[int, int] = field(default_factory=dict)
    """Place of a restarted server -> how often it is looked at before it is ready; 0 if not given."""
    urls: tuple[int, ...] = ()
    """Places of servers that the job does not start."""
    silent: set[int] = field(default_factory=set)
    """Places of servers at a url that do not answer now."""
    alive: set[str] = field(default_factory=set)
    """Lost servers that need no new start."""
    slow: dict[int, set[int]] = field(default_factory=dict)
    """Step -> places of the servers that do not keep up in it."""
    unseen: dict[int, set[int]] = field(default_factory=dict)
    """Step -> places of the servers that get no sample in it."""
    events: list[Event] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    """Number of tensors that this rank consumed of each stream."""
    connections: int = 0
    closed: int = 0
    clock: StepClock = field(default_factory=StepClock)

    def policy(self) -> PolicyServer:
        """A launch. Collective."""
        student: Any = make_student(self.layout)
        student.platform = SimpleNamespace(name="cpu", empty_cache=lambda: self.events.append(("empty cache",)))
        self.fleet = {key_of(place): self._server(place) for place in range(self.servers)}
        self.sampler = SimpleNamespace(clients=[], lane=None, collect=self._collect)
        self.holds: dict[str, str] = {}
        here = self.fleet if self.layout.rank == 0 else {}
        tools: Any = SimpleNamespace(
            sampler=self.sampler,
            publisher=SimpleNamespace(
                publish=self._publish,
                verify_sync=self._verify,
                check_unchanged=self._check_unchanged,
                close=self._close,
                broadcasts_to=lambda _: False,
            ),
            connect=self._connect,
        )
        return PolicyServer(
            student,
            self.layout,
            PolicyServers(here, here),
            tools if self.layout.rank == 0 else None,
            verify_sync=self.verify_sync,
            release_memory=self.release,
            clock=self.clock,
        )

    def did(self, *kinds: str) -> list[Event]:
        """The events of these kinds in order."""
        return [event for event in self.events if event[0] in kinds]

    def weights(self, _model: Any, _layout: Layout, *, on_device: bool) -> Stream:
        """Stands in for `iterate_hf`. It is collective, so every rank must consume all of it."""
        self.streams.append(0)
        for index in range(TENSORS):
            self.streams[-1] += 1
            yield f"weight {index}", torch.zeros(1)

    def _server(self, place: int) -> Any:
        key = key_of(place)
        config = SimpleNamespace(hang_timeout_s=0.2, start_timeout_s=5.0, release_memory=True)
        return SimpleNamespace(
            spec=SimpleNamespace(key=key, called=key),
            config=config,
            client=SimpleNamespace(key=key),
            is_started=place not in self.urls,
            wait_ready=lambda: self.events.append(("ready",)),
            is_ready=lambda: self._is_ready(place),
            answers=lambda: place not in self.silent,
            ended=lambda: None,
            may_come_back=lambda: True,
            begin_recovery=lambda error: self._recover(place, error),
            release_memory=lambda: self._memory("release"),
            resume_memory=lambda: self._memory("resume"),
        )

    def _is_ready(self, place: int) -> bool:
        self.starting[place] = self.starting.get(place, 0) - 1
        return self.starting[place] < 0

    def _memory(self, what: str) -> None:
        self.events.append((what,))
        fault = self.memory_faults.pop(0) if self.memory_faults else None
        if fault is not None:
            raise fault

    def _recover(self, place: int, error: ServerError) -> None:
        if place in self.urls:
            raise error
        if self.restarts == 0:
            raise ServerDied(f"{error}; max_restarts are used up")
        self.restarts -= 1
        self.events.append(("recover", str(error)))

    def _connect(self, server: Any) -> Any:
        self.connections += 1
        return SimpleNamespace(client=server.client)

    def _close(self) -> None:
        self.closed += 1

    def _fault(self, faults: Faults, keys: list[str]) -> dict[str, ServerError]:
        """The faults of the next call by server. Raises those that concern no server."""
        fault = faults.pop(0) if faults else None
        if isinstance(fault, dict):
            return {key_of(place): error for place, error in fault.items()}
        if isinstance(fault, ServerError):
            return {keys[0]: fault}
        if fault is not None:
            raise fault
        return {}

    def _check_unchanged(self, targets: list[Any], version: str) -> dict[str, ServerError]:
        if any(self.unchanged_faults[:1]):
            self.events.append(("changed",))
        return self._fault(self.unchanged_faults, [target.client.key for target in targets])

    def _publish(self, targets: list[Any], tensors: Stream, version: str) -> dict[str, ServerError]:
        self.events.append(("publish", version, *self._numbers(targets)))
        return self._held(targets, version, self._take(targets, tensors))

    def _verify(self, targets: list[Any], make_stream: Callable[[], Stream], version: str) -> dict[str, ServerError]:
        self.events.append(("verify_sync", version, *self._numbers(targets)))
        failed = self._take(targets, make_stream()) or self._take(targets, make_stream())
        return self._held(targets, version, failed)

    def _held(self, targets: list[Any], version: str, failed: dict[str, ServerError]) -> dict[str, ServerError]:
        """Note who holds the version now."""
        self.holds |= {each.client.key: version for each in targets if each.client.key not in failed}
        return failed

    def _numbers(self, targets: list[Any]) -> tuple[int, ...]:
        """The places of the servers of a call, if there are several."""
        return tuple(int(target.client.key[-1]) for target in targets) if self.servers > 1 else ()

    def _take(self, targets: list[Any], tensors: Stream) -> dict[str, ServerError]:
        keys = [target.client.key for target in targets]
        if not any(self.publish_faults[:1]):
            self.publish_faults[:1] = []
            assert len(list(tensors)) == TENSORS
            return {}
        for _ in range(self.read_before_fault):
            next(tensors)
        return self._fault(self.publish_faults, keys)

    def _collect(
        self, requests: list[SampleRequest], *, step: int, expected_version: str, found: Collected
    ) -> Collected:
        """If all servers asked are lost, half of the missing samples have arrived; otherwise all."""
        missing = [request.sample_id for request in found.misses(requests)]
        self.events.append(("sample", step, expected_version, missing))
        asked = [client.key for client in self.sampler.clients]
        assert asked and all(self.holds.get(key) == expected_version for key in asked), "a server without the weights"
        lost = self._fault(self.sample_faults, [key_of(0)])
        if self.servers == 1 and any(not isinstance(error, ServerDied) for error in lost.values()):
            raise next(iter(lost.values()))
        answered = missing[: len(missing) // 2] if 0 < len(lost) == len(asked) else missing
        fresh = {name: make_rollout(name, "p", 3, version=f"answer {len(self.events)}") for name in answered}
        slow = {key_of(place) for place in self.slow.get(step, set())}
        unseen = {key_of(place) for place in self.unseen.get(step, set())}
        keeps_up = {key: key not in slow for key in asked if key not in unseen}
        return Collected({**found.rollouts, **fresh}, lost=lost, may_return=self.alive, keeps_up=keeps_up)


def key_of(place: int) -> str:
    """The configuration section of a server."""
    return f"rollout.servers.{place}"


def requests() -> list[SampleRequest]:
    ids = torch.arange(3).numpy()
    return [SampleRequest(f"s{i}", "p", ids, ids[:0], 3, False, None) for i in range(SAMPLES)]


def run(site: PolicySite, steps: list[int]) -> list[str]:
    """The versions that the steps were sampled at, in one launch. Rollouts of a step keep the order of the requests."""
    with mock.patch.object(policy_server_module, "iterate_hf", site.weights):
        policy = site.policy()
        for step in steps:
            rollouts = policy.sample(requests(), step=step)
            assert [rollout.sample_id for rollout in rollouts] == [f"s{i}" for i in range(SAMPLES)]
    return [event[2] for event in site.did("sample")]


def site_of(steps: list[int], **given: Any) -> PolicySite:
    """One launch of a single rank."""
    with one_rank() as layout:
        site = PolicySite(layout, **given)
        run(site, steps)
        return site
