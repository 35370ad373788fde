"""Rollouts from a real server: log-probs, stop tokens, versions and limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.sglang.conftest import VOCABULARY, Oracle
from tests.sglang.streams import plan, request, stream
from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.rollout.prefixes import ResponseSampling, generate_responses
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.rollout.uniforms import trust_uniforms
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Prompt, Rollout

EOS = 2
"""In the model folder's config: the server stops there without being told."""
PROMPTS = [[5, 77, 201], [9], list(range(10, 160)), [300, 4, 4, 31, 8]]
HALF_OF_THE_VOCABULARY = tuple(range(0, VOCABULARY, 2))


def make_sampler(server: SupervisedServer, *, eos_ids: tuple[int, ...] = (), **config: float) -> SglangSampler:
    settings = RolloutConfig(server=server.config, **config)  # type: ignore[arg-type]
    return SglangSampler([server.client], settings, eos_ids=eos_ids, vocab_size=VOCABULARY, seed=7, masked_share=0.25)


@pytest.fixture(scope="module")
def version(server: SupervisedServer, qwen3_folder: Path) -> str:
    WeightPublisher(server.client, plan(qwen3_folder)).publish(stream(qwen3_folder), "sampling")
    return "sampling"


def assert_log_probs(rollout: Rollout, folder: Path, oracle: Oracle, temperature: float) -> None:
    table = oracle(folder, rollout.token_ids.tolist(), temperature)  # type: ignore[call-arg]
    first = len(rollout.prompt_ids) + len(rollout.prefix_ids)
    for offset, token_id in enumerate(rollout.response_ids):
        assert abs(table[first + offset - 1, token_id] - rollout.rollout_logp[offset]) < 1e-4


def assert_ended_by_itself_or_whole(rollout: Rollout, length: int) -> None:
    if rollout.finish_reason == "stop":
        assert rollout.response_ids[-1] == EOS and len(rollout.response_ids) <= length
    else:
        assert rollout.finish_reason == "length" and len(rollout.response_ids) == length


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_log_probs_equal_those_of_the_softmax_at_the_sampling_temperature(
    server: SupervisedServer, qwen3_folder: Path, log_softmax: Oracle, version: str, temperature: float
) -> None:
    requests = [request(f"{i}", prompt, prefix=[40 + i] * i) for i, prompt in enumerate(PROMPTS)]
    rollouts = make_sampler(server, temperature=temperature).sample(requests, step=3, expected_version=version)
    assert [rollout.sample_id for rollout in rollouts] == ["0", "1", "2", "3"]
    for asked, rollout in zip(requests, rollouts, strict=True):
        assert rollout.prompt_ids is asked.prompt_ids and rollout.prefix_ids is asked.prefix_ids
        assert_ended_by_itself_or_whole(rollout, 12)
        assert rollout.policy_version == version
        assert_log_probs(rollout, qwen3_folder, log_softmax, temperature)
        np.testing.assert_array_equal(
            rollout.trust_u, trust_uniforms(7, 3, rollout.sample_id, len(rollout.response_ids))
        )


def test_the_stop_token_is_kept_in_the_response_with_its_log_prob(
    server: SupervisedServer, qwen3_folder: Path, log_softmax: Oracle, version: str
) -> None:
    sampler = make_sampler(server, eos_ids=HALF_OF_THE_VOCABULARY)
    requests = [request(f"{i}", [20 + i], new=200) for i in range(6)]
    for rollout in sampler.sample(requests, step=0, expected_version=version):
        stops = np.isin(rollout.response_ids, HALF_OF_THE_VOCABULARY)
        assert rollout.finish_reason == "stop"
        assert stops[-1] and not stops[:-1].any()
        assert_log_probs(rollout, qwen3_folder, log_softmax, 1.0)


def test_equal_requests_are_sampled_independently(server: SupervisedServer, version: str) -> None:
    requests = [request(f"{i}", [5, 6, 7], new=20) for i in range(4)]
    rollouts = make_sampler(server).sample(requests, step=0, expected_version=version)
    assert len({tuple(rollout.response_ids) for rollout in rollouts}) == 4


def test_rollouts_from_unexpected_weights_are_refused(server: SupervisedServer, version: str) -> None:
    with pytest.raises(ServerError, match=r"has weights 'sampling'; expected 'later'"):
        make_sampler(server).sample([request("a", [5])], step=0, expected_version="later")


def test_a_sample_that_could_exceed_the_servers_context_is_refused_and_one_that_just_fits_is_complete(
    server: SupervisedServer, version: str
) -> None:
    sampler = make_sampler(server)
    longest = server.client.info().longest_sequence
    with pytest.raises(ServerError, match=rf"may reach {longest + 1} tokens but the server takes {longest}"):
        sampler.sample([request("a", [5, 6], new=longest - 1)], step=0, expected_version=version)
    fits = [request("a", list(range(3, 303)) + [9] * 150, new=longest - 450)]
    (rollout,) = sampler.sample(fits, step=0, expected_version=version)
    assert_ended_by_itself_or_whole(rollout, longest - 450)


def test_a_token_id_outside_the_vocabulary_never_reaches_the_server(server: SupervisedServer, version: str) -> None:
    with pytest.raises(DataError, match=rf"the prompt of sample a holds token id {VOCABULARY}"):
        make_sampler(server).sample([request("a", [5, VOCABULARY])], step=0, expected_version=version)
    with pytest.raises(DataError, match="the prefix of sample a holds token id -1"):
        make_sampler(server).sample([request("a", [5], prefix=[-1])], step=0, expected_version=version)
    assert server.client.healthy()


def test_teacher_responses_are_stored_without_their_stop_token_and_never_sampled_twice(
    server: SupervisedServer, version: str, tmp_path: Path
) -> None:
    prompts = [Prompt(f"p{i}", np.array([20 + i, 3], np.int32), None, None) for i in range(5)]
    out = tmp_path / "responses.jsonl"
    (tmp_path / "responses.jsonl.partial").write_text(
        '{"id": "p3", "response_ids": [1, 3, 5], "finished": true}\n{"id": "p4", "response_'
    )
    sampling = ResponseSampling(
        max_new_tokens=40,
        temperature=1.0,
        top_p=1.0,
        eos_ids=HALF_OF_THE_VOCABULARY,
        vocab_size=VOCABULARY,
        served_width=VOCABULARY,
    )
    report = generate_responses(ServerFleet([server]), prompts, out, sampling, chunk=2)
    assert dataclasses.astuple(report) == (5, 4, 5)
    lines = out.read_text().splitlines()
    assert lines[3] == '{"id": "p3", "response_ids": [1, 3, 5], "finished": true}'
    assert [line.split('"')[3] for line in lines] == ["p0", "p1", "p2", "p3", "p4"]
    assert all(token_id % 2 for line in lines for token_id in eval_ids(line))
    assert generate_responses(ServerFleet([server]), prompts, out, sampling).sampled == 0
    assert out.read_text().splitlines() == lines
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def eval_ids(line: str) -> list[int]:
    inside = line[line.index("[") + 1 : line.index("]")]
    return [int(part) for part in inside.split(",") if part.strip()]
