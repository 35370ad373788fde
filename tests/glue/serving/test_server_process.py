"""The process of a server from its start to its end: the real command, with a stand-in for the package `sglang`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest

from tests.glue.server_site import ServerSite, runs, wait_for
from tropd_mcore import stopping
from tropd_mcore.errors import ServerDied, ServerError, StopRequested
from tropd_mcore.serving import record as record_module
from tropd_mcore.serving.supervisor import SupervisedServer


def is_free(port: int) -> bool:
    """Whether the port can be bound without special socket options."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_server_is_ready_once_its_health_is_200_and_not_before(site: ServerSite) -> None:
    process = site.process({"unready": 3})
    process.start()
    process.wait_ready()
    answers = [line.split()[-1] for line in site.log.read_text().splitlines() if line.startswith("answers")]
    assert answers == ["503", "503", "503", "200"]
    assert process.alive() and process.client().healthy() and process.client().same_host


def test_the_server_gets_its_model_address_and_settings_on_the_command_line(site: ServerSite) -> None:
    config = {"tensor_parallel": 2, "max_total_tokens": 99, "mem_fraction": 0.5, "dtype": "float32"}
    process = site.started({"silent": True}, config=config)
    expected = ["--model-path", str(site.model), "--host", "127.0.0.1", "--port", str(process.port)]
    expected += ["--device", "cuda", "--dtype", "float32", "--tp-size", "2"]
    expected += ["--max-total-tokens", "99", "--mem-fraction-static", "0.5", "--enable-fp32-lm-head"]
    assert site.told()["argv"] == expected


def test_a_cpu_server_sleeps_when_idle_and_extra_arguments_come_last(site: ServerSite) -> None:
    site.started({"silent": True}, device="cpu", config={"extra_args": ("--more", "x")})
    argv = site.told()["argv"]
    assert argv[-2:] == ["--more", "x"]
    assert argv[argv.index("--attention-backend") + 1] == "torch_native" and "--sleep-on-idle" in argv
    assert argv[argv.index("--dtype") + 1] == "bfloat16" and "--max-total-tokens" not in argv
    assert "--enable-fp32-lm-head" not in argv, "it would copy the output layer at each token"


def test_a_rank_of_a_cpu_server_has_one_thread_unless_more_are_asked_for(site: ServerSite) -> None:
    site.started({"silent": True}, device="cpu").stop()
    environment = site.told()["environment"]
    assert environment["OMP_NUM_THREADS"] == "1" and environment["SGLANG_USE_CPU_ENGINE"] == "1"
    site.notes.unlink()
    site.started({"silent": True}, device="cpu", config={"threads": 3})
    assert site.told()["environment"]["OMP_NUM_THREADS"] == "3"


