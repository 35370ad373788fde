"""The process of a server from its start to its end: the real command, with a stand-in for the package `sglang`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.serving import client as client_module
from tropd_mcore.serving import process as process_module
from tropd_mcore.serving.process import ServerProcess, ServerSpec, stop_left_over
from tropd_mcore.serving.supervisor import SupervisedServer

LIMIT_S = 30.0
"""Longest wait for what has to happen. It is there to end a hang."""

STAND_IN = """
import json, os, signal, socket, subprocess, sys, time

does = json.loads(os.environ["STAND_IN"])
if does.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "60"]).pid if does.get("child") else None
told = {"argv": sys.argv[1:], "environment": dict(os.environ), "child": child}
with open(does["notes"] + ".part", "w") as stream:
    json.dump(told, stream)
os.rename(does["notes"] + ".part", does["notes"])
print(does.get("says", "started"), flush=True)
if "exit" in does:
    sys.exit(does["exit"])
if does.get("silent"):
    time.sleep(60)
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
listener.settimeout(60)
for number in range(10**6):
    status = 503 if number < does.get("unready", 0) else 200
    connection, _ = listener.accept()
    connection.recv(65536)
    print("answers", status, flush=True)
    connection.sendall(b"HTTP/1.1 %d X\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n" % status)
    connection.close()
"""
"""`sglang.launch_server`: answers every request with 200, the first `unready` ones with 503.

It ends by itself after a minute, so that nothing stays behind where the product fails to stop it.
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "POLL_S", 0.01)
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)


