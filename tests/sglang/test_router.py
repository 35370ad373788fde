"""SGLang's own router before two real servers: what it passes on, and what a step gets if a part of it goes away."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.sglang.conftest import VOCABULARY, Oracle, cpu_server
from tests.sglang.streams import plan, request, stream
from tests.sglang.test_sampling import assert_ended_by_itself_or_whole, assert_log_probs
from tropd_mcore.config.schema import RolloutConfig, RouterConfig, ServerConfig
from tropd_mcore.errors import ServerDied, ServerError, ServerHung
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving import wire
from tropd_mcore.serving.router import Router, RouterSpec
from tropd_mcore.serving.router_lane import LaneServer, RouterLane
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import SampleRequest

PYTHON = os.environ.get("TROPD_TEST_ROUTER_PYTHON")
"""An interpreter that has the router, if it is not in this environment."""
pytestmark = pytest.mark.skipif(
    PYTHON is None and importlib.util.find_spec("smg") is None,
    reason="the package smg is not installed: pip install -r requirements/router.txt",
)

FLEET_KEY = "one-key-of-the-whole-fleet-0123456789"
VERSION = "step-1"
LIMIT_S = 120.0
"""Longest wait for an expected event. It only ends a hang."""
LONG = 300
"""New tokens of a request that is still in flight when something happens."""


def router_config(**values: object) -> RouterConfig:
    return RouterConfig(python=None if PYTHON is None else Path(PYTHON), **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def servers(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SupervisedServer]]:
    """Two servers with one key and the same weights."""
    made = []
    for place in range(2):
        spec = cpu_server(qwen3_folder, tmp_path_factory.mktemp(f"server{place}"), name="rollout", hang_timeout_s=3.0)
        spec = replace(spec, key=f"rollout.servers.{place}")
        made.append(SupervisedServer(dataclasses.replace(spec, api_key=FLEET_KEY, title=f"rollout.servers.{place}")))
    try:
        for server in made:
            server.start()
        for server in made:
            server.wait_ready()
        yield made
    finally:
        for server in made:
            server.stop()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    spec = RouterSpec(router_config(), ServerConfig(hang_timeout_s=3.0), tmp_path / "logs", FLEET_KEY)
    with Router(spec) as running:
        yield running


@pytest.fixture
def lane(servers: list[SupervisedServer], router: Router, qwen3_folder: Path) -> RouterLane:
    """Both servers behind the router, with the weights of VERSION."""
    made = RouterLane(router)
    for server in servers:
        if server.process is not None and not server.process.alive():
            server.recover(ServerDied("a test before this one has killed it"))
        publish(server, qwen3_folder, VERSION)
        made.put_in(LaneServer.of(server))
    return made


def publish(server: SupervisedServer, folder: Path, version: str) -> None:
    WeightPublisher(server.client, plan(folder)).publish(stream(folder), version)


def sampler(lane: RouterLane, **config: float) -> SglangSampler:
    settings = RolloutConfig(**config)  # type: ignore[arg-type]
    clients = [server.client for server in lane._servers.values()]
    return SglangSampler(clients, settings, eos_ids=(), vocab_size=VOCABULARY, seed=7, masked_share=0.25, lane=lane)


def questions(count: int, new: int) -> list[SampleRequest]:
    return [request(f"{place}", [5, 9 + place], new=new) for place in range(count)]


def raw(count: int, new: int = 4) -> list[wire.GenerationRequest]:
    ids = [np.array([5, 9 + place], np.int32) for place in range(count)]
    return [wire.GenerationRequest(each, new, VOCABULARY) for each in ids]


def versions(answers: list[wire.Generation | ServerError]) -> Counter[str]:
    assert not [answer for answer in answers if isinstance(answer, ServerError)], answers
    return Counter(version for answer in answers for version in answer.weight_versions)  # type: ignore[union-attr]


def once_two_are_read(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as soon as the second answer was read, while the servers work on the others."""
    read_generation, answers = wire.read_generation, []

    def read(answer: object, asked: wire.GenerationRequest) -> wire.Generation:
        answers.append(read_generation(answer, asked))
        if len(answers) == 2:
            act()
        return answers[-1]

    monkeypatch.setattr(wire, "read_generation", read)


