"""Weight updates of a real server: what is loaded, under which label, and what is never sent."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sglang.conftest import VOCABULARY, Oracle
from tests.sglang.streams import plan, request, stream, weights
from tests.sglang.test_sampling import assert_log_probs
from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import GateError, ServerDied, ServerError
from tropd_mcore.rollout import route_choice
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Rollout

JSON_HEADER = {"Content-Type": "application/json"}
PROBE = [5, 77, 201, 4, 4, 90, 17]

Stream = Iterator[tuple[str, torch.Tensor]]
Breakage = Callable[[Path], Stream]


def assert_serves(server: SupervisedServer, publisher: WeightPublisher, folder: Path, oracle: Oracle) -> None:
    table = oracle(folder, PROBE)
    expected = [table[index - 1, PROBE[index]] for index in range(1, len(PROBE))]
    np.testing.assert_allclose(publisher.probe(np.array(PROBE, np.int32)), expected, atol=1e-4)


def sample(server: SupervisedServer, version: str) -> Rollout:
    config = RolloutConfig(server=server.config)
    sampler = SglangSampler([server.client], config, eos_ids=(), vocab_size=VOCABULARY, seed=0, masked_share=0.25)
    (rollout,) = sampler.sample([request("a", PROBE)], step=0, expected_version=version)
    assert rollout.policy_version == version
    return rollout


@pytest.mark.parametrize("transport", ["shared", "value"])
def test_log_probs_follow_the_published_weights_and_cached_prefixes_do_not_survive(
    server: SupervisedServer, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle, transport: str
) -> None:
    publisher = WeightPublisher(server.client, plan(qwen3_folder), transport=transport, bucket_bytes=20_000)  # type: ignore[arg-type]
    for version, folder in (("a", qwen3_folder), ("b", other_folder), ("c", qwen3_folder)):
        report = publisher.publish(stream(folder), version)
        assert report.tensors == len(weights(folder)) and report.buckets > 3
        assert_serves(server, publisher, folder, log_softmax)
        # leaves the KV of the prompt in the cache, which the next weights must not reuse
        assert_log_probs(sample(server, version), folder, log_softmax, 1.0)


def test_the_server_holds_the_published_weights_bit_for_bit(server: SupervisedServer, other_folder: Path) -> None:
    publisher = WeightPublisher(server.client, plan(other_folder), bucket_bytes=20_000)
    publisher.publish(stream(other_folder), "bits")
    ask = urllib.request.Request(f"{server.client.url}/weights_checker", b'{"action": "checksum"}', JSON_HEADER)
    (rank,) = json.load(urllib.request.urlopen(ask))["ranks"]
    source = weights(other_folder)
    for name, checksum in rank["checksums"].items():
        for fused, parts in (("qkv_proj", "q_proj k_proj v_proj"), ("gate_up_proj", "gate_proj up_proj")):
            if fused in name:
                found = [source.pop(name.replace(fused, part)) for part in parts.split()]
                break
        else:
            found = [source.pop(name)]
        assert checksum in possible_checksums(found), name
    assert not source


def possible_checksums(parts: list[torch.Tensor]) -> set[str]:
    """Of the parts on top of each other, whole or with the zeros that SGLang pads each dim with."""
    found = set()
    for rows, columns in itertools.product((1, 32, 64), (1, 32)):
        padded = []
        for part in parts:
            sides = (0, 0, 0, -part.shape[0] % rows) if part.ndim == 2 else (0, -part.shape[0] % rows)
            sides = (0, -part.shape[1] % columns, *sides[2:]) if part.ndim == 2 else sides
            padded.append(torch.nn.functional.pad(part, sides))
        found.add(hashlib.sha256(torch.cat(padded).numpy().tobytes()).digest()[:8].hex())
    return found


def test_the_proof_passes_for_a_complete_plan_and_fails_for_one_with_a_wrong_name(
    server: SupervisedServer, qwen3_folder: Path, log_softmax: Oracle
) -> None:
    def misnamed() -> Stream:
        for name, tensor in stream(qwen3_folder):
            yield name.replace("layers.3.mlp.up_proj", "layers.9.mlp.up_proj"), tensor

    wrong_plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in misnamed()]
    with pytest.raises(GateError, match="left different weights"):
        WeightPublisher(server.client, wrong_plan).verify_sync(misnamed, "wrong")
    publisher = WeightPublisher(server.client, plan(qwen3_folder))
    publisher.verify_sync(lambda: stream(qwen3_folder), "proven")
    assert_serves(server, publisher, qwen3_folder, log_softmax)
    sample(server, "proven")


def unknown(folder: Path) -> Stream:
    for name, tensor in stream(folder):
        yield name.replace("model.norm", "model.gnorm"), tensor


def wrong_shape(folder: Path) -> Stream:
    for name, tensor in stream(folder):
        yield name, tensor[:-1] if name == "model.norm.weight" else tensor


def wrong_dtype(folder: Path) -> Stream:
    for name, tensor in stream(folder):
        yield name, tensor.bfloat16() if name == "model.norm.weight" else tensor


def missing(folder: Path) -> Stream:
    for name, tensor in stream(folder):
        if name != "model.norm.weight":
            yield name, tensor


def twice(folder: Path) -> Stream:
    yield from stream(folder)
    yield from stream(folder)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (unknown, "model.gnorm.weight is not a tensor of the plan"),
        (wrong_shape, r"model.norm.weight is torch.float32 \[47\]; the plan says torch.float32 \[48\]"),
        (wrong_dtype, r"model.norm.weight is torch.bfloat16 \[48\]; the plan says torch.float32"),
        (missing, "1 of 47 tensors are missing from the weights to publish, the first is model.norm.weight"),
        (twice, "comes twice"),
    ],
)
def test_a_wrong_weight_stream_of_one_bucket_sends_nothing_to_the_server(
    server: SupervisedServer,
    qwen3_folder: Path,
    other_folder: Path,
    log_softmax: Oracle,
    broken: Breakage,
    message: str,
) -> None:
    publisher = WeightPublisher(server.client, plan(qwen3_folder))
    publisher.publish(stream(qwen3_folder), "before")
    with pytest.raises(ServerError, match=message):
        publisher.publish(broken(other_folder), "after")
    sample(server, "before")
    assert_serves(server, publisher, qwen3_folder, log_softmax)


def test_a_weight_stream_that_fails_after_some_buckets_leaves_an_unexpected_label_and_can_be_repeated(
    server: SupervisedServer, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle
) -> None:
    publisher = WeightPublisher(server.client, plan(qwen3_folder), bucket_bytes=20_000)
    publisher.publish(stream(qwen3_folder), "whole")
    with pytest.raises(ServerError, match="1 of 47 tensors are missing"):
        publisher.publish(missing(other_folder), "half")
    for version in ("whole", "half"):
        with pytest.raises(ServerError, match="has weights 'half:incomplete'"):
            sample(server, version)
    publisher.publish(stream(other_folder), "half")
    sample(server, "half")
    assert_serves(server, publisher, other_folder, log_softmax)


def test_an_update_session_and_a_pause_that_a_killed_trainer_left_behind_do_not_block_the_next_one(
    server: SupervisedServer, qwen3_folder: Path, log_softmax: Oracle
) -> None:
    server.client.pause()
    server.client.begin_weight_update()
    publisher = WeightPublisher(server.client, plan(qwen3_folder))
    publisher.publish(stream(qwen3_folder), "again")
    sample(server, "again")
    assert_serves(server, publisher, qwen3_folder, log_softmax)


def test_without_room_in_shared_memory_weights_go_by_value_with_a_warning(
    server: SupervisedServer,
    other_folder: Path,
    log_softmax: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(route_choice, "shared_memory_room", lambda: 1000)
    publisher = WeightPublisher(server.client, plan(other_folder))
    assert "usable; weights go through HTTP by value" in caplog.text
    publisher.publish(stream(other_folder), "small")
    assert_serves(server, publisher, other_folder, log_softmax)


def test_a_server_that_runs_elsewhere_gets_weights_by_value_and_is_neither_restarted_nor_stopped(
    server: SupervisedServer, qwen3_folder: Path, log_softmax: Oracle
) -> None:
    config = server.config.model_copy(update={"url": server.client.url})
    server.client.pause()  # as a launch that was killed while it published leaves it
    with SupervisedServer(dataclasses.replace(server.spec, config=config)) as elsewhere:
        publisher = WeightPublisher(elsewhere.client, plan(qwen3_folder))
        assert not elsewhere.client.same_host
        publisher.publish(stream(qwen3_folder), "elsewhere")
        assert_serves(elsewhere, publisher, qwen3_folder, log_softmax)
        with pytest.raises(ServerDied, match="as it was"):
            elsewhere.recover(ServerDied("as it was"))
    assert server.client.healthy()


def test_a_real_server_gives_its_memory_back_and_serves_what_is_published_afterwards(
    server: SupervisedServer, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle
) -> None:
    """The order of requests, on a CPU. There SGLang has no memory saver, so the memory itself stays where it is."""
    publisher = WeightPublisher(server.client, plan(qwen3_folder))
    publisher.publish(stream(qwen3_folder), "before")
    sample(server, "before")
    server.release_memory()
    server.resume_memory()
    publisher.publish(stream(other_folder), "after")
    assert_serves(server, publisher, other_folder, log_softmax)
    assert_log_probs(sample(server, "after"), other_folder, log_softmax, 1.0)
