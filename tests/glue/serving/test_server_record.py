"""Servers that earlier launches left behind are stopped; those of live processes are left alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.glue.server_site import ServerSite, runs, wait_for
from tropd_mcore.cli.server import free_name
from tropd_mcore.errors import ServerError
from tropd_mcore.serving.record import is_in_use, read_record, stop_group, stop_left_over


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group, as a server does."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def gone_owner() -> tuple[int, float]:
    """Pid and start time of a process that has ended."""
    process = subprocess.Popen(["sleep", "600"])
    start_time = psutil.Process(process.pid).create_time()
    process.kill()
    process.wait()
    return process.pid, start_time


def write_record(path: Path, pid: int, *, later_s: float = 0.0, owner: int | None = None, **changes: Any) -> Path:
    """The record of the server `pid`, started by a process that has ended, or by `owner`."""
    owner_pid, owner_start = gone_owner() if owner is None else (owner, psutil.Process(owner).create_time())
    path.parent.mkdir(exist_ok=True)
    record = {
        "pid": pid,
        "start_time": psutil.Process(pid).create_time() + later_s,
        "port": 1,
        "owner_pid": owner_pid,
        "owner_start_time": owner_start,
        "host": socket.gethostname(),
    }
    path.write_text(json.dumps(record | changes))
    return path


def test_a_server_that_an_earlier_launch_left_behind_is_stopped_first(
    site: ServerSite, sleeper: subprocess.Popen[bytes]
) -> None:
    write_record(site.record, sleeper.pid)
    process = site.started({"silent": True})
    assert not runs(sleeper.pid) and json.loads(site.record.read_text())["pid"] == process.pid


def test_a_leftover_server_is_stopped_and_its_record_removed(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record = write_record(tmp_path / "record.json", sleeper.pid, later_s=0.5)
    assert stop_left_over(record, key="rollout.server")
    assert not runs(sleeper.pid) and not record.exists()
    assert not stop_left_over(record, key="rollout.server"), "nothing is left"


@pytest.mark.parametrize("later_s", [-100.0, -1.5, 1.5, 100.0])
def test_a_process_that_only_has_the_recorded_pid_is_left_alone(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], later_s: float
) -> None:
    assert not stop_left_over(write_record(tmp_path / "r.json", sleeper.pid, later_s=later_s), key="x")
    assert runs(sleeper.pid)


def test_a_process_that_leads_no_group_is_left_alone(tmp_path: Path) -> None:
    member = subprocess.Popen(["sleep", "600"])
    try:
        assert not stop_left_over(write_record(tmp_path / "record.json", member.pid), key="x")
        assert runs(member.pid)
    finally:
        member.kill()
        member.wait()


def test_a_record_of_an_ended_process_is_not_a_leftover_server(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    record = write_record(tmp_path / "record.json", sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert not stop_left_over(record, key="rollout.server")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": 1}', '{"pid": "x", "start_time": 1}'])
def test_a_damaged_record_is_ignored_with_a_warning(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / "record.json"
    record.write_text(content)
    assert not stop_left_over(record, key="rollout.server")
    assert f"{record}: not a server record" in caplog.text


@pytest.fixture
def owner() -> Iterator[int]:
    """A running process other than this one, like the job for a command."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def test_the_server_of_another_live_process_is_left_alone_and_the_line_names_that_process(
    site: ServerSite, sleeper: subprocess.Popen[bytes], owner: int
) -> None:
    """The liar before it: the record matches in pid, start time and group, as that of a left-over server does."""
    write_record(site.record, sleeper.pid, owner=owner)
    with pytest.raises(ServerError) as caught:
        site.process({"silent": True}).start()
    assert str(caught.value) == (
        f"rollout.server: {site.record} is the record of a server (pid {sleeper.pid}) that process {owner} (sleep 600) "
        "uses: wait until that process has ended, or choose another run.dir"
    )
    assert runs(sleeper.pid) and json.loads(site.record.read_text())["pid"] == sleeper.pid


def test_a_later_process_with_the_owners_pid_does_not_count_as_the_owner(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], owner: int
) -> None:
    record = write_record(tmp_path / "record.json", sleeper.pid, owner=owner, owner_start_time=1.0)
    assert stop_left_over(record, key="x") and not runs(sleeper.pid)


def test_a_server_of_another_host_is_left_alone_and_its_name_stays_in_use(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    record = write_record(tmp_path / "teacher.server.json", sleeper.pid, host="elsewhere")
    assert not stop_left_over(record, key="x") and runs(sleeper.pid)
    assert is_in_use(record) and free_name(tmp_path, "teacher") == "teacher-2"


def test_a_command_avoids_the_names_of_servers_of_live_processes(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], owner: int
) -> None:
    assert free_name(tmp_path, "evaluation") == "evaluation"
    write_record(tmp_path / "evaluation.server.json", sleeper.pid)
    assert free_name(tmp_path, "evaluation") == "evaluation", "nobody uses what is left over"
    write_record(tmp_path / "evaluation.server.json", sleeper.pid, owner=owner)
    assert free_name(tmp_path, "evaluation") == "evaluation-2"
    write_record(tmp_path / "evaluation-2.server.json", sleeper.pid, owner=owner)
    assert free_name(tmp_path, "evaluation") == "evaluation-3"


COMMAND = """
import dataclasses, pathlib, sys
from tests.glue.server_site import ServerSite
from tropd_mcore.cli.server import free_name
from tropd_mcore.serving.process import ServerProcess

site = ServerSite(pathlib.Path(sys.argv[1]), make=False)
spec = site.spec({"silent": True})
process = ServerProcess(dataclasses.replace(spec, name=free_name(site.run_dir, sys.argv[2])))
process.start()
print(process.spec.name, process.pid, flush=True)
sys.stdin.read()
process.stop()
"""


def test_two_live_commands_on_one_run_directory_each_start_and_stop_their_own_server(
    site: ServerSite, tmp_path: Path
) -> None:
    """Real processes of the product, the second while the first lives."""
    command = [sys.executable, "-c", COMMAND, str(tmp_path), "teacher"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout is not None and first.stdin is not None
        name, pid = first.stdout.readline().split()
        with subprocess.Popen(command, **pipes) as second:
            assert second.stdout is not None and second.stdin is not None
            other_name, other_pid = second.stdout.readline().split()
            assert (name, other_name) == ("teacher", "teacher-2")
            assert runs(int(pid)) and runs(int(other_pid))
            second.stdin.close()
            second.wait()
        wait_for(lambda: not runs(int(other_pid)))
        assert runs(int(pid)) and (site.run_dir / "teacher.server.json").is_file()
        first.stdin.close()
        first.wait()
    assert not runs(int(pid)) and not (site.run_dir / "teacher.server.json").exists()


def test_processes_left_in_the_group_of_a_dead_server_are_killed() -> None:
    """Its pid is free after it was waited for."""
    command = "sleep 600 & echo $!"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True) as leader:
        assert leader.stdout is not None
        left = int(leader.stdout.readline())
        leader.wait()
        assert runs(left) and not psutil.pid_exists(leader.pid)
        stop_group(leader.pid)
        wait_for(lambda: not runs(left))
        stop_group(leader.pid)


def test_a_record_is_read_as_it_was_written(site: ServerSite) -> None:
    process = site.started({"silent": True})
    record = read_record(site.record)
    assert record is not None and (record.pid, record.owner_pid) == (process.pid, os.getpid())
    assert record.runs() and record.live_owner() is None, "its own process is no other one"
