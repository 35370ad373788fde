"""A lying proxy in front of the real SGLang: a sample with a lie is requested again, then left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.liars import Liar, Lie, is_sampling, is_scoring, liar, sampling_lies, scoring_lies
from tests.sglang.conftest import VOCABULARY
from tests.sglang.streams import plan, stream
from tests.sglang.test_scoring import rollout
from tropd_mcore.config.schema import RolloutConfig, ServerConfig
from tropd_mcore.errors import ServerError, TeacherError
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.teacher.sglang import SglangTeacher
from tropd_mcore.types import SampleRequest

END = (2, *range(100, 160))
"""Many, so that some continuations stop and others do not."""
SAMPLING = sampling_lies(vocab_size=VOCABULARY, end=END[0])
SCORING = scoring_lies(vocab_size=VOCABULARY)
VICTIM = 7
"""First prompt token of the sample that the liar selects."""

ANSWERED = r"(SGLang |(rollout|teacher)\.server: /generate answered text/html)"
"""Of an answer that is JSON, or of one that is not."""


@pytest.fixture(scope="module", autouse=True)
def weights(server: SupervisedServer, qwen3_folder: Path) -> None:
    WeightPublisher(server.client, plan(qwen3_folder)).publish(stream(qwen3_folder), "v1")


@pytest.fixture
def proxy(server: SupervisedServer) -> Iterator[Liar]:
    with liar(server.client.url) as running:
        yield running


def client_of(proxy: Liar, key: str) -> SglangClient:
    return SglangClient(proxy.url, ServerConfig(url=proxy.url, max_retries=0), key=key)


def sampler_of(proxy: Liar, masked_share: float = 0.25) -> SglangSampler:
    config = RolloutConfig(server=ServerConfig(url=proxy.url, max_retries=0))
    client = client_of(proxy, "rollout.server")
    return SglangSampler([client], config, eos_ids=END, vocab_size=VOCABULARY, seed=3, masked_share=masked_share)


def requests() -> list[SampleRequest]:
    """Eight samples of different prompts, the first of which is the victim."""
    nothing = np.zeros(0, np.int32)
    return [
        SampleRequest(f"s{first}", "p", np.array([first, 20, 30], np.int32), nothing, 12, False, None)
        for first in range(VICTIM, VICTIM + 8)
    ]


def is_victim(body: dict[str, Any]) -> bool:
    return bool(body["input_ids"][0] == VICTIM)


def honest(found: list[Any]) -> bool:
    """Whether ids and log-probs are possible for a server."""
    return all(
        ((r.response_ids >= 0) & (r.response_ids < VOCABULARY)).all()
        and (r.rollout_logp <= 1e-3).all()
        and (r.finish_reason == "stop") == (r.response_ids[-1] in END)
        and not np.isin(r.response_ids[:-1], END).any()
        for r in found
    )


@pytest.mark.parametrize("lie", SAMPLING.values(), ids=SAMPLING.keys())
def test_a_sample_with_a_single_lie_is_requested_again(proxy: Liar, lie: Lie) -> None:
    proxy.tell("/generate", lie, about=lambda body: is_sampling(body) and is_victim(body), times=1)
    sampler = sampler_of(proxy)
    found = sampler.sample(requests(), step=0, expected_version="v1")
    assert [r.sample_id for r in found] == [request.sample_id for request in requests()]
    assert proxy.told == 1 and honest(found)


@pytest.mark.parametrize("lie", SAMPLING.values(), ids=SAMPLING.keys())
def test_a_sample_with_two_lies_is_left_out_and_counted(
    proxy: Liar, lie: Lie, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.tell("/generate", lie, about=lambda body: is_sampling(body) and is_victim(body))
    found = sampler_of(proxy).sample(requests(), step=0, expected_version="v1")
    assert [r.sample_id for r in found] == [request.sample_id for request in requests()[1:]]
    assert proxy.told == 2 and honest(found)
    said = rf"1 of 8 samples have no usable answer, asked for twice; the first is s{VICTIM}: {ANSWERED}"
    assert re.search(said, caplog.text)


@pytest.mark.parametrize("lie", SAMPLING.values(), ids=SAMPLING.keys())
def test_sampling_stops_if_every_answer_is_a_lie(proxy: Liar, lie: Lie) -> None:
    proxy.tell("/generate", lie, about=is_sampling)
    with pytest.raises(ServerError, match=r"^rollout\.server: 8 of 8 samples have no usable answer.*masked_share=0.25"):
        sampler_of(proxy).sample(requests(), step=0, expected_version="v1")


ROLLOUTS = [rollout(f"r{index}", 5, 3, 9, carries=index == 2, seed=index) for index in range(8)]


def teacher_of(proxy: Liar) -> SglangTeacher:
    client = client_of(proxy, "teacher.server")
    server: Any = SimpleNamespace(client=client, spec=SimpleNamespace(key="teacher.server"))
    return SglangTeacher(server, topk=4, teacher_width=VOCABULARY, student_width=VOCABULARY, on_failure="mask")


def is_first(body: dict[str, Any]) -> bool:
    return bool(body["input_ids"] == ROLLOUTS[0].token_ids.tolist())


@pytest.mark.parametrize("lie", SCORING.values(), ids=SCORING.keys())
def test_a_score_with_a_single_lie_is_requested_again(proxy: Liar, server: SupervisedServer, lie: Lie) -> None:
    truth = teacher_of(proxy).fetch(ROLLOUTS).samples
    proxy.tell("/generate", lie, about=lambda body: is_scoring(body) and is_first(body), times=1)
    found = teacher_of(proxy).fetch(ROLLOUTS).samples
    assert proxy.told == 1
    for one, other in zip(found, truth, strict=True):
        assert one is not None and other is not None
        np.testing.assert_allclose(one.logp_N, other.logp_N, atol=1e-4)
        np.testing.assert_allclose(one.topk_logp_NK, other.topk_logp_NK, atol=1e-4)


@pytest.mark.parametrize("lie", SCORING.values(), ids=SCORING.keys())
def test_a_score_with_two_lies_masks_its_sample(proxy: Liar, lie: Lie) -> None:
    proxy.tell("/generate", lie, about=lambda body: is_scoring(body) and is_first(body))
    teacher = teacher_of(proxy)
    found = teacher.fetch(ROLLOUTS).samples
    assert proxy.told == 2 and teacher.failed == 1
    assert [sample is None for sample in found] == [True] + [False] * 7


@pytest.mark.parametrize("lie", SCORING.values(), ids=SCORING.keys())
def test_scoring_stops_if_every_answer_of_the_teacher_is_a_lie(proxy: Liar, lie: Lie) -> None:
    proxy.tell("/generate", lie, about=is_scoring)
    with pytest.raises(TeacherError, match=rf"8 of 8 rollouts could not be scored; first: r0: {ANSWERED}"):
        teacher_of(proxy).fetch(ROLLOUTS)


def test_honest_answers_pass_unchanged(proxy: Liar) -> None:
    found = sampler_of(proxy, masked_share=0.0).sample(requests(), step=0, expected_version="v1")
    assert len(found) == 8 and honest(found) and {r.finish_reason for r in found} <= {"stop", "length"}
    assert not any(sample is None for sample in teacher_of(proxy).fetch(ROLLOUTS).samples)
