"""The rollout server seen by all ranks: when weights are published and proven, and the cost of a server death."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.glue.faults import on_ranks
from tests.glue.stubs import make_layout, make_rollout, make_student, one_rank
from tropd_mcore.errors import GateError, ServerDied, ServerError, TropdError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.monitor import clock as clock_module
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.rollout import policy_server as policy_server_module
from tropd_mcore.rollout.policy_server import PolicyServer
from tropd_mcore.rollout.sampler import Collected
from tropd_mcore.types import SampleRequest

SAMPLES, TENSORS = 4, 3
Event = tuple[Any, ...]
Stream = Iterator[tuple[str, Tensor]]


@dataclass
class PolicySite:
    """A server, a publisher and a sampler that only record their calls, and the weight streams of this rank.

    `faults` are raised one after the other by the next calls of `publish`, `verify_sync` or `collect`
    (None: no error).
    """

    layout: Layout
    verify_sync: bool = False
    publish_faults: list[Exception | None] = field(default_factory=list)
    sample_faults: list[Exception | None] = field(default_factory=list)
    unchanged_faults: list[Exception | None] = field(default_factory=list)
    """Raised after sampling, when the server is asked whether its weights are unchanged."""
    release: bool = False
    """Whether the server gives its memory back (release_memory)."""
    memory_faults: list[Exception | None] = field(default_factory=list)
    """Raised by the requests that move memory."""
    read_before_fault: int = 0
    """Tensors that the publisher takes before it fails."""
    events: list[Event] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    """Number of tensors that this rank consumed of each stream."""
    connections: int = 0
    closed: list[int] = field(default_factory=list)
    """Connections whose publisher was closed, from 1 on."""
    clock: StepClock = field(default_factory=StepClock)

    def policy(self) -> PolicyServer:
        """A launch. Collective."""
        server: Any = SimpleNamespace(
            wait_ready=self._wait_ready,
            recover=self._recover,
            release_memory=lambda: self._memory("release"),
            resume_memory=lambda: self._memory("resume"),
        )
        student: Any = make_student(self.layout)
        student.platform = SimpleNamespace(empty_cache=lambda: self.events.append(("empty cache",)))
        return PolicyServer(
            student,
            self.layout,
            server if self.layout.rank == 0 else None,
            self._connect,  # type: ignore[arg-type]
            verify_sync=self.verify_sync,
            release_memory=self.release,
            clock=self.clock,
        )

    def did(self, *kinds: str) -> list[Event]:
        """The events of these kinds in order."""
        return [event for event in self.events if event[0] in kinds]

    def weights(self, _model: Any, _layout: Layout) -> Stream:
        """Stands in for `iterate_hf`. It is collective, so every rank must consume all of it."""
        self.streams.append(0)
        for index in range(TENSORS):
            self.streams[-1] += 1
            yield f"weight {index}", torch.zeros(1)

    def _memory(self, what: str) -> None:
        self.events.append((what,))
        fault = self.memory_faults.pop(0) if self.memory_faults else None
        if fault is not None:
            raise fault

    def _wait_ready(self) -> None:
        self.events.append(("ready",))

    def _recover(self, died: ServerDied) -> None:
        self.events.append(("recover", str(died)))

    def _connect(self, server: Any) -> tuple[Any, Any]:
        self.connections += 1
        number = self.connections
        sampler = SimpleNamespace(collect=lambda requests, **given: self._collect(number, requests, **given))
        return sampler, SimpleNamespace(
            publish=self._publish,
            verify_sync=self._verify,
            check_unchanged=self._check_unchanged,
            close=lambda: self.closed.append(number),
        )

    def _check_unchanged(self) -> None:
        fault = self.unchanged_faults.pop(0) if self.unchanged_faults else None
        if fault is not None:
            self.events.append(("changed",))
            raise fault

    def _publish(self, tensors: Stream, version: str) -> None:
        self.events.append(("publish", version))
        self._take(tensors)

    def _verify(self, make_stream: Callable[[], Stream], version: str) -> None:
        self.events.append(("verify_sync", version))
        self._take(make_stream())
        self._take(make_stream())

    def _take(self, tensors: Stream) -> None:
        fault = self.publish_faults.pop(0) if self.publish_faults else None
        if fault is None:
            assert len(list(tensors)) == TENSORS
            return
        for _ in range(self.read_before_fault):
            next(tensors)
        raise fault

    def _collect(
        self, connection: int, requests: list[SampleRequest], *, step: int, expected_version: str, found: Collected
    ) -> Collected:
        """After a server death, half of the missing samples have arrived."""
        assert connection == self.connections, "a client of the server that died was asked"
        missing = [request.sample_id for request in requests if request.sample_id not in found.rollouts]
        self.events.append(("sample", step, expected_version, missing))
        fault = self.sample_faults.pop(0) if self.sample_faults else None
        if fault is not None and not isinstance(fault, ServerDied):
            raise fault
        answered = missing[: len(missing) // 2] if fault is not None else missing
        fresh = {name: make_rollout(name, "p", 3, version=f"answer {len(self.events)}") for name in answered}
        return Collected({**found.rollouts, **fresh}, died=fault if isinstance(fault, ServerDied) else None)


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


def test_the_weights_of_a_step_are_published_once_and_before_it_is_sampled() -> None:
    site = site_of([0, 0, 1])
    kinds = [event[0] for event in site.events]
    assert kinds == ["ready", "publish", "sample", "sample", "publish", "sample"]
    published, sampled = site.did("publish"), site.did("sample")
    assert [version for _, version in published] == [sampled[0][2], sampled[2][2]]
    assert sampled[0][2] == sampled[1][2] != sampled[2][2]
    assert [step for _, step, _, _ in sampled] == [0, 0, 1] and site.streams == [TENSORS] * 2


def test_the_server_is_connected_once_and_only_when_it_is_needed() -> None:
    with one_rank() as layout:
        site = PolicySite(layout)
        with mock.patch.object(policy_server_module, "iterate_hf", site.weights):
            site.policy()
        assert site.events == [] and site.connections == 0
        run(site, [0, 1, 2])
    assert len(site.did("ready")) == site.connections == 1


def test_only_the_first_publication_of_a_launch_is_proven() -> None:
    site = site_of([3, 4, 5], verify_sync=True)
    assert [event[0] for event in site.did("verify_sync", "publish")] == ["verify_sync", "publish", "publish"]
    assert site.streams == [TENSORS] * 4
    assert site_of([0, 1], verify_sync=False).did("verify_sync") == []


def test_a_proof_interrupted_by_a_server_death_is_repeated() -> None:
    site = site_of([0, 1], verify_sync=True, publish_faults=[None, ServerDied("gone")])
    assert [event[0] for event in site.events] == [
        "ready", "verify_sync", "recover", "verify_sync", "sample", "publish", "sample",
    ]  # fmt: skip
    assert site.streams == [TENSORS] * 5


def test_a_failed_proof_stops_the_launch() -> None:
    with one_rank() as layout:
        site = PolicySite(layout, verify_sync=True, publish_faults=[GateError("the server kept its weights")])
        with pytest.raises(GateError, match="kept its weights"):
            run(site, [0])
    assert site.did("sample", "recover") == [] and site.streams == [TENSORS] * 2


@pytest.mark.parametrize("taken", [0, 1, TENSORS])
def test_a_server_that_dies_during_a_publication_is_restarted_and_gets_the_weights_again(taken: int) -> None:
    site = site_of([0], publish_faults=[ServerDied("gone")], read_before_fault=taken)
    assert [event[0] for event in site.events] == ["ready", "publish", "recover", "publish", "sample"]
    assert site.did("recover") == [("recover", "gone")] and site.streams == [TENSORS] * 2
    assert len({event[1] for event in site.did("publish")}) == 1 and site.connections == 2


def test_after_a_server_death_weights_are_published_again_and_only_missing_samples_requested() -> None:
    site = site_of([7], sample_faults=[ServerDied("gone"), ServerDied("gone again")])
    assert [event[0] for event in site.events] == [
        "ready", "publish", "sample", "recover", "publish", "sample", "recover", "publish", "sample",
    ]  # fmt: skip
    assert [event[3] for event in site.did("sample")] == [["s0", "s1", "s2", "s3"], ["s2", "s3"], ["s3"]]
    assert len({event[1] for event in site.did("publish")}) == 1


def test_rollouts_of_weights_that_changed_while_they_were_sampled_are_refused_on_every_rank() -> None:
    given = {"unchanged_faults": [None, GateError("the server's weights changed after their publication")]}
    one, two = on_ranks(on_this_rank, 2, [0, 1, 2], given)
    assert one[0] == two[0] == "GateError: the server's weights changed after their publication"
    assert [event[0] for event in one[2]] == ["ready", "publish", "sample", "publish", "sample", "changed"]


def test_a_server_that_dies_while_its_weights_are_checked_gets_them_again_and_no_sample_is_requested_twice() -> None:
    site = site_of([0], unchanged_faults=[ServerDied("gone")])
    assert [event[0] for event in site.events] == [
        "ready",
        "publish",
        "sample",
        "changed",
        "recover",
        "publish",
        "sample",
    ]
    assert [event[3] for event in site.did("sample")] == [["s0", "s1", "s2", "s3"], []]


def test_answers_received_before_a_server_died_are_kept() -> None:
    with one_rank() as layout:
        site = PolicySite(layout, sample_faults=[ServerDied("gone")])
        with mock.patch.object(policy_server_module, "iterate_hf", site.weights):
            rollouts = site.policy().sample(requests(), step=0)
    assert [rollout.policy_version for rollout in rollouts] == ["answer 3"] * 2 + ["answer 6"] * 2


def test_a_server_that_died_between_two_steps_gets_the_weights_again() -> None:
    site = site_of([0, 0], sample_faults=[None, ServerDied("gone")])
    assert [event[0] for event in site.did("publish", "sample")] == ["publish", "sample", "sample", "publish", "sample"]
    assert site.closed == [1] and site.connections == 2, "the publisher to the server that died holds nothing"


@pytest.mark.parametrize("where", ["publish_faults", "sample_faults"])
def test_an_error_other_than_a_server_death_is_not_retried(where: str) -> None:
    with one_rank() as layout:
        site = PolicySite(layout, **{where: [ServerError("refused")]})
        with pytest.raises(ServerError, match="refused"):
            run(site, [0])
    assert site.did("recover") == [] and len(site.did("publish")) == 1


def test_a_version_label_contains_the_step_and_is_unique_to_its_launch() -> None:
    with one_rank() as layout:
        launches = [run(PolicySite(layout), [0, 1, 12]) for _ in range(3)]
    labels = [label for launch in launches for label in launch]
    assert len(set(labels)) == 9
    assert all([label.rpartition("/")[2] for label in launch] == ["step-000000", "step-000001", "step-000012"]
               for launch in launches)  # fmt: skip


def on_this_rank(steps: list[int], given: dict[str, Any]) -> tuple[str, list[int], list[Event], int]:
    """(error, tensors of each stream, events, connections) of this rank."""
    site = PolicySite(make_layout("data"), **given)
    error = ""
    try:
        run_everywhere(site, steps)
    except TropdError as met:
        error = f"{type(met).__name__}: {met}"
    return error, site.streams, site.events, site.connections


def run_everywhere(site: PolicySite, steps: list[int]) -> None:
    with mock.patch.object(policy_server_module, "iterate_hf", site.weights):
        policy = site.policy()
        for step in steps:
            rollouts = policy.sample(requests(), step=step)
            assert [rollout.sample_id for rollout in rollouts] == [f"s{i}" for i in range(SAMPLES)]


def test_only_rank_zero_uses_http_and_every_rank_takes_part_in_every_weight_stream() -> None:
    given = {"verify_sync": True, "sample_faults": [None, ServerDied("gone")]}
    (error, streams, events, connections), *others = on_ranks(on_this_rank, 2, [0, 1], given)
    assert error == "" and streams == [TENSORS] * 4 and connections == 2
    assert [event[0] for event in events] == [
        "ready", "verify_sync", "sample", "publish", "sample", "recover", "publish", "sample",
    ]  # fmt: skip
    assert others == [("", streams, [], 0)]


@pytest.mark.parametrize("verify_sync", [False, True])
@pytest.mark.parametrize("taken", [0, 2])
def test_every_rank_finishes_all_weight_streams_of_a_publication_that_fails_on_rank_zero(
    verify_sync: bool, taken: int
) -> None:
    given = {"verify_sync": verify_sync, "publish_faults": [ServerError("refused")], "read_before_fault": taken}
    one, two = on_ranks(on_this_rank, 2, [0], given)
    assert one[0] == two[0] == "ServerError: refused"
    assert one[1] == two[1] == [TENSORS] * (2 if verify_sync else 1)


def test_every_rank_repeats_all_weight_streams_after_a_server_death_seen_by_rank_zero() -> None:
    given = {"publish_faults": [ServerDied("gone")], "read_before_fault": 1}
    one, two = on_ranks(on_this_rank, 2, [0], given)
    assert one[0] == two[0] == "" and one[1] == two[1] == [TENSORS] * 2


def test_waiting_for_the_server_publication_and_sampling_are_separate_phases() -> None:
    """Artificial seconds: every call of the server takes a different number of them."""
    now, costs = [0.0], {"ready": 100.0, "recover": 1000.0, "publish": 10.0, "sample": 1.0}

    class Costly(list[Event]):
        def append(self, event: Event) -> None:
            now[0] += costs[event[0]]
            super().append(event)

    with one_rank() as layout, mock.patch.object(clock_module.time, "monotonic", lambda: now[0]):
        site = PolicySite(layout, sample_faults=[ServerDied("gone"), None], events=Costly(), clock=StepClock())
        with site.clock.phase("rollout"):
            run(site, [0])
        assert site.clock.take() == {"server": 1100.0, "publish": 20.0, "rollout": 2.0, "step": 1122.0}


STEP = ["empty cache", "resume", "publish", "sample", "release"]
"""A step whose server has memory only while it is needed."""


def test_the_server_has_its_memory_from_before_a_publication_to_the_end_of_sampling() -> None:
    """Its weights are lost with its memory, so they are published again even if they are the same."""
    site = site_of([0, 0, 1], release=True)
    assert [event[0] for event in site.events] == ["ready", *STEP * 3]
    assert [event[0] for event in site_of([0, 1]).events] == ["ready", "publish", "sample", "publish", "sample"]


def test_a_server_that_dies_while_it_takes_its_memory_is_restarted_and_asked_again() -> None:
    site = site_of([0], release=True, memory_faults=[ServerDied("no memory")])
    assert [event[0] for event in site.events] == ["ready", "empty cache", "resume", "recover", *STEP]
    assert site.streams == [TENSORS]


def test_a_server_that_dies_while_it_gives_its_memory_back_loses_no_rollout() -> None:
    site = site_of([0, 1], release=True, memory_faults=[None, ServerDied("gone")])
    assert [event[0] for event in site.events] == ["ready", *STEP, "recover", "release", *STEP]


def test_an_error_of_the_server_about_its_memory_stops_every_rank() -> None:
    given = {"release": True, "memory_faults": [ServerError("no")]}
    one, two = on_ranks(on_this_rank, 2, [0], given)
    assert one[0] == two[0] == "ServerError: no"
    assert [event[0] for event in one[2]] == ["ready", "empty cache", "resume"]
    assert [event[0] for event in two[2]] == ["empty cache"], "each rank returns the memory of its own GPU"
