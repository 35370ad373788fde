"""Weights by broadcast to several servers, in real gloo groups: ranks, failures within an update, the rules of NCCL."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.glue.fleet import FleetServer, fleet
from tests.glue.test_fleet_publisher import publisher, targets
from tests.glue.test_publisher import SHAPES, held, stream
from tropd_mcore.errors import GroupBroken, ServerDied, ServerError, ServerHung
from tropd_mcore.serving import weight_group
from tropd_mcore.serving.weight_group import Member, WeightGroup
from tropd_mcore.serving.weight_routes import backend_of


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a failure waits for; nothing here waits that long if all goes well."""
    monkeypatch.setattr(weight_group, "JOIN_S", 20.0)
    monkeypatch.setattr(weight_group, "AFTER_S", 1.0)


def by_broadcast(servers: list[FleetServer]) -> Any:
    return targets(servers, *["broadcast"] * len(servers))


def test_all_ranks_of_all_servers_are_one_group_in_which_each_server_has_ranks_in_a_row() -> None:
    servers = fleet(FleetServer(tensor_parallel=2), FleetServer(), FleetServer(tensor_parallel=3))
    made = publisher(bucket_bytes=1)
    for version, first in (("v1", 4.0), ("v2", 9.0)):
        assert made.publish(by_broadcast(servers), stream(first), version) == {}
        assert all(server.weights == held(first) and server.label == version for server in servers)
    assert [server.joined for server in servers] == [[(1, 7, "gloo")], [(3, 7, "gloo")], [(4, 7, "gloo")]]
    assert all(server.names == [[name] for name in SHAPES] * 2 for server in servers)
    made.close()
    assert all(len(server.left) == 1 for server in servers)
    made.close()
    assert all(len(server.left) == 1 for server in servers)


def test_a_server_with_a_wrong_first_rank_never_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is planted in the request. Two ranks of one number, and one that is absent."""
    monkeypatch.setattr(weight_group, "JOIN_S", 3.0)
    join = FleetServer.join_weight_group

    def wrong(server: FleetServer, **given: Any) -> None:
        join(server, **{**given, "rank": 1})

    monkeypatch.setattr(FleetServer, "join_weight_group", wrong)
    servers = fleet(FleetServer(), FleetServer())
    failed = publisher().publish(by_broadcast(servers), stream(), "v1")
    assert "rollout.servers.1" in failed and servers[1].label == "default"


def test_other_servers_in_the_next_update_make_a_new_group() -> None:
    servers = fleet(FleetServer(), FleetServer())
    made = publisher()
    for some in (servers, servers[:1], servers):
        assert made.publish(by_broadcast(some), stream(4.0), "v1") == {}
    assert servers[0].joined == [(1, 3, "gloo"), (1, 2, "gloo"), (1, 3, "gloo")] and len(servers[0].left) == 2


def test_a_server_that_was_started_again_is_joined_again() -> None:
    servers = fleet(FleetServer(), FleetServer())
    made = publisher()
    made.publish(by_broadcast(servers), stream(4.0), "v1")
    servers[1].groups.clear()
    assert made.publish(by_broadcast(servers), stream(5.0), "v2") == {}
    assert [server.label for server in servers] == ["v2", "v2"]
    assert all(server.weights == held(5.0) for server in servers)


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_server_that_dies_in_a_broadcast_is_left_out_and_the_others_get_the_weights_in_the_same_update(
    culprit: int,
) -> None:
    servers = fleet(FleetServer(tensor_parallel=2), FleetServer(), FleetServer())
    made = publisher(bucket_bytes=1)
    assert made.publish(by_broadcast(servers), stream(4.0), "v1") == {}
    servers[culprit].dies_in = "broadcast"
    failed = made.publish(by_broadcast(servers), stream(9.0), "v2")
    assert {key: type(error) for key, error in failed.items()} == {f"rollout.servers.{culprit}": ServerDied}
    for index, server in enumerate(servers):
        assert (server.label == "v2" and server.weights == held(9.0)) == (index != culprit)


def test_a_refusal_of_one_server_leaves_the_others_in_the_update() -> None:
    servers = fleet(FleetServer(), FleetServer(refused={"broadcast": ServerError("no such parameter")}), FleetServer())
    failed = publisher(bucket_bytes=1).publish(by_broadcast(servers), stream(9.0), "v1")
    assert {key: str(error) for key, error in failed.items()} == {"rollout.servers.1": "no such parameter"}
    assert [server.label for server in servers][::2] == ["v1", "v1"] and servers[1].label != "v1"


def test_servers_that_wait_for_a_stopped_one_may_be_sent_again_and_nothing_waits_for_long() -> None:
    servers = fleet(FleetServer(stops_in_broadcast=True), FleetServer(), FleetServer())
    begun = time.monotonic()
    failed = publisher(bucket_bytes=1).publish(by_broadcast(servers), stream(9.0), "v1")
    assert time.monotonic() - begun < 60.0
    assert isinstance(failed.pop("rollout.servers.0"), ServerHung)
    for key, error in failed.items():
        assert isinstance(error, GroupBroken) and "rollout.servers.0" in str(error), key
    servers[0].groups.clear()  # it is killed
    assert publisher().publish(by_broadcast(servers[1:]), stream(5.0), "v2") == {}
    assert all(server.label == "v2" and server.weights == held(5.0) for server in servers[1:])


def test_a_server_that_only_reports_success_is_found_by_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_group, "APART_S", 2.0)
    servers = fleet(FleetServer(liar=True), FleetServer(), FleetServer())
    failed = publisher(bucket_bytes=1).publish(by_broadcast(servers), stream(9.0), "v1")
    assert list(failed) == ["rollout.servers.0"] and "took no part in a broadcast" in str(failed["rollout.servers.0"])
    assert all(server.label == "v1" and server.weights == held(9.0) for server in servers[1:])


@pytest.mark.parametrize("fault", ["refuses", "is silent"])
def test_a_server_that_does_not_join_is_left_out_of_the_group(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_group, "JOIN_S", 5.0)
    bad = (
        FleetServer(refused={"join": ServerError("no groups here")}) if fault == "refuses" else FleetServer(joins=False)
    )
    servers = fleet(FleetServer(), bad, FleetServer())
    failed = publisher().publish(by_broadcast(servers), stream(9.0), "v1")
    assert list(failed) == ["rollout.servers.1"] and servers[1].label == "default"
    assert ("no groups here" if fault == "refuses" else "rollout.servers.1.weights=value") in str(
        failed["rollout.servers.1"]
    )
    assert servers[0].label == servers[2].label == "v1"


def test_an_unknown_host_fails_only_its_own_server() -> None:
    servers = fleet(FleetServer(), FleetServer(url="http://no-such-host.invalid:1"))
    failed = publisher().publish(by_broadcast(servers), stream(9.0), "v1")
    assert list(failed) == ["rollout.servers.1"] and "no port for the weights" in str(failed["rollout.servers.1"])
    assert servers[0].label == "v1"


def test_nccl_is_used_if_server_and_tensors_are_on_gpus_and_gloo_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropd_mcore.serving.weight_routes.GPU", "meta")  # a device that this machine has
    info = FleetServer().info()
    there, here = torch.empty(3, device="meta"), torch.empty(3)
    on_gpu = type(info)(**{**vars(info), "device": "meta"})
    assert backend_of(on_gpu, [there, there]) == "nccl"
    assert backend_of(on_gpu, [there, here]) == backend_of(info, [there]) == backend_of(info, [here]) == "gloo"


class Pretended:
    """A group of torch with the backend NCCL, which this machine cannot make. Notes the order of what happens."""

    def __init__(self, events: list[str], *, never: bool = False) -> None:
        self.events = events
        self.never = never
        self.sent: list[torch.Tensor] = []

    def broadcast(self, tensors: list[torch.Tensor], _options: object) -> Pretended:
        self.events.append("broadcast")
        self.sent += tensors
        if self.never:
            time.sleep(3.0)
            raise RuntimeError("NCCL communicator was aborted")
        return self

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        self.events.append("wait")


class OnGpu(FleetServer):
    """A server whose ranks are NCCL's: joining returns at once, and they meet in the first broadcast."""

    def join_weight_group(self, **given: Any) -> None:  # type: ignore[override]
        self._note("join")
        self.joined.append((given["rank"], given["world_size"], given["backend"]))

    def update_weights_from_group(self, tensors: Any, *, group: str, version: str, limit_s: float) -> None:
        self._note("broadcast")
        self.names.append([name for name, _, _ in tensors])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> tuple[Pretended, list[dict[str, Any]]]:
    """The group that torch would make, and the arguments with which it was asked for."""
    group, asked = Pretended([]), []

    def make(*_ranks: object, **given: Any) -> tuple[Pretended, None]:
        group.events.append("group")
        asked.append({"backend": _ranks[3], **given})
        return group, None

    c10d = torch.distributed.distributed_c10d
    monkeypatch.setattr(c10d, "_new_process_group_helper", make)
    monkeypatch.setattr(c10d, "_abort_process_group", lambda _group: group.events.append("abort"))
    return group, asked


