"""The requests that sample a step and publish weights, sent to a real HTTP server without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.glue.fake_server import VOCABULARY, FakeServer, fake_server, logp_of
from tests.glue.stubs import make_config, make_prompts, make_student, one_rank
from tropd_mcore.config.schema import Config, RolloutConfig, ServerConfig
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import ServerError
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout import policy_server as policy_server_module
from tropd_mcore.rollout.policy_server import PolicyServers
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.rollout.uniforms import trust_uniforms
from tropd_mcore.serving import transport as transport_module
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.train import components as parts_module
from tropd_mcore.train.components import make_policy
from tropd_mcore.types import Rollout, SampleRequest

SEED, EOS = 11, (2, 5)
SHAPES = {"a": (3, 2), "b": (5,)}
PLAN = [(name, shape, torch.float32) for name, shape in SHAPES.items()]


def weights(value: float) -> dict[str, Tensor]:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def client_of(server: FakeServer, *, at_once: int = 64) -> SglangClient:
    config = ServerConfig(url=server.url, max_retries=0, max_concurrency=at_once)
    return SglangClient(server.url, config, key="rollout.server")


def sampler_of(server: FakeServer, *, at_once: int = 64, **rollout: Any) -> SglangSampler:
    config = RolloutConfig(server=ServerConfig(url=server.url, max_retries=0, max_concurrency=at_once), **rollout)
    client = client_of(server, at_once=config.server.max_concurrency)
    return SglangSampler([client], config, eos_ids=EOS, vocab_size=VOCABULARY, seed=SEED, masked_share=0.25)


def publish(server: FakeServer, value: float, version: str) -> None:
    WeightPublisher(client_of(server), PLAN).publish(iter(weights(value).items()), version)


def request(name: str = "s", *, prefix: int = 0, new: int = 6) -> SampleRequest:
    prompt_ids, prefix_ids = np.array([9, 3, 4], np.int32), np.arange(20, 20 + prefix, dtype=np.int32)
    return SampleRequest(name, "p", prompt_ids, prefix_ids, new, carries_prefix_loss=prefix > 0, answer="7")


def sample(server: FakeServer, asked: SampleRequest, step: int, version: str = "default", **rollout: Any) -> Rollout:
    (found,) = sampler_of(server, **rollout).sample([asked], step=step, expected_version=version)
    return found


def test_the_uniforms_of_a_rollout_are_those_of_its_step() -> None:
    with fake_server() as server:
        one, again, other = (sample(server, request(), step) for step in (3, 3, 4))
    assert np.array_equal(one.trust_u, again.trust_u) and not np.array_equal(one.trust_u, other.trust_u)
    for step, rollout in ((3, one), (4, other)):
        assert np.array_equal(rollout.trust_u, trust_uniforms(SEED, step, "s", len(rollout.response_ids)))


def test_the_uniforms_of_two_samples_of_a_step_differ() -> None:
    with fake_server() as server:
        asked = [request("one"), request("two")]
        one, two = sampler_of(server).sample(asked, step=3, expected_version="default")
    assert not np.array_equal(one.trust_u, two.trust_u)


def test_the_input_of_a_request_is_the_prompt_followed_by_the_prefix() -> None:
    with fake_server() as server:
        rollout = sample(server, request(prefix=4), 0)
        sample(server, request(), 0)
    with_prefix, without = (body["input_ids"] for body in server.bodies("/generate"))
    assert with_prefix == [9, 3, 4, 20, 21, 22, 23] and without == [9, 3, 4]
    assert rollout.prompt_ids.tolist() == [9, 3, 4] and rollout.prefix_ids.tolist() == [20, 21, 22, 23]
    assert rollout.token_ids.tolist() == [*with_prefix, *rollout.response_ids.tolist()]


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7, "top_p": 1.0, "top_k": -1}),
        ({"top_p": 0.9, "top_k": 12}, {"temperature": 1.0, "top_p": 0.9, "top_k": 12}),
        ({"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.3, "top_p": 0.8, "top_k": -1}),
    ],
)
def test_every_request_has_the_sampling_settings_of_the_configuration(
    rollout: dict[str, Any], expected: dict[str, Any]
) -> None:
    with fake_server() as server:
        sample(server, request(new=5), 0, **rollout)
    (body,) = server.bodies("/generate")
    sampling = body["sampling_params"]
    assert {name: sampling[name] for name in expected} == expected
    assert sampling["max_new_tokens"] == 5 and sampling["stop_token_ids"] == list(EOS)
    assert body["return_logprob"] is True


def test_no_other_field_of_a_request_changes_the_sampling_distribution() -> None:
    with fake_server() as server:
        sample(server, request(), 0)
    (body,) = server.bodies("/generate")
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    for name, value in body["sampling_params"].items():
        if name in neutral:
            assert value == neutral[name], name
    known = {"max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "skip_special_tokens"}
    assert body["sampling_params"].keys() <= known | neutral.keys() | {"sampling_seed"}
    assert body.keys() == {"rid", "input_ids", "sampling_params", "return_logprob"}


def test_each_sample_of_a_prompt_and_each_step_has_its_own_seed_which_repeats() -> None:
    """An engine that takes seeds would otherwise give all samples of a prompt the same text."""
    with fake_server() as server:
        for step in (3, 3, 4):
            sampler_of(server).sample([request("one"), request("two")], step=step, expected_version="default")
    first, again, other = (
        {body["sampling_params"]["sampling_seed"] for body in server.bodies("/generate")[start : start + 2]}
        for start in (0, 2, 4)
    )
    assert first == again and len(first | other) == 4 and all(0 <= seed < 2**63 for seed in first | other)


def test_the_id_of_a_request_is_never_the_beginning_of_another_one() -> None:
    with fake_server() as server:
        sampler_of(server).sample([request(f"s{i}") for i in range(4)], step=3, expected_version="default")
    rids = [body["rid"] for body in server.bodies("/generate")]
    assert len(set(rids)) == 4 and len({len(rid) for rid in rids}) == 1


def test_after_an_update_no_token_is_sampled_from_the_cache_of_the_old_weights() -> None:
    with fake_server() as server:
        found, held = [], []
        for step, value in enumerate((1.0, 2.0, 3.0)):
            publish(server, value, f"v{step}")
            held.append(server.checksum())
            found.append(sample(server, request(), step, f"v{step}"))
    assert len(set(held)) == 3
    for rollout, checksum in zip(found, held, strict=True):
        np.testing.assert_allclose(rollout.rollout_logp, logp_of(checksum), rtol=1e-6)


def test_an_update_sends_every_tensor_and_sets_the_label_after_the_last() -> None:
    with fake_server() as server:
        publish(server, 4.0, "v7")
        labels = [body["weight_version"] for body in server.bodies("/update_weights_from_tensor")]
    assert server.weights == {name: tensor.numpy().tobytes() for name, tensor in weights(4.0).items()}
    assert "v7" not in labels and server.label == "v7" and not server.paused and not server.in_update
    paths = server.paths()
    last_tensor = len(paths) - 1 - paths[::-1].index("/update_weights_from_tensor")
    assert paths.index("/pause_generation") < paths.index("/begin_weight_update") < last_tensor
    assert last_tensor < paths.index("/flush_cache") < paths.index("/update_weight_version")
    assert paths.index("/update_weight_version") < paths.index("/continue_generation")


def test_an_update_with_a_missing_tensor_never_gets_its_label() -> None:
    with fake_server() as server:
        publish(server, 1.0, "v1")
        publisher = WeightPublisher(client_of(server), PLAN, bucket_bytes=8)
        with pytest.raises(ServerError, match="1 of 2 tensors are missing from the weights to publish, the first is b"):
            publisher.publish(iter([("a", torch.zeros(3, 2))]), "v2")
        assert server.label != "v2" and not server.paused and not server.in_update
        with pytest.raises(ServerError, match="expected 'v2'"):
            sample(server, request(), 0, "v2")


def test_a_proven_update_ends_with_the_weights_and_the_label_of_the_version() -> None:
    with fake_server() as server:
        WeightPublisher(client_of(server), PLAN).verify_sync(lambda: iter(weights(4.0).items()), "v1")
        assert server.label == "v1"
        assert server.weights == {name: tensor.numpy().tobytes() for name, tensor in weights(4.0).items()}
    actions = [body["action"] for body in server.bodies("/weights_checker")]
    assert actions == ["checksum", "reset_tensors", "checksum", "checksum"]


def test_tokens_under_another_label_than_the_one_published_are_refused() -> None:
    with fake_server() as server:
        publish(server, 1.0, "v1")
        with pytest.raises(ServerError, match="has weights 'v1'; expected 'v2'"):
            sample(server, request(), 0, "v2")


@contextmanager
def launch(server: FakeServer, config: Config) -> Iterator[tuple[RolloutSource, SimpleNamespace]]:
    """Rollouts of one rank over HTTP: the product from the prompts to the wire. The test sets the student's weights."""
    learner = SimpleNamespace(value=0.0, recovered=[])

    def recover(died: ServerError) -> None:
        learner.recovered.append(died)
        server.weights, server.label, server.die_after = {}, "default", None
        server.cache.clear()

    def iterate_hf(*_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        yield from weights(learner.value).items()

    client = client_of(server, at_once=config.rollout.server.max_concurrency)
    supervised: Any = SimpleNamespace(
        wait_ready=lambda: None,
        begin_recovery=recover,
        client=client,
        is_started=True,
        config=config.rollout.server,
        spec=SimpleNamespace(key="rollout.server", called="rollout.server"),
    )
    ends: Any = SimpleNamespace(ids=EOS)
    with (
        one_rank() as layout,
        mock.patch.object(policy_server_module, "iterate_hf", iterate_hf),
        mock.patch.object(parts_module, "hf_weight_plan", lambda _: list(SHAPES.items())),
    ):
        site: Any = SimpleNamespace(
            config=config,
            layout=layout,
            platform=SimpleNamespace(name="cpu"),
            student=SimpleNamespace(vocab_size=VOCABULARY),
        )
        student = make_student(layout)
        student.config = SimpleNamespace(params_dtype=torch.float32)
        servers = {"rollout.server": supervised}
        policy = make_policy(site, student, ends, PolicyServers(servers, servers))
        prompts = PromptSet(make_prompts(4), shuffle=False, seed=0)
        yield RolloutSource(config, RunDir(config.run.dir), prompts, policy, layout, vocab_size=VOCABULARY), learner


def guided(tmp_path: Path, **sections: Any) -> Config:
    guidance = {"enabled": True, "schedule": "linear", "min_continuation": 1}
    return make_config(
        tmp_path,
        objective={"kind": "tropd", "guidance": guidance, "outlier": {"topk": 3}},
        rollout={"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8},
        **sections,
    )


def test_rollouts_of_every_step_use_its_weights_its_prefix_and_its_uniforms(tmp_path: Path) -> None:
    config = guided(tmp_path)
    with fake_server() as server, launch(server, config) as (source, learner):
        for step, prefix in ((0, 5), (1, 4), (2, 3)):
            learner.value, before = float(step), len(server.bodies("/generate"))
            rollouts = source.at_step(step)
            asked = server.bodies("/generate")[before:]
            inputs = [r.prompt_ids.tolist() + r.prefix_ids.tolist() for r in rollouts]
            assert sorted(body["input_ids"] for body in asked) == sorted(inputs)
            assert {body["sampling_params"]["temperature"] for body in asked} == {0.7}
            assert {body["sampling_params"]["top_p"] for body in asked} == {0.9}
            assert all(body["sampling_params"]["stop_token_ids"] == list(EOS) for body in asked)
            assert {len(r.prefix_ids) for r in rollouts} == {prefix} and len(rollouts) == 4
            assert {r.policy_version for r in rollouts} == {server.label}
            for rollout in rollouts:
                np.testing.assert_allclose(rollout.rollout_logp, logp_of(server.checksum()), rtol=1e-6)
                uniforms = trust_uniforms(config.run.seed, step, rollout.sample_id, len(rollout.response_ids))
                assert np.array_equal(rollout.trust_u, uniforms)


@pytest.mark.parametrize("weight_sync", [True, False])
def test_the_first_publication_of_a_launch_is_proven_if_the_gate_is_on(tmp_path: Path, weight_sync: bool) -> None:
    config = guided(tmp_path, gates={"weight_sync": weight_sync})
    with fake_server() as server, launch(server, config) as (source, _):
        for step in (0, 1):
            source.at_step(step)
        destroyed = [body["action"] for body in server.bodies("/weights_checker")].count("reset_tensors")
    assert destroyed == int(weight_sync)


def test_a_server_that_dies_while_sampling_gets_the_weights_again_and_finishes_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "FIRST_WAIT_S", 0.01)
    config = make_config(tmp_path, rollout={"server": {"max_concurrency": 1}})
    with fake_server() as server, launch(server, config) as (source, learner):
        learner.value, server.die_after = 3.0, 2
        rollouts = source.at_step(0)
        assert len(learner.recovered) == 1 and len({r.sample_id for r in rollouts}) == 4
        assert server.weights == {name: tensor.numpy().tobytes() for name, tensor in weights(3.0).items()}
        for rollout in rollouts:
            np.testing.assert_allclose(rollout.rollout_logp, logp_of(server.checksum()), rtol=1e-6)
