"""One update of several servers: who gets the label, what is asked of one that fails, what happens at the same time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.glue.fleet import FleetServer, Slow, fleet
from tests.glue.test_publisher import PLAN, SHAPES, TOTAL_BYTES, WHOLE_UPDATE, held, stream, weights
from tests.tiny_models import write_tiny_model
from tropd_mcore.errors import GateError, ServerDied, ServerError, ServerHung
from tropd_mcore.rollout import route_choice
from tropd_mcore.rollout.fleet_publisher import FleetPublisher, Target
from tropd_mcore.rollout.publication import PublicationLedger
from tropd_mcore.serving.background import wait_until
from tropd_mcore.weights.hf_folder import HfReader


def targets(servers: list[FleetServer], *routes: Any, proven: bool = False) -> list[Target]:
    given = routes or [None] * len(servers)
    return [
        Target(server, PublicationLedger(server.key) if proven else None, route)  # type: ignore[arg-type]
        for server, route in zip(servers, given, strict=True)
    ]


def publisher(**given: Any) -> FleetPublisher:
    return FleetPublisher(PLAN, **given)


def test_every_server_gets_every_tensor_and_the_label_whatever_its_route_and_its_ranks() -> None:
    servers = fleet(FleetServer(same_host=True, tensor_parallel=2), FleetServer(tensor_parallel=3), FleetServer())
    made = publisher(bucket_bytes=52)
    assert made.publish(targets(servers, "shared", "value", "shared"), stream(7.0), "v1") == {}
    for server in servers:
        assert server.weights == held(7.0) and server.label == "v1"
        assert [call for call in server.calls if call != "update"] == [
            call for call in WHOLE_UPDATE if call != "update"
        ]
        assert [name for names in server.names for name in names] == list(SHAPES) and set(server.labels) == {
            "v1:incomplete"
        }
        assert all(len(payloads) == server.tensor_parallel for payloads in server.payloads)


def test_servers_of_this_machine_get_handles_of_one_buffer() -> None:
    servers = fleet(FleetServer(), FleetServer(tensor_parallel=2))
    publisher().publish(targets(servers, "shared", "shared"), stream(), "v1")
    names = {payload.split(b"/torch_")[1].split(b"\x94")[0] for one in servers for payload in one.payloads[0]}
    assert len(names) == 1


@pytest.mark.parametrize("call", ["pause", "begin", "update", "end", "flush", "label", "resume"])
def test_a_server_that_refuses_is_returned_with_its_error_and_the_others_have_the_weights(call: str) -> None:
    servers = fleet(FleetServer(), FleetServer(refused={call: ServerError(f"no {call}")}), FleetServer())
    failed = publisher(bucket_bytes=1).publish(targets(servers, "shared", "value", "value"), stream(7.0), "v1")
    assert {key: str(error) for key, error in failed.items()} == {"rollout.servers.1": f"no {call}"}
    for server in (servers[0], servers[2]):
        assert server.weights == held(7.0) and server.label == "v1" and server.calls[-1] == "resume"
    if call != "resume":  # with it, everything has passed but sampling goes on
        assert servers[1].label != "v1"
    assert servers[1].calls.count("resume") == (call == "resume"), "it stays paused"
    servers[1].refused.clear()
    assert publisher().publish(targets(servers), stream(3.0), "v2") == {}
    assert [server.label for server in servers] == ["v2"] * 3


def test_a_server_that_hangs_in_an_update_is_not_asked_again_and_one_that_cannot_be_asked_is_not_paused() -> None:
    class Gone(FleetServer):
        def info(self) -> Any:
            raise ServerDied(f"{self.key}: gone")

    servers = fleet(FleetServer(), FleetServer(refused={"update": ServerHung("hung")}), Gone())
    failed = publisher().publish(targets(servers), stream(7.0), "v1")
    assert {key: type(error) for key, error in failed.items()} == {
        "rollout.servers.1": ServerHung,
        "rollout.servers.2": ServerDied,
    }
    assert servers[1].calls == ["pause", "begin", "update"] and servers[2].calls == []
    assert servers[0].label == "v1"


def test_if_every_server_fails_the_rest_of_the_stream_is_not_read() -> None:
    servers = fleet(*(FleetServer(refused={"update": ServerError("no")}) for _ in range(2)))
    source = Slow(weights())
    failed = publisher(bucket_bytes=1).publish(targets(servers), iter(source), "v1")
    assert set(failed) == {"rollout.servers.0", "rollout.servers.1"} and source.read == ["a", "b", "c"]
    assert publisher().publish([], stream(), "v1") == {}


def breaks() -> Iterator[tuple[str, Tensor]]:
    yield from list(weights().items())[:3]
    raise RuntimeError("a collective failed")


def unknown() -> Iterator[tuple[str, Tensor]]:
    yield from list(weights().items())[:3]
    yield "e", torch.zeros(1)


@pytest.mark.parametrize(
    ("source", "message"),
    [(breaks, "a collective failed"), (unknown, r"rollout\.servers: e is not a tensor of the plan")],
)
def test_an_error_of_the_stream_abandons_the_update_on_every_server(source: Any, message: str) -> None:
    servers = fleet(FleetServer(), FleetServer(refused={"end": ServerError("cannot end")}))
    with pytest.raises((RuntimeError, ServerError), match=message):
        publisher(bucket_bytes=1).publish(targets(servers), source(), "v1")
    for server in servers:
        assert server.calls == ["pause", "begin", "update", "update", "end", "resume"]
        assert server.label == "v1:incomplete"


def test_a_server_that_loads_nothing_is_named_and_no_server_gets_the_label() -> None:
    servers = fleet(FleetServer(), FleetServer(), FleetServer())
    everyone, made = targets(servers, proven=True), publisher()
    assert made.verify_sync(everyone, lambda: stream(4.0), "v1") == {}
    servers[1].loads = ()
    with pytest.raises(GateError, match=r"rollout\.servers\.1: the server took an update in which 4 of 4 tensors"):
        made.publish(everyone, stream(5.0), "v2")
    assert [server.label for server in servers] == ["v2:incomplete"] * 3
    assert all(server.calls[-1] == "resume" for server in servers)


def test_servers_of_one_build_that_hold_different_weights_after_one_update_are_an_error() -> None:
    servers = fleet(FleetServer(), FleetServer())
    servers[1].weights["not in the plan"] = b"of another model"
    with pytest.raises(
        GateError, match=r"rollout\.servers\.0 and rollout\.servers\.1 were sent the same weights and hold different"
    ):
        publisher().publish(targets(servers, proven=True), stream(), "v1")
    servers = fleet(FleetServer(), FleetServer(dtype="bfloat16"), FleetServer(tensor_parallel=2, quantization="fp8"))
    servers[1].weights["not in the plan"] = servers[2].weights["not in the plan"] = b"of another build"
    assert publisher().publish(targets(servers, proven=True), stream(), "v1") == {}


def test_a_proof_overwrites_the_weights_of_every_server_between_two_updates() -> None:
    servers = fleet(
        FleetServer(), FleetServer(has_checksum=False), FleetServer(refused={"randomize": ServerDied("gone")})
    )
    failed = publisher().verify_sync(targets(servers, proven=True), lambda: stream(4.0), "v1")
    assert list(failed) == ["rollout.servers.2"]
    assert servers[0].calls == [*WHOLE_UPDATE, "randomize", *WHOLE_UPDATE] and servers[0].label == "v1"
    assert servers[1].calls == [*WHOLE_UPDATE, "label"] and servers[1].label == "v1"
    assert servers[2].label == "v1:first"


@pytest.mark.parametrize("fault", ["keeps_weights", "an unknown tensor"])
def test_a_proof_fails_for_the_server_at_fault(fault: str) -> None:
    servers = fleet(FleetServer(), FleetServer(keeps_weights=fault == "keeps_weights"))
    if fault != "keeps_weights":
        servers[1].weights["not in the plan"] = b"from the folder"
    with pytest.raises(GateError, match=r"rollout\.servers\.1: (the server kept|two updates)"):
        publisher().verify_sync(targets(servers), stream, "v1")
    assert servers[0].label != "v1"


def test_weights_that_change_after_their_publication_are_detected_on_the_right_server() -> None:
    servers = fleet(FleetServer(), FleetServer())
    everyone, made = targets(servers, proven=True), publisher()
    made.verify_sync(everyone, stream, "v1")
    assert made.check_unchanged(everyone) == {}
    servers[1].weights["a"] = b"of another job"
    for version in (None, "v1"):
        with pytest.raises(
            GateError, match=r"rollout\.servers\.1: the server's weights changed after their publication"
        ):
            made.check_unchanged(everyone, version)


def test_a_server_that_admits_to_have_other_weights_after_sampling_is_lost_and_does_not_end_the_run() -> None:
    """Somebody has started it again. What it answered before carries the label of the step."""
    servers = fleet(FleetServer(), FleetServer())
    everyone, made = targets(servers, proven=True), publisher()
    made.verify_sync(everyone, stream, "v1")
    servers[1].weights["a"], servers[1].label = b"of the folder", "default"
    (lost,) = made.check_unchanged(everyone, "v1").items()
    assert lost[0] == "rollout.servers.1"
    assert "the server has weights 'default' after it sampled from 'v1'" in str(lost[1])


def test_the_next_bucket_is_gathered_while_one_is_sent_and_no_more_than_these_two_exist() -> None:
    source, most = Slow(weights()), []

    class Waits(FleetServer):
        def update_weights(self, payloads: list[bytes], *, version: str) -> None:
            sent = len(self.names) + 1
            assert wait_until(lambda: len(source.read) >= min(sent + 2, 4), 5.0), "nothing is gathered meanwhile"
            most.append(len(source.read) - sent)
            super().update_weights(payloads, version=version)

    servers = fleet(Waits(), FleetServer())
    assert publisher(bucket_bytes=1).publish(targets(servers), iter(source), "v1") == {}
    assert len(most) == 4 and max(most) <= 2, "the bucket after this one, and the tensor that ends it"


def test_all_routes_send_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30.0)

    class Meets(FleetServer):
        def update_weights(self, payloads: list[bytes], *, version: str) -> None:
            both.wait()
            super().update_weights(payloads, version=version)

    for routes in (("shared", "value"), ("shared", "shared"), ("value", "value")):
        assert publisher().publish(targets(fleet(Meets(), Meets()), *routes), stream(), "v1") == {}


class ReadsFiles(FleetServer):
    """Notes the folder that it is asked to load, and whether that is complete."""

    def update_weights_from_disk(self, folder: Path, *, version: str) -> None:
        self._note("disk")
        with HfReader(folder) as reader:
            reader.check()
            self.found = {name: reader.tensor(name) for name in reader.names()}
        self.folder, self.label = folder, version


def test_the_route_by_files_writes_a_complete_folder_and_removes_the_one_before(tmp_path: Path) -> None:
    student = write_tiny_model(tmp_path / "student", family="qwen3", seed=1)
    (tmp_path / "shared").mkdir()
    with HfReader(student) as reader:
        tensors = {name: reader.tensor(name) for name in reader.names()}
    made = FleetPublisher(
        [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()],
        bucket_bytes=20_000, student_folder=student,
    )  # fmt: skip
    servers = [ReadsFiles(key="rollout.servers.0"), ReadsFiles(key="rollout.servers.1")]
    everyone = [Target(server, None, "disk", tmp_path / "shared") for server in servers]  # type: ignore[arg-type]
    for version in ("v1", "v2"):
        tensors = {name: tensor + 1 for name, tensor in tensors.items()}
        assert made.publish(everyone, iter(tensors.items()), version) == {}
        for server in servers:
            assert server.label == version and list((tmp_path / "shared").iterdir()) == [server.folder]
            assert server.found.keys() == tensors.keys()
            assert all(torch.equal(server.found[name], tensors[name]) for name in tensors)
            assert server.calls[-5:] == ["pause", "disk", "flush", "label", "resume"]
    made.close()
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_folder_that_cannot_be_written_fails_only_the_servers_that_need_it(tmp_path: Path) -> None:
    servers = fleet(FleetServer(), FleetServer(), FleetServer())
    everyone = targets(servers, "disk", "disk", "value")
    everyone[0].folder = tmp_path / "nowhere"
    failed = publisher(student_folder=tmp_path).publish(everyone, stream(), "v1")
    assert str(failed["rollout.servers.0"]).startswith("rollout.servers.0: cannot make a folder in")
    assert "rollout.servers.0.weights_folder" in str(failed["rollout.servers.0"])
    assert "rollout.servers.1.weights=disk needs a folder" in str(failed["rollout.servers.1"])
    assert servers[2].label == "v1"


def test_without_a_named_route_the_place_and_the_size_decide_and_one_line_tells(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    servers = fleet(FleetServer(same_host=True), FleetServer())
    made = publisher()
    with caplog.at_level(logging.INFO, "tropd_mcore"):
        for version in ("v1", "v2"):
            made.publish(targets(servers), stream(), version)
    assert caplog.text.count("go to rollout.servers.0 by shared, rollout.servers.1 by value") == 1
    monkeypatch.setattr(route_choice, "SMALL_BYTES", TOTAL_BYTES - 1)
    choice = publisher().choice
    routes = [choice.of(server, None, server.info()) for server in servers]  # type: ignore[arg-type]
    assert routes == ["shared", "broadcast"]
    assert choice.of(servers[1], "value", servers[1].info()) == "value"  # type: ignore[arg-type]
    assert "each publication sends" in caplog.text
