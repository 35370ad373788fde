"""Weight updates of a real server: what is loaded, under which label, and what never leaves us."""

from __future__ import annotations

import hashlib
import itertools
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sglang.conftest import VOCABULARY, Oracle
from tests.sglang.streams import plan, request, stream, weights
from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import GateError, ServerError
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving.supervisor import SupervisedServer

JSON_HEADER = {"Content-Type": "application/json"}
PROBE = [5, 77, 201, 4, 4, 90, 17]

Stream = Iterator[tuple[str, torch.Tensor]]


def assert_serves(server: SupervisedServer, publisher: WeightPublisher, folder: Path, oracle: Oracle) -> None:
    table = oracle(folder, PROBE)
    expected = [table[index - 1, PROBE[index]] for index in range(1, len(PROBE))]
    np.testing.assert_allclose(publisher.probe(np.array(PROBE, np.int32)), expected, atol=1e-4)


def sample_version(server: SupervisedServer, version: str) -> str:
    sampler = SglangSampler(
        server.client, RolloutConfig(server=server.config), eos_ids=(), vocab_size=VOCABULARY, seed=0
    )
    (rollout,) = sampler.sample([request("a", PROBE)], step=0, expected_version=version)
    return rollout.policy_version


def test_log_probs_follow_the_published_weights_and_cached_prefixes_do_not_survive(
    server: SupervisedServer, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle
) -> None:
    publisher = WeightPublisher(server.client, plan(qwen3_folder), bucket_bytes=20_000)
    for version, folder in (("a", qwen3_folder), ("b", other_folder), ("c", qwen3_folder)):
        report = publisher.publish(stream(folder), version)
        assert report.tensors == len(weights(folder)) and report.buckets > 3
        assert_serves(server, publisher, folder, log_softmax)
        assert sample_version(server, version) == version
        # the probe's prefix is in the KV cache now; the next weights must not reuse it
        assert_serves(server, publisher, folder, log_softmax)


def test_the_server_holds_exactly_the_bits_that_were_published(server: SupervisedServer, other_folder: Path) -> None:
    WeightPublisher(server.client, plan(other_folder), bucket_bytes=20_000).publish(stream(other_folder), "bits")
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


def test_proof_passes_for_a_whole_plan_and_fails_for_one_with_a_wrong_name(
    server: SupervisedServer, qwen3_folder: Path, log_softmax: Oracle
) -> None:
    def misnamed() -> Stream:
        for name, tensor in stream(qwen3_folder):
            yield name.replace("layers.3.mlp.up_proj", "layers.9.mlp.up_proj"), tensor

    wrong_plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in misnamed()]
    with pytest.raises(GateError, match="left different weights"):
        WeightPublisher(server.client, wrong_plan).prove(misnamed, "wrong")
    publisher = WeightPublisher(server.client, plan(qwen3_folder))
    publisher.prove(lambda: stream(qwen3_folder), "proven")
    assert_serves(server, publisher, qwen3_folder, log_softmax)
    assert sample_version(server, "proven") == "proven"


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
        (missing, "end without 1 of 47 tensors, the first being model.norm.weight"),
        (twice, "comes twice"),
    ],
)
def test_a_wrong_stream_of_one_bucket_leaves_the_server_alone(
    server: SupervisedServer, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle, broken, message: str
) -> None:
    publisher = WeightPublisher(server.client, plan(qwen3_folder))
    publisher.publish(stream(qwen3_folder), "before")
    with pytest.raises(ServerError, match=message):
        publisher.publish(broken(other_folder), "after")
    assert sample_version(server, "before") == "before"
    assert_serves(server, publisher, qwen3_folder, log_softmax)


def test_a_stream_that_breaks_after_some_buckets_leaves_a_label_that_no_sampler_expects_and_can_be_repeated(
    server: SupervisedServer, qwen3_folder: Path, other_folder: Path, log_softmax: Oracle
) -> None:
    publisher = WeightPublisher(server.client, plan(qwen3_folder), bucket_bytes=20_000)
    publisher.publish(stream(qwen3_folder), "whole")
    with pytest.raises(ServerError, match="end without 1 of 47 tensors"):
        publisher.publish(missing(other_folder), "half")
    for version in ("whole", "half"):
        with pytest.raises(ServerError, match="has weights 'half:incomplete'"):
            sample_version(server, version)
    publisher.publish(stream(other_folder), "half")
    assert sample_version(server, "half") == "half"
    assert_serves(server, publisher, other_folder, log_softmax)


def test_an_update_session_and_a_pause_that_a_killed_trainer_left_behind_do_not_block_the_next_one(
    server: SupervisedServer, qwen3_folder: Path, log_softmax: Oracle
) -> None:
    server.client.pause()
    server.client.begin_weight_update()
    publisher = WeightPublisher(server.client, plan(qwen3_folder))
    publisher.publish(stream(qwen3_folder), "again")
    assert sample_version(server, "again") == "again"
    assert_serves(server, publisher, qwen3_folder, log_softmax)
