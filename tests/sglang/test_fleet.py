"""Three real servers that share the samples of a step: the same samples as with one, and nothing lost when one is."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.glue.folder_policy import policy_on
from tests.glue.stubs import one_rank
from tests.sglang.conftest import Oracle, cpu_server
from tests.sglang.test_sampling import assert_ended_by_itself_or_whole, assert_log_probs
from tests.slow_engine import engine_of, slowed
from tropd_mcore.errors import GateError
from tropd_mcore.rollout.policy_server import PolicyServer, PolicyServers
from tropd_mcore.serving import wire
from tropd_mcore.serving.router import Router
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Rollout, SampleRequest

SERVERS = 3
SAMPLES = 24
LONG, SHORT = 160, 6
"""New tokens of a sample."""
WAIT_S = 300.0
"""Longest wait for an expected event. It only ends a hang."""


@pytest.fixture(scope="module")
def fleet(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SupervisedServer]]:
    """Servers with the weights of the folder, which start side by side."""
    with ExitStack() as cleanup:
        servers = []
        for place in range(SERVERS):
            spec = cpu_server(
                llama_folder,
                tmp_path_factory.mktemp(f"run{place}"),
                name=f"rollout-{place}",
                max_restarts=9,
                max_concurrency=16,
            )
            server = SupervisedServer(replace(spec, key=f"rollout.servers.{place}"))
            cleanup.callback(server.stop)
            server.start()
            servers.append(server)
        yield servers


def samples(*, long: bool = False) -> list[SampleRequest]:
    """Samples of uneven lengths to eight prompts."""
    return [
        SampleRequest(
            sample_id=f"000000/p{index % 8}/{index // 8}",
            prompt_id=f"p{index % 8}",
            prompt_ids=np.array([5, 9 + index % 8], np.int32),
            prefix_ids=np.array([20, 21][: index % 3], np.int32),
            max_new_tokens=LONG + 30 * (index % 5) if long else SHORT + index % 5,
            carries_prefix_loss=False,
            answer=None,
        )
        for index in range(SAMPLES)
    ]


@contextmanager
def policy_of(
    servers: list[SupervisedServer], folder: Path, tmp_path: Path, router: Router | None = None
) -> Iterator[PolicyServer]:
    """A launch of one rank whose student has the weights of the folder."""
    reached = {server.spec.key: server for server in servers}
    with one_rank() as layout, policy_on(layout, PolicyServers(reached, reached, router), folder, tmp_path) as policy:
        yield policy


def assert_whole(
    rollouts: list[Rollout], asked: list[SampleRequest], folder: Path, log_softmax: Oracle, *, step: int
) -> None:
    """Every sample once, in order, of one version, whole, with the log-probs of the weights."""
    assert [rollout.sample_id for rollout in rollouts] == [request.sample_id for request in asked]
    assert len({rollout.policy_version for rollout in rollouts}) == 1
    assert rollouts[0].policy_version.endswith(f"/step-{step:06d}")
    for rollout, request in zip(rollouts, asked, strict=True):
        assert_ended_by_itself_or_whole(rollout, request.max_new_tokens)
        assert np.array_equal(rollout.prompt_ids, request.prompt_ids)
        assert_log_probs(rollout, folder, log_softmax, 1.0)


def pid_of(server: SupervisedServer) -> int:
    assert server._process is not None
    return server._process.pid


def after_answers(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> None:
    """Run `act` when the client has read `count` answers of the step."""
    read_generation, answers = wire.read_generation, []

    def read(answer: object, asked: wire.GenerationRequest) -> wire.Generation:
        answers.append(read_generation(answer, asked))
        if len(answers) == count:
            act()
        return answers[-1]

    monkeypatch.setattr(wire, "read_generation", read)


def wait_for_all(policy: PolicyServer) -> None:
    """Wait until every server can take part again."""
    deadline = time.monotonic() + WAIT_S
    members = policy._members.values()
    while not all(member.state == "ready" or member.server.is_ready() for member in members):
        assert time.monotonic() < deadline, "a server did not come back"
        time.sleep(0.5)


def test_three_servers_give_the_same_samples_as_one(
    fleet: list[SupervisedServer], llama_folder: Path, tmp_path: Path, log_softmax: Oracle
) -> None:
    """Same ids in the same order with the same uniforms; every server answered some of them."""
    asked = samples()
    before = [answers_in_log(server) for server in fleet]
    with policy_of(fleet, llama_folder, tmp_path) as policy:
        of_three = policy.sample(asked, step=3)
    assert all(answers_in_log(server) > count for server, count in zip(fleet, before, strict=True))
    with policy_of(fleet[:1], llama_folder, tmp_path) as policy:
        of_one = policy.sample(asked, step=3)
    for rollouts in (of_three, of_one):
        assert_whole(rollouts, asked, llama_folder, log_softmax, step=3)
    for three, one in zip(of_three, of_one, strict=True):
        both = min(len(three.trust_u), len(one.trust_u))  # the sampled text, and so its length, may differ
        assert both and np.array_equal(three.trust_u[:both], one.trust_u[:both])


def answers_in_log(server: SupervisedServer) -> int:
    return server.spec.log_path.read_text(errors="replace").count("POST /generate")


def test_a_step_ends_although_one_server_is_killed_and_one_is_stopped_and_both_come_back(
    fleet: list[SupervisedServer],
    llama_folder: Path,
    tmp_path: Path,
    log_softmax: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    asked = samples(long=True)
    killed, stopped, _ = fleet
    pids = pid_of(killed), pid_of(stopped)
    with policy_of(fleet, llama_folder, tmp_path) as policy:
        policy.sample(samples(), step=0)

        def strike() -> None:
            os.killpg(pids[0], signal.SIGKILL)
            os.killpg(pids[1], signal.SIGSTOP)

        after_answers(monkeypatch, 1, strike)
        rollouts = policy.sample(asked, step=1)
        assert_whole(rollouts, asked, llama_folder, log_softmax, step=1)
        assert "rollout.servers.0: no connection" in caplog.text or "its process has ended" in caplog.text
        assert re.search(r"started again\): 1 of 3 rollout servers go on", caplog.text)
        assert not psutil.pid_exists(pids[0]) and not psutil.pid_exists(pids[1])
        wait_for_all(policy)
        assert_whole(policy.sample(asked, step=2), asked, llama_folder, log_softmax, step=2)
        assert all(server.client.info().weight_version.endswith("/step-000002") for server in fleet)


def test_the_samples_of_a_server_that_becomes_slow_go_on_elsewhere_from_their_tokens_and_it_rests(
    fleet: list[SupervisedServer],
    llama_folder: Path,
    tmp_path: Path,
    log_softmax: Oracle,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    asked = samples(long=True)
    with policy_of(fleet, llama_folder, tmp_path) as policy:
        policy.sample(samples(), step=0)
        with slowed(engine_of(pid_of(fleet[2])), works_s=0.03, rests_s=0.27):
            rollouts = policy.sample(asked, step=1)
        policy.sample(samples(), step=2)
        versions = [server.client.info().weight_version for server in fleet]
    assert_whole(rollouts, asked, llama_folder, log_softmax, step=1)
    # on a busy machine another one may rest as well
    resting = set(re.findall(r"rollout\.servers\.(\d).*: too slow for the others; left out until step 4", caplog.text))
    old = {str(place) for place, version in enumerate(versions) if version.endswith("/step-000001")}
    assert old == resting and len(resting) < 3
    moved = re.search(r"rollout.servers: (\d+) samples went on at another server, 0 were sampled anew", caplog.text)
    assert moved is not None and int(moved[1]) > 0


def test_a_server_whose_label_changes_in_a_step_is_left_out_of_it(
    fleet: list[SupervisedServer],
    llama_folder: Path,
    tmp_path: Path,
    log_softmax: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a restart by somebody else: it answers with other weights than those of the step."""
    asked = samples(long=True)
    with policy_of(fleet, llama_folder, tmp_path) as policy:
        policy.sample(samples(), step=0)

        def relabel() -> None:
            thread = threading.Thread(target=lambda: fleet[1].client.label_weights("default"))
            thread.start()
            thread.join()  # the other samples are read with the new label

        after_answers(monkeypatch, 1, relabel)
        rollouts = policy.sample(asked, step=1)
        assert_whole(rollouts, asked, llama_folder, log_softmax, step=1)
        assert "a sample was drawn from weights" in caplog.text and "2 of 3 rollout servers go on" in caplog.text
        wait_for_all(policy)


def test_weights_that_change_under_the_right_label_end_the_run_with_the_servers_name(
    fleet: list[SupervisedServer], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with policy_of(fleet, llama_folder, tmp_path) as policy:
        policy.sample(samples(), step=0)
        sample = policy._tools.sampler.collect  # type: ignore[union-attr]

        def collect(*given: Any, **named: Any) -> Any:
            found = sample(*given, **named)
            fleet[2].client.randomize_weights()
            return found

        monkeypatch.setattr(policy._tools.sampler, "collect", collect)  # type: ignore[union-attr]
        with pytest.raises(GateError, match=r"rollout.servers.2: the server's weights changed after their publication"):
            policy.sample(samples(), step=1)
