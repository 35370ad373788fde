"""Faults of a fleet beyond `test_fleet`, each once: `python -m tests.faults fleet` plays them on whole jobs."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.glue.stubs import make_layout
from tests.liars import liar, nothing_done
from tests.ranks import run_on_ranks
from tests.sglang.conftest import Oracle, cpu_server
from tests.sglang.test_fleet import (
    after_answers,
    assert_whole,
    pid_of,
    policy_of,
    policy_on,
    samples,
    wait_for_all,
)
from tests.sglang.test_fleet_weights import started
from tests.sglang.test_router import FLEET_KEY, router_config
from tests.sglang.test_router import pytestmark as needs_router
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import GateError, ServerDied
from tropd_mcore.mcore.collective import gather_on_rank_zero
from tropd_mcore.rollout.policy_server import PolicyServers
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.router import Router, RouterSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Rollout

Fleet = list[SupervisedServer]


@pytest.fixture(scope="module")
def pair(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two servers that require no key, so that they are also used by url, through a proxy and through a router."""
    with started(llama_folder, tmp_path_factory.mktemp("pair"), 2, max_restarts=9, api_key=FLEET_KEY) as servers:
        yield servers


@pytest.fixture(autouse=True)
def whole(pair: Fleet) -> None:
    """Start servers again that a test before has killed."""
    gone = [server for server in pair if server.process is not None and not server.process.alive()]
    for server in gone:
        server.begin_recovery(ServerDied("a test before this one has killed it"))
    for server in pair:
        server.wait_ready()


def at_url(server: SupervisedServer, url: str | None = None, *, hang_timeout_s: float = 5.0) -> SupervisedServer:
    """The same server for a job that does not start it."""
    config = ServerConfig(url=url or server.client.url, max_retries=2, hang_timeout_s=hang_timeout_s)
    made = SupervisedServer(dataclasses.replace(server.spec, config=config))
    made.start()
    return made