def gpu_group(servers: list[FleetServer]) -> WeightGroup:
    members = [Member(server, server.tensor_parallel) for server in servers]  # type: ignore[arg-type]
    return WeightGroup(members, address="127.0.0.1", backend="nccl")


def test_with_nccl_the_bytes_stay_on_their_device_and_the_communicator_begins_with_the_first_broadcast(
    pretended: tuple[Pretended, list[dict[str, Any]]],
) -> None:
    """A tensor of the device `meta` cannot be copied to the CPU."""
    group, asked = pretended
    servers = fleet(OnGpu(tensor_parallel=2), OnGpu())
    made = gpu_group(servers)
    assert [server.joined for server in servers] == [[(1, 4, "nccl")], [(3, 4, "nccl")]]
    (given,) = asked
    assert given["backend"] == "nccl" and "device_id" not in given, "SGLang's ranks come only to the first broadcast"
    assert given["timeout"].total_seconds() > weight_group.SEND_S, "torch's watchdog ends the process; we are first"
    bucket = [("a", torch.empty(3, dtype=torch.bfloat16, device="meta")), ("b", torch.empty(2, device="meta"))]
    made.broadcast(bucket, version="v1")
    (sent,) = group.sent
    assert sent.device.type == "meta" and sent.nbytes == 14
    assert all(server.names == [["b", "a"]] for server in servers), "the widest dtype first"
    made.close()
    assert group.events == ["group", "broadcast", "wait", "abort"]
    with pytest.raises(NotImplementedError):
        sent.cpu()


def test_with_nccl_a_server_that_dies_before_the_communicator_is_made_ends_the_wait_and_aborts(
    pretended: tuple[Pretended, list[dict[str, Any]]],
) -> None:
    group, _ = pretended
    group.never = True
    servers = fleet(OnGpu(), OnGpu(refused={"broadcast": ServerDied("gone")}))
    made = gpu_group(servers)
    begun = time.monotonic()
    with pytest.raises(weight_group.GroupFailed) as caught:
        made.broadcast([("a", torch.empty(3, device="meta"))], version="v1")
    assert list(caught.value.failed) == ["rollout.servers.1"] and time.monotonic() - begun < 30.0
    assert "abort" in group.events and servers[0].left and not servers[1].left