def pid_of(server: SupervisedServer) -> int:
    return json.loads(server.spec.record_path.read_text())["pid"]


def in_flight() -> list[SampleRequest]:
    """Two short samples, then six that are in flight when the second one is answered."""
    return [request(f"{place}", [5, 9 + place], new=4 if place < 2 else LONG) for place in range(8)]


def test_samples_through_the_router_have_the_log_probs_of_the_weights_and_their_version(
    lane: RouterLane, qwen3_folder: Path, log_softmax: Oracle
) -> None:
    rollouts = sampler(lane, temperature=0.7).sample(questions(9, 12), step=1, expected_version=VERSION)
    assert [rollout.sample_id for rollout in rollouts] == [f"{place}" for place in range(9)]
    for rollout in rollouts:
        assert_ended_by_itself_or_whole(rollout, 12)
        assert rollout.policy_version == VERSION
        assert_log_probs(rollout, qwen3_folder, log_softmax, 0.7)


def test_all_servers_answer_and_one_that_was_taken_out_answers_nothing_until_it_is_put_in(
    lane: RouterLane, servers: list[SupervisedServer]
) -> None:
    for place, server in enumerate(servers):
        server.client.label_weights(f"of-{place}")
    assert versions(lane.generate(raw(12))) == {"of-0": 6, "of-1": 6}
    lane.take_out(servers[1].client.url)
    assert versions(lane.generate(raw(12))) == {"of-0": 12}
    lane.put_in(LaneServer.of(servers[1]))
    assert set(versions(lane.generate(raw(12)))) == {"of-0", "of-1"}


def test_a_server_that_missed_an_update_is_noticed_before_sampling_and_in_its_answers(
    lane: RouterLane, servers: list[SupervisedServer]
) -> None:
    servers[0].client.label_weights("step-2")
    with pytest.raises(ServerError, match=rf"different weights: .*{servers[1].client.url} '{VERSION}'.*publish"):
        lane.info()
    stale = sampler(lane)
    stale._usable = lambda *_: stale.clients  # type: ignore[method-assign]
    with pytest.raises(ServerError, match=rf"was drawn from weights \['{VERSION}'\]; expected 'step-2' alone"):
        stale.sample(questions(6, 4), step=2, expected_version="step-2")
    found = sampler(lane).collect(questions(6, 4), step=2, expected_version="step-2")
    assert len(found.rollouts) == 6 and lane.servers == (servers[0].client.url,)
    assert f"the server has weights '{VERSION}'" in str(found.lost[servers[1].spec.key])