def test_a_server_killed_between_steps_and_the_last_one_killed_in_the_next_step_cost_no_sample(
    pair: Fleet, llama_folder: Path, tmp_path: Path, log_softmax: Oracle, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with policy_of(pair, llama_folder, tmp_path) as policy:
        policy.sample(samples(), step=0)
        os.killpg(pid_of(pair[0]), signal.SIGKILL)
        rollouts = policy.sample(samples(), step=1)
        assert_whole(rollouts, samples(), llama_folder, log_softmax, step=1)
        assert re.search(r"rollout.servers.0.*\(started again\): 1 of 2 rollout servers go on", caplog.text)
        last = pid_of(pair[1])
        after_answers(monkeypatch, 2, lambda: os.killpg(last, signal.SIGKILL))
        asked = samples(long=True)
        assert_whole(policy.sample(asked, step=2), asked, llama_folder, log_softmax, step=2)
        assert re.search(r"rollout.servers.1.*\(started again\): 0 of 2 rollout servers go on", caplog.text)


def test_a_server_at_a_url_that_somebody_restarts_in_a_step_gets_the_weights_of_a_later_one(
    pair: Fleet, llama_folder: Path, tmp_path: Path, log_softmax: Oracle, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    restart = threading.Thread(target=lambda: pair[1].recover(ServerDied("somebody restarts it")))
    fleet, asked = [at_url(server, hang_timeout_s=60.0) for server in pair], samples(long=True)
    with policy_of(fleet, llama_folder, tmp_path) as policy:
        policy.sample(samples(), step=0)
        after_answers(monkeypatch, 1, restart.start)
        assert_whole(policy.sample(asked, step=1), asked, llama_folder, log_softmax, step=1)
        assert re.search(r"rollout.servers.1.*\(asked again at the next step\): 1 of 2 rollout servers", caplog.text)
        restart.join()
        assert pair[1].client.info().weight_version == "default"
        assert_whole(policy.sample(samples(), step=2), samples(), llama_folder, log_softmax, step=2)
        assert all(server.client.info().weight_version.endswith("/step-000002") for server in pair)


def test_a_server_that_stops_in_a_publication_is_left_out_of_the_step_and_comes_back(
    pair: Fleet, llama_folder: Path, tmp_path: Path, log_softmax: Oracle, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    update = SglangClient.update_weights

    def stopped(client: SglangClient, *given: Any, **named: Any) -> None:
        if client.key == "rollout.servers.0" and named["version"].endswith("/step-000001:incomplete"):
            os.killpg(pid_of(pair[0]), signal.SIGSTOP)
        update(client, *given, **named)

    monkeypatch.setattr(SglangClient, "update_weights", stopped)
    with policy_of(pair, llama_folder, tmp_path) as policy:
        policy.sample(samples(), step=0)
        rollouts = policy.sample(samples(), step=1)
        assert_whole(rollouts, samples(), llama_folder, log_softmax, step=1)
        found = r"rollout.servers.0.*hung.*\(started again\): 1 of 2 rollout servers go on"
        assert re.search(found, caplog.text)
        wait_for_all(policy)
        assert_whole(policy.sample(samples(), step=2), samples(), llama_folder, log_softmax, step=2)
        assert all(server.client.info().weight_version.endswith("/step-000002") for server in pair)


def test_a_server_of_a_fleet_that_loads_nothing_and_takes_the_label_ends_the_run_before_a_sample(
    pair: Fleet, llama_folder: Path, tmp_path: Path
) -> None:
    with (
        liar(pair[1].client.url) as proxy,
        policy_of([at_url(pair[0]), at_url(pair[1], proxy.url)], llama_folder, tmp_path) as policy,
    ):
        policy.sample(samples(), step=0)
        pair[1].client.randomize_weights()
        proxy.tell("/update_weights_from_tensor", nothing_done)
        asked = len(proxy.asked)
        with pytest.raises(GateError, match=r"rollout\.servers\.1: "):
            policy.sample(samples(), step=1)
        assert proxy.told and "/generate" not in [path for path, _ in proxy.asked[asked:]]
        assert not any(server.client.info().weight_version.endswith("/step-000001") for server in pair)


KILLED_IN_AN_UPDATE = """
import os, signal, sys
from pathlib import Path
from tests.sglang.streams import plan, stream
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.rollout.fleet_publisher import FleetPublisher, Target
from tropd_mcore.serving.client import SglangClient

def until_killed(folder):
    for number, item in enumerate(stream(folder)):
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

folder = Path(sys.argv[1])
clients = [SglangClient(url, ServerConfig(url=url), key=f"rollout.servers.{i}") for i, url in enumerate(sys.argv[2:])]
FleetPublisher(plan(folder), bucket_bytes=20_000).publish([Target(one) for one in clients], until_killed(folder), "v")
"""


def test_servers_left_in_an_open_update_by_a_killed_job_serve_the_next_one(
    pair: Fleet, llama_folder: Path, tmp_path: Path, log_softmax: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [server.client.url for server in pair]
    ended = subprocess.run([sys.executable, "-c", KILLED_IN_AN_UPDATE, str(llama_folder), *urls], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert all(server.client.info().weight_version == "v:incomplete" for server in pair)
    assert not any(server.client.healthy(2.0) for server in pair)
    with policy_of([at_url(server) for server in pair], llama_folder, tmp_path) as policy:
        assert_whole(policy.sample(samples(), step=5), samples(), llama_folder, log_softmax, step=5)
    for place in range(2):
        assert f"rollout.servers.{place}: closing the weight-update session" in caplog.text


@needs_router
def test_a_step_of_a_fleet_is_complete_although_its_router_is_killed_in_it(
    pair: Fleet, llama_folder: Path, tmp_path: Path, log_softmax: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RouterSpec(router_config(), ServerConfig(hang_timeout_s=5.0), tmp_path / "logs", FLEET_KEY)
    asked = samples(long=True)
    with Router(spec) as router, policy_of(pair, llama_folder, tmp_path, router) as policy:
        policy.sample(samples(), step=0)
        pid = router.pid
        assert pid is not None
        after_answers(monkeypatch, 2, lambda: os.kill(pid, signal.SIGKILL))
        assert_whole(policy.sample(asked, step=1), asked, llama_folder, log_softmax, step=1)
        assert router.restarts == 1 and router.pid != pid


def test_the_server_of_another_node_that_is_killed_is_started_by_its_rank_and_takes_part_again(
    pair: Fleet, llama_folder: Path, tmp_path: Path, log_softmax: Oracle
) -> None:
    """Two ranks stand for two nodes. The first uses a running server, the second starts its own."""
    first, _ = run_on_ranks(on_two_nodes, 2, llama_folder, tmp_path, pair[0].spec, pair[0].client.url)
    for step, (rollouts, label) in enumerate(first):
        assert_whole(rollouts, samples(), llama_folder, log_softmax, step=step)
        assert label.endswith(f"/step-{step:06d}") or step == 1


def on_two_nodes(folder: Path, place: Path, spec: ServerSpec, url: str) -> list[tuple[list[Rollout], str]]:
    """Three steps, of which the second loses the server of rank 1. Returns samples and the label of that server."""
    layout = make_layout()
    elsewhere = dataclasses.replace(cpu_server(folder, place, name="rollout-1"), key="rollout.servers.1")
    owned: dict[str, SupervisedServer] = {}
    if layout.rank == 1:
        owned["rollout.servers.1"] = SupervisedServer(elsewhere)
        owned["rollout.servers.1"].start()
        owned["rollout.servers.1"].wait_ready()
    try:
        mine = [(server.address, pid_of(server)) for server in owned.values()]
        reached: dict[str, SupervisedServer] = {}
        pids = []
        for address, pid in itertools.chain(*gather_on_rank_zero(mine, layout.groups.control)):
            pids.append(pid)
            here = SupervisedServer(dataclasses.replace(spec, config=ServerConfig(url=url)))
            owned = {"rollout.servers.0": here}
            reached = owned | {"rollout.servers.1": SupervisedServer(elsewhere, elsewhere=address)}
            for server in reached.values():
                server.start()
        found = []
        with policy_on(layout, PolicyServers(owned, reached), folder, place) as policy:
            for step in range(3):
                if step == 1 and layout.rank == 0:
                    os.killpg(pids[0], signal.SIGKILL)
                rollouts = policy.sample(samples(), step=step)
                label = ""
                if layout.rank == 0 and step != 1:
                    label = reached["rollout.servers.1"].client.info().weight_version
                elif layout.rank == 1 and step == 1:
                    owned["rollout.servers.1"].wait_ready()
                gather_on_rank_zero(step, layout.groups.control)
                found.append((rollouts, label))
        return found
    finally:
        for server in owned.values():
            server.stop()