class Site:
    """A model folder, a run folder and the stand-in, and the processes that were started there."""

    def __init__(self, folder: Path) -> None:
        self.model, self.run_dir, self.packages = folder / "model", folder / "run", folder / "packages"
        self.notes = folder / "notes.json"
        self.made: list[ServerProcess | SupervisedServer] = []
        for package in ("sglang", "sgl_kernel", "torchvision"):  # the last two keep placeholders away
            (self.packages / package).mkdir(parents=True)
            (self.packages / package / "__init__.py").touch()
        (self.packages / "sglang" / "launch_server.py").write_text(STAND_IN)
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")

    def spec(
        self,
        does: dict[str, Any] | None = None,
        *,
        config: dict[str, Any] | None = None,
        extra_env: dict[str, str] | None = None,
        **fields: Any,
    ) -> ServerSpec:
        """Of a server that `does` this; `config` and `fields` are changes."""
        paths = [str(self.packages), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "STAND_IN": json.dumps({"notes": str(self.notes), **(does or {})}),
        }
        spec = ServerSpec(
            key="rollout.server",
            model_key="student.path",
            model_path=self.model,
            config=ServerConfig(**{"start_timeout_s": LIMIT_S, "max_retries": 0} | (config or {})),
            device="cuda",
            run_dir=self.run_dir,
            name="rollout",
            extra_env=environment | (extra_env or {}),
        )
        return dataclasses.replace(spec, **fields)

    def process(self, does: dict[str, Any] | None = None, **given: Any) -> ServerProcess:
        process = ServerProcess(self.spec(does, **given))
        self.made.append(process)
        return process

    def started(self, does: dict[str, Any] | None = None, **given: Any) -> ServerProcess:
        """A process whose stand-in has told what it was given."""
        process = self.process(does, **given)
        process.start()
        wait_for(lambda: self.notes.is_file() or not process.alive())
        assert self.notes.is_file(), process.describe_end()
        return process

    def told(self) -> dict[str, Any]:
        wait_for(self.notes.is_file)
        return json.loads(self.notes.read_text())

    @property
    def log(self) -> Path:
        return self.run_dir / "rollout.log"

    @property
    def record(self) -> Path:
        return self.run_dir / "rollout.server.json"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    for process in site.made:
        process.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_free(port: int) -> bool:
    """For a process that does not insist."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_server_is_ready_once_its_health_is_200_and_not_before(site: Site) -> None:
    process = site.process({"unready": 3})
    process.start()
    process.wait_ready()
    answers = [line.split()[-1] for line in site.log.read_text().splitlines() if line.startswith("answers")]
    assert answers == ["503", "503", "503", "200"]
    assert process.alive() and process.client().healthy() and process.client().same_host


def test_the_server_gets_its_model_its_place_and_its_settings_on_the_command_line(site: Site) -> None:
    config = {"tensor_parallel": 2, "max_total_tokens": 99, "mem_fraction": 0.5, "dtype": "float32"}
    process = site.started({"silent": True}, config=config)
    expected = ["--model-path", str(site.model), "--host", "127.0.0.1", "--port", str(process.port)]
    expected += ["--device", "cuda", "--dtype", "float32", "--tp-size", "2"]
    expected += ["--max-total-tokens", "99", "--mem-fraction-static", "0.5"]
    assert site.told()["argv"] == expected


def test_a_cpu_server_sleeps_when_idle_and_extra_arguments_come_last(site: Site) -> None:
    site.started({"silent": True}, device="cpu", config={"extra_args": ("--more", "x")})
    argv = site.told()["argv"]
    assert argv[-2:] == ["--more", "x"]
    assert argv[argv.index("--attention-backend") + 1] == "torch_native" and "--sleep-on-idle" in argv
    assert argv[argv.index("--dtype") + 1] == "bfloat16" and "--max-total-tokens" not in argv


def test_a_rank_of_a_cpu_server_has_one_thread_unless_more_are_asked_for(site: Site) -> None:
    site.started({"silent": True}, device="cpu").stop()
    environment = site.told()["environment"]
    assert environment["OMP_NUM_THREADS"] == "1" and environment["SGLANG_USE_CPU_ENGINE"] == "1"
    site.notes.unlink()
    site.started({"silent": True}, device="cpu", cpu_threads=3)
    assert site.told()["environment"]["OMP_NUM_THREADS"] == "3"


def test_the_server_inherits_our_environment_without_the_rank_that_torchrun_made_us(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("OF_THE_USER", "ours")
    monkeypatch.setenv("OVERRIDDEN", "ours")
    site.started({"silent": True}, extra_env={"OVERRIDDEN": "of the configuration"})
    environment = site.told()["environment"]
    assert environment["OF_THE_USER"] == "ours" and environment["OVERRIDDEN"] == "of the configuration"
    assert "RANK" not in environment and "TORCHELASTIC_RUN_ID" not in environment


def test_the_server_leads_a_process_group_and_its_record_tells_pid_start_and_port(site: Site) -> None:
    process = site.started({"silent": True})
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    record = json.loads(site.record.read_text())
    started = pytest.approx(psutil.Process(process.pid).create_time(), rel=0, abs=0.5)
    assert record == {"pid": process.pid, "start_time": started, "port": process.port}
    assert process.url == f"http://127.0.0.1:{process.port}"
    process.stop()
    assert not site.record.exists()


def test_nobody_else_is_given_the_port_while_the_server_starts(site: Site) -> None:
    process = site.started({"silent": True})
    assert process.port is not None and not is_free(process.port)
    process.stop()
    assert is_free(process.port)


@pytest.mark.parametrize("end", ["wait_ready", "stop"])
def test_the_socket_that_kept_the_port_is_closed_and_not_left_to_the_garbage_collector(site: Site, end: str) -> None:
    process = site.process()
    process.start()
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        getattr(process, end)()
    assert not [warning for warning in met if issubclass(warning.category, ResourceWarning)
                and str(process.port) in str(warning.message)]  # fmt: skip


def test_a_server_starts_on_the_port_of_the_configuration(site: Site) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = site.started({"silent": True}, config={"port": port})
    assert process.port == port and site.told()["argv"][5] == str(port)


def test_a_taken_port_and_a_missing_model_folder_are_refused_before_anything_starts(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = site.process(config={"port": port})
        with pytest.raises(ServerError, match=rf"rollout.server.port={port} is taken \(.*\); stop what listens there"):
            process.start()
    nowhere = site.process(model_path=site.run_dir / "nowhere")
    with pytest.raises(ServerError, match=r"student.path=.*nowhere: expected a model folder with a config.json there"):
        nowhere.start()
    assert not process.alive() and not nowhere.alive() and not site.log.exists() and not site.record.exists()


def test_a_restarted_server_is_another_process_on_the_same_port_and_ready(site: Site) -> None:
    process = site.process()
    process.start()
    process.wait_ready()
    pid, url = process.pid, process.url
    process.restart()
    assert process.pid != pid and not runs(pid) and process.url == url
    assert process.alive() and process.client().healthy()
    assert json.loads(site.record.read_text())["pid"] == process.pid


def test_a_server_that_dies_at_its_start_is_reported_in_one_line_with_code_cause_and_log(site: Site) -> None:
    process = site.process({"exit": 3, "says": "first line\nValueError: no such model\nand a trailing line"})
    process.start()
    with pytest.raises(ServerError) as caught:
        process.wait_ready()
    assert str(caught.value) == (
        f"rollout.server: the server ended with exit code 3; last line: 'ValueError: no such model'; log: {site.log}"
    )


def test_a_server_that_is_not_ready_in_time_is_stopped_and_reported(site: Site) -> None:
    process = site.started({"silent": True, "says": "loading"}, config={"start_timeout_s": 0.05})
    pid = process.pid
    with pytest.raises(ServerError) as caught:
        process.wait_ready()
    assert str(caught.value) == (
        f"rollout.server: not ready after start_timeout_s=0.05 s; last line: 'loading'; log: {site.log}"
    )
    assert not process.alive() and not runs(pid) and not site.record.exists()


def test_the_end_is_described_by_signal_by_silence_and_without_a_process(site: Site) -> None:
    process = site.started({"silent": True, "says": "started"})
    rest = f"; last line: 'started'; log: {site.log}"
    wait_for(lambda: "started" in site.log.read_text())
    assert process.describe_end() == f"rollout.server: the server runs but does not answer{rest}"
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.alive())
    assert process.describe_end() == f"rollout.server: the server was killed by signal 9{rest}"
    process.stop()
    assert process.describe_end() == f"rollout.server: the server ended with exit code None{rest}"


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ("one\n  two  \n\n   \n", "two"),
        ("one\nRuntimeError: first\nsglang.Exception: second\nthree\n", "sglang.Exception: second"),
        ("[12:00] it hit an exception: ValueError: bad\ntail", "[12:00] it hit an exception: ValueError: bad"),
        ("no exception: nothing to see", "no exception: nothing to see"),
        ("x" * 400, "x" * 300),
        ("OSError: too early\n" + "y" * process_module.LOG_TAIL_BYTES + "\nlast", "last"),
        ("   \n\n", ""),
    ],
)  # fmt: skip
def test_the_line_shown_of_a_log_is_the_last_that_names_an_exception_or_else_the_last_with_text(
    site: Site, says: str, shown: str
) -> None:
    process = site.process()
    site.run_dir.mkdir()
    site.log.write_text(says)
    assert f"; last line: {shown!r}; log: " in process.describe_end()


def test_a_log_keeps_earlier_launches_and_none_of_their_lines_is_shown(site: Site) -> None:
    site.run_dir.mkdir()
    site.log.write_text("ValueError: of an earlier launch\n")
    process = site.process({"exit": 1, "says": "of this one"})
    process.start()
    wait_for(lambda: not process.alive())
    assert "last line: 'of this one'" in process.describe_end()
    assert site.log.read_text() == "ValueError: of an earlier launch\nof this one\n"


def test_stopping_ends_the_server_with_its_children_and_is_harmless_when_repeated(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "STOP_GRACE_S", 0.1)
    monkeypatch.setattr(process_module, "STOP_TIMEOUT_S", 0.3)  # a dead child may be in the process table for longer
    process = site.started({"silent": True, "child": True})
    family = [process.pid, site.told()["child"]]
    assert all(runs(pid) for pid in family)
    process.stop()
    wait_for(lambda: not any(runs(pid) for pid in family))
    assert not process.alive()
    process.stop()
    site.process().stop()


def test_a_server_that_does_not_heed_the_first_signal_is_killed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "STOP_GRACE_S", 0.05)
    process = site.started({"silent": True, "stubborn": True})
    pid = process.pid
    process.stop()
    assert not runs(pid)


def test_leaving_the_block_of_a_server_stops_it(site: Site) -> None:
    with pytest.raises(RuntimeError, match="of the block"), site.process({"silent": True}) as process:
        process.start()
        pid = process.pid
        raise RuntimeError("of the block")
    assert not runs(pid) and not process.alive()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group, as a server does."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def write_record(path: Path, pid: int, *, later_s: float = 0.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"pid": pid, "start_time": psutil.Process(pid).create_time() + later_s, "port": 1}))
    return path


def test_a_server_that_an_earlier_launch_left_behind_is_stopped_first(
    site: Site, sleeper: subprocess.Popen[bytes]
) -> None:
    write_record(site.record, sleeper.pid)
    process = site.started({"silent": True})
    assert not runs(sleeper.pid) and json.loads(site.record.read_text())["pid"] == process.pid


def test_a_left_over_server_goes_with_its_record(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record = write_record(tmp_path / "record.json", sleeper.pid, later_s=0.5)
    assert stop_left_over(record)
    assert not runs(sleeper.pid) and not record.exists()
    assert not stop_left_over(record), "nothing is left"


@pytest.mark.parametrize("later_s", [-100.0, -1.5, 1.5, 100.0])
def test_a_process_that_only_has_the_recorded_pid_is_left_alone(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], later_s: float
) -> None:
    assert not stop_left_over(write_record(tmp_path / "record.json", sleeper.pid, later_s=later_s))
    assert runs(sleeper.pid)


def test_a_process_that_leads_no_group_is_left_alone(tmp_path: Path) -> None:
    member = subprocess.Popen(["sleep", "600"])
    try:
        assert not stop_left_over(write_record(tmp_path / "record.json", member.pid))
        assert runs(member.pid)
    finally:
        member.kill()
        member.wait()


def test_a_record_of_a_process_that_has_ended_is_no_left_over(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record = write_record(tmp_path / "record.json", sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert not stop_left_over(record)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": 1}', '{"pid": "x", "start_time": 1}'])
def test_a_damaged_record_is_ignored_with_a_warning(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / "record.json"
    record.write_text(content)
    assert not stop_left_over(record)
    assert f"{record}: not a server record" in caplog.text


PARENT = """
import os, subprocess, sys
command = [sys.executable, "-m", "tropd_mcore.serving.sglang_launch", "--parent-pid", sys.argv[1] or str(os.getpid())]
print(subprocess.Popen(command).pid, flush=True)
sys.stdin.read()
"""


def parent_of_a_server(site: Site, parent_pid: str) -> subprocess.Popen[bytes]:
    """A process that starts a server which takes `parent_pid` for its parent; empty: what is so."""
    return subprocess.Popen(
        [sys.executable, "-S", "-c", PARENT, parent_pid],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **site.spec({"silent": True}).extra_env},
    )


def test_a_server_dies_with_the_process_that_started_it_however_that_ends(site: Site) -> None:
    with parent_of_a_server(site, "") as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            site.told()
            assert runs(pid)
        finally:
            parent.kill()
        wait_for(lambda: not runs(pid))


def test_a_server_whose_parent_has_ended_before_it_looked_does_not_start(site: Site) -> None:
    with parent_of_a_server(site, str(os.getpid())) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pid = int(parent.stdout.readline())
        line = parent.stderr.readline().decode()
        wait_for(lambda: not runs(pid))
        parent.kill()
    assert line == f"sglang_launch: the parent process {os.getpid()} has already ended\n"
    assert not site.notes.exists()


def test_a_server_that_died_is_restarted_as_often_as_allowed_and_then_reported(
    site: Site, caplog: pytest.LogCaptureFixture
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