def test_a_server_killed_while_it_samples_costs_no_sample_and_comes_back_after_its_weights_are_proven(
    lane: RouterLane, servers: list[SupervisedServer], qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = servers[1]
    once_two_are_read(lambda: os.kill(pid_of(victim), signal.SIGKILL), monkeypatch)
    rollouts = sampler(lane).sample(in_flight(), step=1, expected_version=VERSION)
    assert len(rollouts) == 8 and {rollout.policy_version for rollout in rollouts} == {VERSION}
    (url, died), *others = lane.lost.items()
    assert url == victim.client.url and others == [] and "its process has ended" in str(died)
    assert lane.servers == (servers[0].client.url,)
    victim.recover(died)
    publish(victim, qwen3_folder, VERSION)
    lane.put_in(LaneServer.of(victim))
    assert lane.lost == {} and len(lane.servers) == 2
    victim.client.label_weights("it-answers")
    assert versions(lane.generate(raw(6)))["it-answers"] == 3


def test_a_router_killed_in_mid_step_is_restarted_with_its_servers_and_the_step_is_complete(
    lane: RouterLane, router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert router.pid is not None
    first = router.pid
    once_two_are_read(lambda: os.kill(first, signal.SIGKILL), monkeypatch)
    with caplog.at_level(logging.WARNING):
        rollouts = sampler(lane).sample(in_flight(), step=1, expected_version=VERSION)
    assert len(rollouts) == 8 and router.restarts == 1 and router.pid != first
    assert "rollout.router: the router was killed by signal 9" in caplog.text
    assert set(router.workers()) == set(lane.servers) and len(lane.servers) == 2 and lane.lost == {}


def test_a_stopped_router_is_restarted_too(
    lane: RouterLane, router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert router.pid is not None
    first = router.pid
    once_two_are_read(lambda: os.kill(first, signal.SIGSTOP), monkeypatch)
    assert len(sampler(lane).sample(in_flight(), step=1, expected_version=VERSION)) == 8
    assert router.restarts == 1 and "is stopped (state T)" in caplog.text


def test_a_router_that_may_not_be_restarted_ends_the_sampling_with_one_error(
    lane: RouterLane, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.restarts = router.spec.server.max_restarts
    assert router.pid is not None
    pid = router.pid
    once_two_are_read(lambda: os.kill(pid, signal.SIGKILL), monkeypatch)
    with pytest.raises(ServerDied, match="max_restarts=2 are used up") as died:
        sampler(lane).collect(in_flight(), step=1, expected_version=VERSION)
    assert died.value.url == router.url


def test_requests_of_a_router_that_is_gone_are_aborted_by_the_servers(
    lane: RouterLane, router: Router, servers: list[SupervisedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    router.restarts = router.spec.server.max_restarts
    assert router.pid is not None
    pid = router.pid
    once_two_are_read(lambda: os.kill(pid, signal.SIGKILL), monkeypatch)
    lane.generate([wire.GenerationRequest(each.prompt_ids, each.max_new_tokens, VOCABULARY) for each in in_flight()])
    ended = time.monotonic() + LIMIT_S
    for server in servers:
        while True:
            try:
                server.client.flush_cache()
                break
            except ServerError:  # SGLang refuses that while a request runs
                assert time.monotonic() < ended
                time.sleep(0.2)


def test_a_router_at_a_url_is_used_if_its_workers_are_exactly_the_fleet(
    lane: RouterLane, router: Router, servers: list[SupervisedServer], tmp_path: Path
) -> None:
    urls = [server.client.url for server in servers]
    spec = RouterSpec(RouterConfig(url=router.url), ServerConfig(hang_timeout_s=3.0), tmp_path / "other", FLEET_KEY)
    with Router(spec) as other:
        other.check(urls)
        second = RouterLane(other)
        for server in servers:
            second.put_in(LaneServer.of(server))
        assert versions(second.generate(raw(6))) == {VERSION: 6}
        with pytest.raises(ServerError, match=rf"exactly the servers .*; {urls[1]} must not be one of them"):
            other.check(urls[:1])
        with pytest.raises(ServerError, match="http://127.0.0.1:9 is missing"):
            other.check([*urls, "http://127.0.0.1:9"])
        second.take_out(urls[0])
        with pytest.raises(ServerError, match=f"{urls[0]} is missing"):
            lane.generate(raw(1))
    assert router.alive(), "a router at a url is not stopped"


def test_a_server_that_is_not_there_or_has_another_key_is_given_up_in_one_line(
    servers: list[SupervisedServer], tmp_path: Path
) -> None:
    config = router_config(start_timeout_s=10.0)
    with Router(RouterSpec(config, ServerConfig(), tmp_path, FLEET_KEY)) as router:
        with pytest.raises(ServerError, match=r"rollout.router: .*http://127.0.0.1:9") as caught:
            router.add("http://127.0.0.1:9", FLEET_KEY)
        assert "\n" not in str(caught.value) and router.workers() == ()


def status(url: str, body: object = None, key: str | None = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if key is not None:
        asked.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_the_key_nobody_samples_or_changes_the_workers_and_the_key_is_on_no_command_line_and_in_no_file(
    lane: RouterLane, router: Router, servers: list[SupervisedServer]
) -> None:
    sample = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    for key in (None, "x" * 43):
        assert status(f"{router.url}/generate", sample, key) == 401
        assert status(f"{router.url}/workers", None, key) == 401
        assert status(f"{router.url}/workers", {"url": "http://127.0.0.1:9"}, key) == 401
        assert status(f"{router.url}/flush_cache", {}, key) == 401
    assert status(f"{router.url}/generate", sample, FLEET_KEY) == 200
    # the server would answer with its own key in /server_info, so the router must not ask with it for anybody
    assert status(f"{router.url}/get_server_info") == status(f"{router.url}/get_model_info") == 401
    assert router.pid is not None
    process = psutil.Process(router.pid)
    assert FLEET_KEY not in " ".join([*process.cmdline(), *router.command(1)])
    files = [path for path in router.spec.run_dir.rglob("*") if path.is_file()]
    assert len(files) == 2 and not [path for path in files if FLEET_KEY.encode() in path.read_bytes()]
    assert not [path for path in files if path.stat().st_mode & 0o077]
    found = [each for each in process.net_connections(kind="inet") if each.status == psutil.CONN_LISTEN]
    assert len(found) == 2 and {each.laddr.ip for each in found} == {"127.0.0.1"}


def test_a_router_asks_no_host_but_its_servers_and_no_proxy(
    servers: list[SupervisedServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen3_folder: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with Router(RouterSpec(router_config(), ServerConfig(), tmp_path, FLEET_KEY)) as router:
        made = RouterLane(router)
        publish(servers[0], qwen3_folder, VERSION)
        made.put_in(LaneServer.of(servers[0]))
        assert versions(made.generate(raw(2))) == {VERSION: 2}
        assert router.pid is not None
        own = int(router.url.rpartition(":")[2])
        peers = {
            each.raddr.port
            for each in psutil.Process(router.pid).net_connections(kind="inet")
            if each.raddr and each.laddr.port != own
        }
        assert peers <= {int(servers[0].client.url.rpartition(":")[2])}


PARENT = """
import sys, time
from pathlib import Path
from tropd_mcore.config.schema import RouterConfig, ServerConfig
from tropd_mcore.serving.router import Router, RouterSpec
python = Path(sys.argv[2]) if sys.argv[2] else None
router = Router(RouterSpec(RouterConfig(python=python), ServerConfig(), Path(sys.argv[1]), "k" * 40))
router.start()
router.wait_ready()
print(router.pid, flush=True)
time.sleep(600)
"""


def test_a_router_ends_with_the_process_that_started_it_and_its_record_is_taken_over(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), PYTHON or ""], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    with Router(RouterSpec(router_config(), ServerConfig(), tmp_path / "other", FLEET_KEY)) as beside:
        assert beside.pid != pid
    with pytest.raises(ServerError, match=rf"pid {pid}\) that process {parent.pid} .* uses"):
        Router(RouterSpec(router_config(), ServerConfig(), tmp_path, FLEET_KEY)).start()
    parent.kill()
    parent.wait()
    ended = time.monotonic() + LIMIT_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ended
        time.sleep(0.05)
    with Router(RouterSpec(router_config(), ServerConfig(), tmp_path, FLEET_KEY)) as again:
        assert again.workers() == ()
    assert not (tmp_path / "router.server.json").exists()


def test_a_stopped_server_is_taken_for_hung_and_its_samples_go_to_the_others(
    lane: RouterLane, servers: list[SupervisedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = servers[0]
    pid = pid_of(victim)
    once_two_are_read(lambda: os.kill(pid, signal.SIGSTOP), monkeypatch)
    rollouts = sampler(lane).sample(in_flight(), step=1, expected_version=VERSION)
    assert len(rollouts) == 8
    died = lane.lost[victim.client.url]
    assert isinstance(died, ServerHung) and "is stopped (state T)" in str(died)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it was killed"
