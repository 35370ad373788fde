"""Weights to several real servers at once: on one route and on several, and servers that die, stop or lie meanwhile."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.liars import liar, nothing_done
from tests.sglang.conftest import Oracle, cpu_server
from tests.sglang.streams import plan, stream
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import GateError, GroupBroken, ServerDied, ServerHung
from tropd_mcore.rollout.fleet_publisher import FleetPublisher, Target
from tropd_mcore.rollout.publication import PublicationLedger
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.serving import weight_group
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.weight_payload import SHARED_MEMORY

SMALL_BUCKET = 20_000
"""Bytes: several requests per update."""
HANG_S = 8.0
PROBE = [5, 77, 201, 4, 4, 90, 17]

Fleet = list[SupervisedServer]


@contextmanager
def started(folder: Path, place: Path, count: int, *, api_key: str | None = None, **config: Any) -> Iterator[Fleet]:
    """`count` servers that start at the same time."""
    with ExitStack() as stack:
        servers = []
        for index in range(count):
            spec = cpu_server(folder, place / str(index), keyed=False, hang_timeout_s=HANG_S, **config)
            (place / str(index)).mkdir()
            spec = dataclasses.replace(spec, key=f"rollout.servers.{index}", api_key=api_key)
            server = SupervisedServer(spec)
            stack.callback(server.stop)
            servers.append(server)
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda server: (server.start(), server.wait_ready()), servers))
        yield servers


@pytest.fixture(scope="module")
def pair(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two servers of two ranks each."""
    with started(qwen3_folder, tmp_path_factory.mktemp("pair"), 2, tensor_parallel=2) as servers:
        yield servers


@pytest.fixture
def publisher(qwen3_folder: Path) -> Iterator[FleetPublisher]:
    made = FleetPublisher(plan(qwen3_folder), bucket_bytes=SMALL_BUCKET, student_folder=qwen3_folder)
    yield made
    made.close()


def targets(servers: Fleet, *routes: Any, **given: Any) -> list[Target]:
    return [
        Target(server.client, PublicationLedger(server.client.key), route, **given)
        for server, route in zip(servers, routes, strict=True)
    ]


def assert_serve(fleet: list[Target], folder: Path, version: str, log_softmax: Oracle) -> None:
    """The label, the log-probs of transformers, and equal weights on servers of one layout."""
    table = log_softmax(folder, PROBE)
    expected = [table[index - 1, PROBE[index]] for index in range(1, len(PROBE))]
    totals: dict[int, set[str]] = {}
    for target in fleet:
        info = target.client.info()
        assert info.weight_version == version, target.key
        found = WeightPublisher(target.client, plan(folder)).probe(np.array(PROBE, np.int32))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        checksums = target.client.weights_checksum()
        assert checksums is not None
        totals.setdefault(info.tensor_parallel, set()).add(checksums.total)
    assert all(len(found) == 1 for found in totals.values())


