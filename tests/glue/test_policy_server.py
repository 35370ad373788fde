"""The rollout server seen by all ranks: when weights are published and proven, and the cost of a server death."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from tests.glue.faults import on_ranks
from tests.glue.policy_site import SAMPLES, TENSORS, Event, PolicySite, key_of, requests, run, site_of
from tests.glue.stubs import make_layout, one_rank
from tropd_mcore.errors import GateError, GroupBroken, ServerDied, ServerError, TropdError
from tropd_mcore.monitor import clock as clock_module
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.rollout import policy_server as policy_server_module


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
        "ready", "verify_sync", "recover", "ready", "verify_sync", "sample", "publish", "sample",
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
    assert [event[0] for event in site.events] == ["ready", "publish", "recover", "ready", "publish", "sample"]
    assert site.did("recover") == [("recover", "gone")] and site.streams == [TENSORS] * 2
    assert len({event[1] for event in site.did("publish")}) == 1 and site.connections == 2


def test_after_a_server_death_weights_are_published_again_and_only_missing_samples_requested() -> None:
    site = site_of([7], sample_faults=[ServerDied("gone"), ServerDied("gone again")])
    assert [event[0] for event in site.events] == [
        "ready", "publish", "sample", "recover", "ready", "publish", "sample", "recover", "ready", "publish", "sample",
    ]  # fmt: skip
    assert [event[3] for event in site.did("sample")] == [["s0", "s1", "s2", "s3"], ["s2", "s3"], ["s3"]]
    assert len({event[1] for event in site.did("publish")}) == 1


def test_rollouts_of_weights_that_changed_while_they_were_sampled_are_refused_on_every_rank() -> None:
    given = {"unchanged_faults": [None, GateError("the server's weights changed after their publication")]}
    one, two = on_ranks(on_this_rank, 2, [0, 1, 2], given)
    assert one[0] == two[0] == "GateError: the server's weights changed after their publication"
    assert [event[0] for event in one[2]] == ["ready", "publish", "sample", "publish", "sample", "changed"]


def test_a_server_that_dies_while_its_weights_are_checked_is_back_at_the_next_step_and_no_sample_is_repeated() -> None:
    site = site_of([0, 1], unchanged_faults=[ServerDied("gone")])
    first, second = ["ready", "publish", "sample", "changed", "recover"], ["ready", "publish", "sample"]
    assert [event[0] for event in site.events] == first + second
    assert [event[3] for event in site.did("sample")] == [["s0", "s1", "s2", "s3"]] * 2


def test_answers_received_before_a_server_died_are_kept() -> None:
    with one_rank() as layout:
        site = PolicySite(layout, sample_faults=[ServerDied("gone")])
        with mock.patch.object(policy_server_module, "iterate_hf", site.weights):
            rollouts = site.policy().sample(requests(), step=0)
    assert [rollout.policy_version for rollout in rollouts] == ["answer 3"] * 2 + ["answer 7"] * 2


def test_a_server_that_died_between_two_steps_gets_the_weights_again() -> None:
    site = site_of([0, 0], sample_faults=[None, ServerDied("gone")])
    assert [event[0] for event in site.did("publish", "sample")] == ["publish", "sample", "sample", "publish", "sample"]
    assert site.connections == 2


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
        "ready", "verify_sync", "sample", "publish", "sample", "recover", "ready", "publish", "sample",
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
        assert site.clock.take() == {"server": 1200.0, "publish": 20.0, "rollout": 2.0, "step": 1222.0}


STEP = ["empty cache", "resume", "publish", "sample", "release"]
"""A step whose server has memory only while it is needed."""


def test_the_server_has_its_memory_from_before_a_publication_to_the_end_of_sampling() -> None:
    """Its weights are lost with its memory, so they are published again even if they are the same."""
    site = site_of([0, 0, 1], release=True)
    assert [event[0] for event in site.events] == ["ready", *STEP * 3]
    assert [event[0] for event in site_of([0, 1]).events] == ["ready", "publish", "sample", "publish", "sample"]


def test_a_server_that_dies_while_it_takes_its_memory_is_restarted_and_asked_again() -> None:
    site = site_of([0], release=True, memory_faults=[ServerDied("no memory")])
    assert [event[0] for event in site.events] == ["ready", "empty cache", "resume", "recover", "ready", *STEP]
    assert site.streams == [TENSORS]


def test_a_server_that_dies_while_it_gives_its_memory_back_loses_no_rollout() -> None:
    site = site_of([0, 1], release=True, memory_faults=[None, ServerDied("gone")])
    assert [event[0] for event in site.events] == ["ready", *STEP, "recover", "ready", "release", *STEP]


def test_an_error_of_the_server_about_its_memory_stops_every_rank() -> None:
    given = {"release": True, "memory_faults": [ServerError("no")]}
    one, two = on_ranks(on_this_rank, 2, [0], given)
    assert one[0] == two[0] == "ServerError: no"
    assert [event[0] for event in one[2]] == ["ready", "empty cache", "resume"]
    assert [event[0] for event in two[2]] == ["empty cache"], "each rank returns the memory of its own GPU"


def fleet(steps: list[int], **given: Any) -> PolicySite:
    """One launch of a single rank with three servers."""
    return site_of(steps, servers=3, **given)


def test_all_servers_get_a_version_from_one_stream() -> None:
    site = fleet([0, 1], verify_sync=True)
    assert [event[0::2] for event in site.did("verify_sync", "publish")] == [("verify_sync", 0, 2), ("publish", 0, 2)]
    assert [event[2:] for event in site.did("verify_sync", "publish")] == [(0, 1, 2)] * 2
    assert site.streams == [TENSORS] * 3 and site.connections == 3


def test_a_step_ends_without_the_server_that_was_lost_in_it_which_is_back_at_the_next_one() -> None:
    site = fleet([0, 1], sample_faults=[{1: ServerDied("gone")}])
    assert [event[2:] for event in site.did("publish")] == [(0, 1, 2)] * 2
    assert [event[3] for event in site.did("sample")] == [["s0", "s1", "s2", "s3"]] * 2
    assert site.did("recover") == [("recover", "gone")] and site.did("ready") == [("ready",)] * 3


def test_a_step_does_not_wait_for_a_server_that_starts() -> None:
    site = fleet([0, 1, 2], sample_faults=[{1: ServerDied("gone")}], starting={1: 1})
    assert [event[2:] for event in site.did("publish")] == [(0, 1, 2), (0, 2), (0, 1, 2)]


def test_if_all_servers_are_lost_the_first_that_is_ready_gets_the_missing_samples() -> None:
    gone = {place: ServerDied(f"gone {place}") for place in range(3)}
    site = fleet([0], sample_faults=[gone], starting={0: 2, 1: 1, 2: 0})
    assert [event[2:] for event in site.did("publish")] == [(0, 1, 2), (2,)]
    assert [event[3] for event in site.did("sample")] == [["s0", "s1", "s2", "s3"], ["s2", "s3"]]


def test_a_server_that_dies_in_a_publication_does_not_stop_the_others() -> None:
    site = fleet([0, 1], publish_faults=[{2: ServerDied("gone")}])
    assert [event[2:] for event in site.did("publish")] == [(0, 1, 2), (0, 1, 2)]
    assert site.streams == [TENSORS] * 2 and len(site.did("sample")) == 2


def test_the_healthy_servers_of_a_broken_group_get_another_stream() -> None:
    broken: dict[int, ServerError] = {0: GroupBroken("broken"), 1: GroupBroken("broken")}
    site = fleet([0], publish_faults=[broken])
    assert [event[2:] for event in site.did("publish")] == [(0, 1, 2), (0, 1)]
    assert site.did("recover") == []


def test_a_server_that_refuses_an_update_is_started_again_while_the_others_go_on() -> None:
    site = fleet([0], publish_faults=[{1: ServerError("refused")}])
    assert site.did("recover") == [("recover", "refused")] and len(site.did("sample")) == 1


def test_a_server_at_a_url_that_is_lost_takes_part_again_when_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with one_rank() as layout:
        site = PolicySite(layout, servers=3, urls=(1,), silent={1}, sample_faults=[{1: ServerDied("no connection")}])
        with mock.patch.object(policy_server_module, "iterate_hf", site.weights):
            policy = site.policy()
            policy.sample(requests(), step=0)
            policy.sample(requests(), step=1)
            site.silent = set()
            policy.sample(requests(), step=2)
    assert [event[2:] for event in site.did("publish")] == [(0, 1, 2), (0, 2), (0, 1, 2)]
    assert site.did("recover") == []
    assert "no connection (asked again at the next step): 2 of 3 rollout servers go on" in caplog.text
    assert "rollout.servers.1: it takes requests again" in caplog.text


def test_a_slow_server_that_runs_is_not_started_again_at_once() -> None:
    lost = {1: ServerError("it did not end 3 requests")}
    site = fleet([0, 1], sample_faults=[lost], alive={key_of(1)}, silent={1})
    assert site.did("recover") == [] and [event[2:] for event in site.did("publish")] == [(0, 1, 2), (0, 2)]


def test_a_run_ends_with_one_error_when_no_server_is_left() -> None:
    gone = {place: ServerDied(f"gone {place}") for place in range(3)}
    with one_rank() as layout:
        site = PolicySite(layout, servers=3, restarts=0, sample_faults=[gone])
        with pytest.raises(ServerDied, match="gone 0; max_restarts are used up"):
            run(site, [0])


def test_a_run_goes_on_with_the_servers_that_can_still_be_started() -> None:
    site = fleet([0, 1], restarts=0, sample_faults=[{0: ServerDied("gone 0"), 2: ServerDied("gone 2")}])
    assert [event[2:] for event in site.did("publish")] == [(0, 1, 2), (1,)]


def test_every_rank_drops_and_publishes_alike() -> None:
    given = {"servers": 3, "verify_sync": True, "sample_faults": [{1: ServerDied("gone")}]}
    one, two = on_ranks(on_this_rank, 2, [0, 1], given)
    assert one[0] == two[0] == "" and one[1] == two[1] == [TENSORS] * 3
