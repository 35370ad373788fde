"""A real server that hangs: suspended while it samples and while it takes weights."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.sglang.conftest import VOCABULARY, Oracle, cpu_server
from tests.sglang.streams import plan, request, stream
from tests.sglang.test_sampling import assert_log_probs
from tests.sglang.test_server_death import server_pid, wait_for
from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import ServerHung
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving.supervisor import SupervisedServer

HANG_S = 25.0
"""Longer than SGLang takes to report that its engine is stalled (20 s)."""

pytestmark = pytest.mark.slow  # two hangs that last as long as SGLang takes to report them


def test_a_server_suspended_while_sampling_and_an_engine_suspended_in_an_update_are_restarted(
    llama_folder: Path, tmp_path: Path, log_softmax: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    """The interrupted step is completed with the same numbers as without the hang."""
    spec = cpu_server(llama_folder, tmp_path, max_restarts=2, hang_timeout_s=HANG_S)
    requests = [request(f"{i}", [5, 9 + i], new=new) for i, new in enumerate((4, 8, 200, 220, 230, 240))]
    with SupervisedServer(spec) as server, caplog.at_level(logging.WARNING):
        publisher = WeightPublisher(server.client, plan(llama_folder))
        config = RolloutConfig(server=spec.config)
        sampler = SglangSampler([server.client], config, eos_ids=(), vocab_size=VOCABULARY, seed=0, masked_share=0.25)
        publisher.publish(stream(llama_folder), "v1")
        before = (tmp_path / "rollout.log").read_text().count("POST /generate")
        stopper = threading.Thread(target=_stop_once_answers_came, args=(tmp_path, before + 2), daemon=True)
        stopper.start()
        some = sampler.collect(requests, step=4, expected_version="v1")
        stopper.join()
        hung = some.lost[spec.key]
        assert isinstance(hung, ServerHung) and "is stopped (state T)" in str(hung)
        assert len(some.rollouts) < len(requests)

        hung_pid = server_pid(tmp_path)
        server.recover(hung)
        assert not psutil.pid_exists(hung_pid) and "restart 1 of 2" in caplog.text

        scheduler = next(
            child
            for child in psutil.Process(server_pid(tmp_path)).children(recursive=True)
            if "scheduler" in child.name()
        )
        scheduler.suspend()
        started = time.monotonic()
        with pytest.raises(ServerHung, match=rf"a process of it \({scheduler.pid}\) is stopped \(state T\)") as met:
            publisher.publish(stream(llama_folder), "v1")
        assert time.monotonic() - started < 2.9 * HANG_S, "not one limit after the other"
        server.recover(met.value)
        assert not psutil.pid_exists(scheduler.pid)

        publisher.publish(stream(llama_folder), "v1")
        whole = sampler.collect(requests, step=4, expected_version="v1", found=some)
        assert not whole.lost and sorted(whole.rollouts) == [asked.sample_id for asked in requests]
        for asked in requests:
            assert_log_probs(whole.rollouts[asked.sample_id], llama_folder, log_softmax, 1.0)


def _stop_once_answers_came(run_dir: Path, count: int) -> None:
    wait_for(lambda: (run_dir / "rollout.log").read_text().count("POST /generate") >= count)
    os.kill(server_pid(run_dir), signal.SIGSTOP)
