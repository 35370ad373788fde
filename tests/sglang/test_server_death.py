"""A real server that dies or must die: while it samples, at its start, with its parent, after an earlier launch."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.sglang.conftest import VOCABULARY, Oracle, cpu_server
from tests.sglang.streams import plan, request, stream
from tests.sglang.test_sampling import assert_ended_by_itself_or_whole, assert_log_probs
from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving import wire
from tropd_mcore.serving.process import ServerProcess
from tropd_mcore.serving.supervisor import SupervisedServer

NEW_TOKENS = (4, 8, 200, 220, 230, 240)
LIMIT_S = 300.0
"""Longest wait for an expected event. It only ends a hang."""


def kill_once_two_are_read(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL the server as soon as the client has read its second answer, while it works on the others."""
    read_generation, answers = wire.read_generation, []

    def read(answer: object, asked: wire.GenerationRequest) -> wire.Generation:
        answers.append(read_generation(answer, asked))
        if len(answers) == 2:
            os.kill(pid, signal.SIGKILL)
        return answers[-1]

    monkeypatch.setattr(wire, "read_generation", read)


def test_a_real_server_killed_while_sampling_is_restarted_with_its_weights_and_finishes(
    llama_folder: Path,
    tmp_path: Path,
    log_softmax: Oracle,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = cpu_server(llama_folder, tmp_path, max_restarts=1)
    requests = [request(f"{i}", [5, 9 + i], new=new) for i, new in enumerate(NEW_TOKENS)]
    with SupervisedServer(spec) as server:
        publisher = WeightPublisher(server.client, plan(llama_folder))
        config = RolloutConfig(server=spec.config)
        sampler = SglangSampler([server.client], config, eos_ids=(), vocab_size=VOCABULARY, seed=0, masked_share=0.25)
        publisher.publish(stream(llama_folder), "v1")
        kill_once_two_are_read(server_pid(tmp_path), monkeypatch)
        some = sampler.collect(requests, step=4, expected_version="v1")
        assert some.lost and 2 <= len(some.rollouts) < len(requests)

        with caplog.at_level(logging.WARNING):
            server.recover(some.lost[spec.key])
        assert "was killed by signal 9" in caplog.text and "restart 1 of 1" in caplog.text
        with pytest.raises(ServerError, match="has weights 'default'; expected 'v1'"):
            sampler.collect(requests, step=4, expected_version="v1", found=some)
        publisher.publish(stream(llama_folder), "v1")
        whole = sampler.collect(requests, step=4, expected_version="v1", found=some)
        assert not whole.lost and sorted(whole.rollouts) == [asked.sample_id for asked in requests]
        for asked in requests:
            rollout = whole.rollouts[asked.sample_id]
            assert some.rollouts.get(asked.sample_id, rollout) is rollout
            assert_ended_by_itself_or_whole(rollout, asked.max_new_tokens)
            assert_log_probs(rollout, llama_folder, log_softmax, 1.0)

        os.kill(server_pid(tmp_path), signal.SIGKILL)
        gone = sampler.collect(requests, step=5, expected_version="v1")
        assert gone.lost and not gone.rollouts
        with pytest.raises(ServerDied, match=r"rollout.server.max_restarts=1 are used up"):
            server.recover(gone.lost[spec.key])
    assert not spec.record_path.exists()


def server_pid(run_dir: Path) -> int:
    return int(json.loads((run_dir / "rollout.server.json").read_text())["pid"])


def test_the_whole_server_dies_when_its_parent_is_killed_before_it_is_ready(qwen3_folder: Path, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from tests.sglang.conftest import cpu_server;"
        "from tropd_mcore.serving.process import ServerProcess;"
        "ServerProcess(cpu_server(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))).start(); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(qwen3_folder), str(tmp_path)])
    try:
        record = tmp_path / "rollout.server.json"
        wait_for(record.is_file)
        server = psutil.Process(json.loads(record.read_text())["pid"])
        wait_for(lambda: len(server.children(recursive=True)) >= 3)
        family = [server, *server.children(recursive=True)]
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def wait_for(condition: Callable[[], bool], seconds: float = LIMIT_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_real_server_that_dies_at_its_start_is_reported_in_one_line_with_code_cause_and_log(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    spec = cpu_server(qwen3_folder, tmp_path, extra_args=("--no-such-argument",))
    with ServerProcess(spec) as process:
        process.start()
        with pytest.raises(ServerError) as caught:
            process.wait_ready()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("rollout.server: the server ended with exit code 2; last line: ")
    assert "--no-such-argument" in message and str(tmp_path / "rollout.log") in message


def test_a_taken_port_and_a_missing_model_folder_are_refused_before_a_real_server_starts(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = ServerProcess(cpu_server(qwen3_folder, tmp_path, port=port))
        with pytest.raises(ServerError, match=rf"rollout.server.port={port} is taken"):
            process.start()
    with pytest.raises(ServerError, match=r"student.path=.*nowhere: expected a model folder"):
        ServerProcess(cpu_server(tmp_path / "nowhere", tmp_path)).start()
    assert not (tmp_path / "rollout.log").exists()


def test_a_real_server_that_is_not_ready_in_time_is_stopped_and_reported(qwen3_folder: Path, tmp_path: Path) -> None:
    process = ServerProcess(cpu_server(qwen3_folder, tmp_path, start_timeout_s=0.5))
    process.start()
    pid = process.pid
    with pytest.raises(ServerError, match=r"rollout.server: not ready after rollout.server.start_timeout_s=0.5 s"):
        process.wait_ready()
    assert not process.alive() and not psutil.pid_exists(pid)