def test_the_server_sees_its_gpus_and_may_find_them_filled_unequally_if_its_cache_has_a_size(
    site: ServerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    config = {"tensor_parallel": 2, "gpus": (1, 3), "max_total_tokens": 99}
    site.started({"silent": True}, config=config)
    environment = site.told()["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"


@pytest.mark.parametrize(("device", "flags"), [("cuda", ["--enable-memory-saver"]), ("cpu", [])])
def test_a_server_that_gives_its_memory_back_on_a_gpu_is_started_for_that(
    site: ServerSite, device: str, flags: list[str]
) -> None:
    site.started({"silent": True}, device=device, config={"release_memory": True})
    assert [flag for flag in site.told()["argv"] if "memory-saver" in flag] == flags


CACHE = {
    "/server_info": {"max_req_input_len": 99, "tp_size": 1, "max_total_num_tokens": 1000},
    "/model_info": {"weight_version": "v1"},
}


def test_a_ready_server_tells_how_many_of_the_longest_requests_its_cache_holds(
    site: ServerSite, caplog: pytest.LogCaptureFixture
) -> None:
    process = site.process({"pages": CACHE}, longest=300, config={"max_concurrency": 4})
    process.start()
    with caplog.at_level("INFO"):
        process.wait_ready()
        process.wait_ready()
    (line,) = [record.getMessage() for record in caplog.records if "KV cache" in record.getMessage()]
    assert line == (
        "rollout.server: its KV cache has 1,000 tokens; 4 requests (max_concurrency) of at most 300 tokens need 1,200, "
        "so 3 fit at once if all are that long"
    )


def test_a_server_that_was_ready_is_not_asked_again_unless_it_has_ended(site: ServerSite) -> None:
    """A health request of SGLang generates a token, which a server that has given its memory back cannot."""
    process = site.process()
    process.start()
    process.wait_ready()
    process.wait_ready()
    assert site.log.read_text().count("answers") == 1
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.alive())
    with pytest.raises(ServerError, match="was killed by signal 9"):
        process.wait_ready()


@pytest.mark.parametrize(("asked", "warned"), [(1050, False), (1100, True)])
def test_a_cache_that_is_smaller_than_asked_for_is_a_warning_at_every_start(
    site: ServerSite, caplog: pytest.LogCaptureFixture, asked: int, warned: bool
) -> None:
    """SGLang takes what is free if that is less, and rounds down to pages. After a restart, less may be free."""
    process = site.process({"pages": CACHE}, longest=300, config={"max_total_tokens": asked})
    process.start()
    process.wait_ready()
    process.restart()
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = (
        f"rollout.server: the KV cache is smaller than rollout.server.max_total_tokens={asked}: too little memory is "
        "free; lower it, or free memory of GPU 0"
    )
    assert lines == [expected] * 2 * warned


def test_the_server_inherits_our_environment_without_torchruns_rank_variables(
    site: ServerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("OF_THE_USER", "ours")
    monkeypatch.setenv("OVERRIDDEN", "ours")
    site.started({"silent": True}, extra_env={"OVERRIDDEN": "of the configuration"})
    environment = site.told()["environment"]
    assert environment["OF_THE_USER"] == "ours" and environment["OVERRIDDEN"] == "of the configuration"
    assert "RANK" not in environment and "TORCHELASTIC_RUN_ID" not in environment


def test_the_server_leads_a_process_group_and_its_record_has_pid_start_and_port(site: ServerSite) -> None:
    process = site.started({"silent": True})
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    record = json.loads(site.record.read_text())
    assert record == {
        "pid": process.pid,
        "start_time": pytest.approx(psutil.Process(process.pid).create_time(), rel=0, abs=0.5),
        "port": process.port,
        "owner_pid": os.getpid(),
        "owner_start_time": pytest.approx(psutil.Process().create_time(), rel=0, abs=0.5),
        "host": socket.gethostname(),
    }
    assert site.record.stat().st_mode & 0o077 == 0
    assert process.url == f"http://127.0.0.1:{process.port}"
    process.stop()
    assert not site.record.exists()


def test_the_server_requires_a_random_key_that_no_command_line_no_file_and_no_child_shows(site: ServerSite) -> None:
    process = site.started({"child": True})
    process.wait_ready()
    (key,) = site.told()["keys"]
    assert len(key) >= 43, "32 random bytes"
    child = psutil.Process(site.told()["child"])
    assert "TROPD_SERVER_KEY" not in site.told()["environment"] and "TROPD_SERVER_KEY" not in child.environ()
    for one in (psutil.Process(process.pid), child):
        assert key not in " ".join(one.cmdline())
    assert [path for path in site.run_dir.iterdir() if key in path.read_text()] == []
    assert key not in repr(process.spec) + process.describe_end()


def test_a_restarted_server_keeps_its_key_and_another_launch_has_another_key(site: ServerSite) -> None:
    process = site.started({"silent": True})
    keys = site.told()["keys"]
    process.stop()
    site.notes.unlink()
    process.start()
    assert site.told()["keys"] == keys
    process.stop()
    site.notes.unlink()
    site.started({"silent": True})
    assert site.told()["keys"] != keys


def test_files_that_a_server_creates_are_private_to_its_user(site: ServerSite) -> None:
    site.started({"silent": True})
    assert site.notes.stat().st_mode & 0o077 == 0, "a file that the server itself has written"
    folder = Path(site.told()["environment"]["TMPDIR"])
    assert folder.stat().st_mode & 0o077 == 0
    assert [path.name for path in site.run_dir.iterdir() if path.stat().st_mode & 0o077] == []
    site.made[-1].stop()
    assert not folder.exists()


def test_a_suspended_server_is_reported_as_stopped_and_killed_without_a_grace_period(
    site: ServerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended process does not see SIGTERM. The grace period of this test is longer than its time limit."""
    monkeypatch.setattr(record_module, "STOP_GRACE_S", 600.0)
    process = site.started({"silent": True})
    assert process.stopped() is None
    os.kill(process.pid, signal.SIGSTOP)
    wait_for(lambda: process.stopped() is not None)
    pid = process.pid
    assert process.stopped() == f"its process ({pid}) is stopped (state T)"
    assert f"the server runs but does not answer: its process ({pid}) is stopped (state T); " in process.describe_end()
    process.stop()
    assert not runs(pid)


def test_a_request_to_stop_ends_the_wait_for_a_server_that_starts(
    site: ServerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = site.started({"silent": True})
    monkeypatch.setattr(stopping, "_asked", "SIGTERM")
    with pytest.raises(StopRequested, match="SIGTERM"):
        process.wait_ready()


def test_the_port_stays_reserved_while_the_server_starts(site: ServerSite) -> None:
    process = site.started({"silent": True})
    assert process.port is not None and not is_free(process.port)
    process.stop()
    assert is_free(process.port)


@pytest.mark.parametrize("end", ["wait_ready", "stop"])
def test_the_socket_that_kept_the_port_is_closed_and_not_left_to_the_garbage_collector(
    site: ServerSite, end: str
) -> None:
    process = site.process()
    process.start()
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        getattr(process, end)()
    assert not [warning for warning in met if issubclass(warning.category, ResourceWarning)
                and str(process.port) in str(warning.message)]  # fmt: skip


def test_a_server_starts_on_the_port_of_the_configuration(site: ServerSite) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = site.started({"silent": True}, config={"port": port})
    assert process.port == port and site.told()["argv"][5] == str(port)


def test_a_taken_port_and_a_missing_model_folder_are_refused_before_anything_starts(site: ServerSite) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = site.process(config={"port": port})
        with pytest.raises(ServerError, match=rf"rollout.server.port={port} is taken \(.*\); stop what listens there"):
            process.start()
    nowhere = site.process(model_path=site.run_dir / "nowhere")
    with pytest.raises(ServerError, match=r"student.path=.*nowhere: expected a model folder with a config.json there"):
        nowhere.start()
    assert not process.alive() and not nowhere.alive() and not site.log.exists() and not site.record.exists()


def test_a_restarted_server_is_another_process_on_the_same_port_and_ready(site: ServerSite) -> None:
    process = site.process()
    process.start()
    process.wait_ready()
    pid, url = process.pid, process.url
    process.restart()
    assert process.pid != pid and not runs(pid) and process.url == url
    assert process.alive() and process.client().healthy()
    assert json.loads(site.record.read_text())["pid"] == process.pid


def test_a_server_that_dies_at_its_start_is_reported_in_one_line_with_code_cause_and_log(site: ServerSite) -> None:
    process = site.process({"exit": 3, "says": "first line\nValueError: no such model\nand a trailing line"})
    process.start()
    with pytest.raises(ServerError) as caught:
        process.wait_ready()
    assert str(caught.value) == (
        f"rollout.server: the server ended with exit code 3; last line: 'ValueError: no such model'; log: {site.log}"
    )


def test_a_server_that_is_not_ready_in_time_is_stopped_and_reported(site: ServerSite) -> None:
    process = site.started({"silent": True, "says": "loading"}, config={"start_timeout_s": 0.05})
    pid = process.pid
    with pytest.raises(ServerError) as caught:
        process.wait_ready()
    assert str(caught.value) == (
        f"rollout.server: not ready after rollout.server.start_timeout_s=0.05 s; last line: 'loading'; log: {site.log}"
    )
    assert not process.alive() and not runs(pid) and not site.record.exists()


def test_stopping_ends_the_server_with_its_children_and_is_harmless_when_repeated(
    site: ServerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "STOP_GRACE_S", 0.1)
    monkeypatch.setattr(record_module, "STOP_TIMEOUT_S", 0.3)  # a dead child may be in the process table for longer
    process = site.started({"silent": True, "child": True})
    family = [process.pid, site.told()["child"]]
    assert all(runs(pid) for pid in family)
    process.stop()
    wait_for(lambda: not any(runs(pid) for pid in family))
    assert not process.alive()
    process.stop()
    site.process().stop()


def test_a_server_that_ignores_the_first_signal_is_killed(site: ServerSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "STOP_GRACE_S", 0.05)
    process = site.started({"silent": True, "stubborn": True})
    pid = process.pid
    process.stop()
    assert not runs(pid)


def test_leaving_the_block_of_a_server_stops_it(site: ServerSite) -> None:
    with pytest.raises(RuntimeError, match="of the block"), site.process({"silent": True}) as process:
        process.start()
        pid = process.pid
        raise RuntimeError("of the block")
    assert not runs(pid) and not process.alive()


PARENT = """
import os, subprocess, sys
command = [sys.executable, "-m", "tropd_mcore.serving.sglang_launch", "--parent-pid", sys.argv[1] or str(os.getpid())]
print(subprocess.Popen(command).pid, flush=True)
sys.stdin.read()
"""


def parent_of_a_server(site: ServerSite, parent_pid: str) -> subprocess.Popen[bytes]:
    """A process that starts a server with `parent_pid` as its parent. Empty: the real parent."""
    return subprocess.Popen(
        [sys.executable, "-S", "-c", PARENT, parent_pid],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **site.spec({"silent": True}).extra_env},
    )


def test_a_server_dies_with_the_process_that_started_it_however_that_ends(site: ServerSite) -> None:
    with parent_of_a_server(site, "") as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            site.told()
            assert runs(pid)
        finally:
            parent.kill()
        wait_for(lambda: not runs(pid))


def test_a_server_whose_parent_ended_before_its_first_look_does_not_start(site: ServerSite) -> None:
    with parent_of_a_server(site, str(os.getpid())) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pid = int(parent.stdout.readline())
        line = parent.stderr.readline().decode()
        wait_for(lambda: not runs(pid))
        parent.kill()
    assert line == f"the process {os.getpid()} that started this one has already ended\n"
    assert not site.notes.exists()


def test_a_server_that_died_is_restarted_as_often_as_allowed_and_then_reported(
    site: ServerSite, caplog: pytest.LogCaptureFixture
) -> None:
    supervised = SupervisedServer(site.spec(config={"max_restarts": 1}))
    site.made.append(supervised)
    with supervised as server:
        pids = [json.loads(site.record.read_text())["pid"]]
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: not runs(pids[0]))
        server.recover(ServerDied("gone"))
        pids.append(json.loads(site.record.read_text())["pid"])
        assert pids[0] != pids[1] and server.client.healthy() and server.restarts == 1
        assert "was killed by signal 9" in caplog.text and "restart 1 of 1" in caplog.text
        os.kill(pids[1], signal.SIGKILL)
        wait_for(lambda: not runs(pids[1]))
        with pytest.raises(ServerDied, match=r"was killed by signal 9.*; rollout.server.max_restarts=1 are used up"):
            server.recover(ServerDied("gone"))
    assert not site.record.exists()
