"""Weights to a real server through a process group: one rank and two, and a server that takes no part in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from tests.liars import Body, Forward, Liar, liar, nothing_done
from tests.sglang.conftest import Oracle, cpu_server
from tests.sglang.streams import plan, stream, weights
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import GateError, ServerError
from tropd_mcore.rollout.publication import PublicationLedger
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.serving import weight_group
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.weight_group import local_address

SMALL_BUCKET = 20_000
"""Bytes: several broadcasts per update."""


@pytest.fixture
def proxy(server: SupervisedServer) -> Iterator[Liar]:
    with liar(server.client.url) as running:
        yield running


def publisher_of(url: str, folder: Path) -> WeightPublisher:
    client = SglangClient(url, ServerConfig(url=url, max_retries=0), key="rollout.server")
    return WeightPublisher(
        client, plan(folder), ledger=PublicationLedger("rollout.server"), transport="broadcast",
        bucket_bytes=SMALL_BUCKET,
    )  # fmt: skip


async def refused(body: Body, forward: Forward) -> Any:
    """What SGLang answers to an update that it cannot load."""
    return web.json_response({"success": False, "message": "no such parameter"}, status=400)


def assert_serves(server: SupervisedServer, publisher: WeightPublisher, folder: Path, log_softmax: Oracle) -> None:
    token_ids = torch.arange(5, 45).numpy().astype("int32")
    expected = log_softmax(folder, token_ids.tolist())
    right = expected[torch.arange(len(token_ids) - 1).numpy(), token_ids[1:]]
    assert abs(publisher.probe(token_ids) - right).max() < 1e-4


def test_broadcast_weights_are_proven_and_sampled_from(
    server: SupervisedServer, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle
) -> None:
    publisher = publisher_of(server.client.url, qwen3_folder)
    publisher.verify_sync(lambda: stream(qwen3_folder), "first")
    assert_serves(server, publisher, qwen3_folder, log_softmax)
    report = publisher.publish(stream(other_folder), "second")
    publisher.check_unchanged()
    assert report.buckets > 3 and server.client.info().weight_version == "second"
    assert_serves(server, publisher, other_folder, log_softmax)


def test_both_ranks_of_a_server_get_their_shards_of_broadcast_weights(
    qwen3_folder: Path, other_folder: Path, tmp_path: Path, log_softmax: Oracle
) -> None:
    spec = cpu_server(qwen3_folder, tmp_path, keyed=False, tensor_parallel=2)
    with SupervisedServer(spec) as running:
        publisher = publisher_of(running.client.url, qwen3_folder)
        publisher.verify_sync(lambda: stream(qwen3_folder), "first")
        publisher.publish(stream(other_folder), "second")
        publisher.check_unchanged()
        assert_serves(running, publisher, other_folder, log_softmax)


def test_tensors_of_two_dtypes_share_a_broadcast(server: SupervisedServer, qwen3_folder: Path) -> None:
    """A bfloat16 tensor of an odd size before a float32 one would put the second at an odd place."""
    given = weights(qwen3_folder)
    mixed = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in given.items()}
    layout = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in mixed.items()]
    client = SglangClient(server.client.url, ServerConfig(url=server.client.url), key="rollout.server")
    publisher = WeightPublisher(client, layout, ledger=PublicationLedger("rollout.server"), transport="broadcast")
    publisher.verify_sync(lambda: iter(mixed.items()), "mixed")
    publisher.check_unchanged()


def test_an_acknowledged_broadcast_in_which_the_server_took_no_part_ends_with_one_line(
    proxy: Liar, server: SupervisedServer, qwen3_folder: Path, other_folder: Path
) -> None:
    publisher = publisher_of(proxy.url, qwen3_folder)
    publisher.verify_sync(lambda: stream(qwen3_folder), "first")
    proxy.tell("/update_weights_from_distributed", nothing_done)
    with pytest.raises((GateError, ServerError), match=r"^rollout\.server: "):
        publisher.publish(stream(other_folder), "second")
    assert proxy.told and server.client.info().weight_version != "second"
    proxy.lies.clear()
    publisher.publish(stream(other_folder), "third")  # in a new group
    assert server.client.info().weight_version == "third"


def test_a_refused_broadcast_ends_at_once_and_the_next_update_succeeds(
    proxy: Liar, server: SupervisedServer, qwen3_folder: Path
) -> None:
    publisher = publisher_of(proxy.url, qwen3_folder)
    proxy.tell("/update_weights_from_distributed", refused)
    begun = time.monotonic()
    with pytest.raises(ServerError, match=r"rollout\.server: .*no such parameter"):
        publisher.publish(stream(qwen3_folder), "first")
    assert time.monotonic() - begun < 30.0
    proxy.lies.clear()
    publisher.publish(stream(qwen3_folder), "second")
    assert server.client.info().weight_version == "second"


def test_a_server_that_never_joins_is_named_with_the_address_and_the_key(
    proxy: Liar, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_group, "JOIN_S", 1.0)
    proxy.tell("/init_weights_update_group", nothing_done)
    with pytest.raises(ServerError, match=r"did not join this process at 127\.0\.0\.1 port \d+ .*weights=value"):
        publisher_of(proxy.url, qwen3_folder).publish(stream(qwen3_folder), "first")


def test_the_address_for_a_server_on_this_machine_is_the_loopback() -> None:
    assert local_address("http://127.0.0.1:1") == "127.0.0.1"
    assert local_address("http://localhost:1") in ("127.0.0.1", "::1")
    with pytest.raises(OSError):
        local_address("http://no-such-host.invalid:1")