def test_two_servers_of_two_ranks_get_their_weights_through_one_group(
    pair: Fleet, publisher: FleetPublisher, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    joined = []
    join = SglangClient.join_weight_group

    def noted(client: SglangClient, **given: Any) -> None:
        joined.append((client.key, given["rank"], given["world_size"], given["backend"]))
        join(client, **given)

    monkeypatch.setattr(SglangClient, "join_weight_group", noted)
    fleet = targets(pair, "broadcast", "broadcast")
    assert publisher.verify_sync(fleet, lambda: stream(qwen3_folder), "first") == {}
    assert_serve(fleet, qwen3_folder, "first", log_softmax)
    assert publisher.publish(fleet, stream(other_folder), "second") == {}
    assert publisher.check_unchanged(fleet) == {}
    assert_serve(fleet, other_folder, "second", log_softmax)
    assert sorted(joined) == [("rollout.servers.0", 1, 5, "gloo"), ("rollout.servers.1", 3, 5, "gloo")]
    assert publisher.report is not None and publisher.report.buckets > 3


def test_a_server_by_shared_memory_and_one_by_broadcast_take_part_in_one_update(
    pair: Fleet, publisher: FleetPublisher, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle
) -> None:
    fleet = targets(pair, "shared", "broadcast")
    assert publisher.verify_sync(fleet, lambda: stream(qwen3_folder), "first") == {}
    assert publisher.publish(fleet, stream(other_folder), "second") == {}
    assert_serve(fleet, other_folder, "second", log_softmax)


def test_both_servers_of_a_machine_read_one_copy_in_shared_memory(
    pair: Fleet, publisher: FleetPublisher, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle
) -> None:
    fleet = targets(pair, "shared", "shared")
    assert publisher.publish(fleet, stream(qwen3_folder), "first") == {}
    named = f"torch_{os.getpid()}_"
    files = [path for path in SHARED_MEMORY.iterdir() if path.name.startswith(named)]
    assert publisher.publish(fleet, stream(other_folder), "second") == {}
    assert [path for path in SHARED_MEMORY.iterdir() if path.name.startswith(named)] == files
    assert_serve(fleet, other_folder, "second", log_softmax)


def test_weights_by_files_are_proven_and_the_folders_are_removed(
    pair: Fleet, publisher: FleetPublisher, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle, tmp_path: Path
) -> None:
    fleet = targets(pair, "disk", "disk", folder=tmp_path)
    assert publisher.verify_sync(fleet, lambda: stream(qwen3_folder), "first") == {}
    assert publisher.publish(fleet, stream(other_folder), "second") == {}
    assert_serve(fleet, other_folder, "second", log_softmax)
    (folder,) = tmp_path.iterdir()
    assert {path.suffix for path in folder.iterdir()} >= {".safetensors", ".json"}
    publisher.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_server_does_not_see_is_named_with_its_key(
    pair: Fleet, publisher: FleetPublisher, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SglangClient.update_weights_from_disk

    def elsewhere(client: SglangClient, folder: Path, *, version: str) -> None:
        load(client, folder.with_name("seen-by-nobody"), version=version)

    monkeypatch.setattr(SglangClient, "update_weights_from_disk", elsewhere)
    fleet = targets(pair[:1], "disk", folder=tmp_path)
    (error,) = publisher.publish(fleet, stream(qwen3_folder), "lost").values()
    assert "must see the folder" in str(error) and "rollout.servers.0.weights_folder" in str(error)
    assert pair[0].client.info().weight_version != "lost"


@pytest.mark.parametrize("route", ["value", "broadcast"])
def test_a_server_that_reports_success_and_loads_nothing_is_named_and_no_server_gets_the_label(
    pair: Fleet,
    publisher: FleetPublisher,
    qwen3_folder: Path,
    other_folder: Path,
    route: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By broadcast, the honest one gets the bucket in a group of its own, and the liar fails alone."""
    monkeypatch.setattr(weight_group, "APART_S", 20.0)
    with liar(pair[1].client.url) as proxy:
        client = SglangClient(proxy.url, ServerConfig(url=proxy.url, max_retries=0), key="rollout.servers.1")
        fleet = [*targets(pair[:1], route), Target(client, PublicationLedger(client.key), route)]
        assert publisher.verify_sync(fleet, lambda: stream(qwen3_folder), "first") == {}
        path = "tensor" if route == "value" else "distributed"
        proxy.tell(f"/update_weights_from_{path}", nothing_done)
        if route == "value":
            with pytest.raises(GateError, match=r"rollout\.servers\.1: the server took an update in which 47 of 47"):
                publisher.publish(fleet, stream(other_folder), "second")
            assert pair[0].client.info().weight_version == "second:incomplete"
        else:
            failed = publisher.publish(fleet, stream(other_folder), "second")
            assert list(failed) == ["rollout.servers.1"] and "took no part" in str(failed["rollout.servers.1"])
            assert pair[0].client.info().weight_version == "second"
        assert proxy.told and pair[1].client.info().weight_version != "second"
    for server in pair:
        server.client.resume()


def pid_of(server: SupervisedServer) -> int:
    return int(json.loads(server.spec.record_path.read_text())["pid"])


def when_sent(folder: Path, tensors: int, act: Callable[[], object]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream of a folder, which does something after so many tensors."""
    for number, item in enumerate(stream(folder)):
        if number == tensors:
            act()
        yield item


def test_a_server_that_dies_and_one_that_stops_within_an_update_leave_the_others_with_the_right_weights(
    qwen3_folder: Path, other_folder: Path, publisher: FleetPublisher, tmp_path: Path, log_softmax: Oracle
) -> None:
    with started(qwen3_folder, tmp_path, 3) as servers:
        fleet = targets(servers, "broadcast", "broadcast", "broadcast")
        assert publisher.verify_sync(fleet, lambda: stream(qwen3_folder), "first") == {}

        kill = when_sent(other_folder, 20, lambda: os.kill(pid_of(servers[2]), signal.SIGKILL))
        failed = publisher.publish(fleet, kill, "second")
        assert list(failed) == ["rollout.servers.2"] and isinstance(failed["rollout.servers.2"], ServerDied)
        assert_serve(fleet[:2], other_folder, "second", log_softmax)

        (scheduler,) = (
            child for child in psutil.Process(pid_of(servers[0])).children(recursive=True) if "sched" in child.name()
        )
        begun = time.monotonic()
        failed = publisher.publish(fleet[:2], when_sent(qwen3_folder, 20, scheduler.suspend), "third")
        took = time.monotonic() - begun
        assert isinstance(failed.pop("rollout.servers.0"), ServerHung)
        assert took < 10 * HANG_S
        os.kill(pid_of(servers[0]), signal.SIGKILL)
        scheduler.kill()
        if failed:  # it could not leave the broadcast before the other one was gone
            assert isinstance(failed["rollout.servers.1"], GroupBroken)
            assert publisher.publish(fleet[1:2], stream(qwen3_folder), "third") == {}
        assert_serve(fleet[1:2], qwen3_folder, "third", log_softmax)
