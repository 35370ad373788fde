"""Files that killed processes leave in shared memory are removed by the next process, and no other files are.

The processes are real. A child that maps files of shared memory under random names stands in for SGLang.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tropd_mcore.serving import left_behind
from tropd_mcore.serving.left_behind import SHARED_MEMORY, Ledger, remove_left_over, start_of

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs /dev/shm")

CHILD = """
import mmap, multiprocessing, sys, time
handles = [multiprocessing.get_context("spawn").Lock()]
for name in sys.argv[1:]:
    with open(name, "wb+") as stream:
        stream.truncate(4096)
        handles.append(mmap.mmap(stream.fileno(), 4096))
print("mapped", flush=True)
time.sleep(600)
"""
OWNER = """
import subprocess, sys, time
from tropd_mcore.serving import left_behind
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(left_behind.make_folder(), flush=True)
left_behind.note_process(child.pid)
print(child.pid, flush=True)
time.sleep(600)
"""
SHARER = """
import sys, time, torch
from tropd_mcore.serving.weight_payload import SharedBuffer
buffer = SharedBuffer()
buffer.payloads([("weight", torch.zeros(1000))], copies=1)
print(buffer._bytes.untyped_storage()._share_filename_cpu_()[0].decode(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def names() -> Iterator[list[Path]]:
    """Unused names of shared memory. Files that remain there are removed after the test."""
    found = [SHARED_MEMORY / f"tropd-test-{uuid.uuid4().hex}" for _ in range(3)]
    yield found
    for path in found:
        path.unlink(missing_ok=True)


@contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process no longer runs. Its parent may not have waited for it yet."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while start_of(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert start_of(pid) is None


def ledger_of(pid: int) -> Path:
    (path,) = SHARED_MEMORY.glob(f"tropd.{os.getuid()}.*.{pid}.*.json")
    return path


def test_the_next_launch_removes_what_a_killed_owner_and_its_killed_server_left(names: list[Path]) -> None:
    with running(OWNER, CHILD, *names[:2]) as owner:
        folder, child = Path(line(owner)), int(line(owner))
        names[2].touch()
        ledger = ledger_of(owner.pid)
        files = Ledger.from_json(ledger.read_text()).files - {str(path) for path in names[:2]}
        (semaphore,) = [Path(name) for name in files]
        assert semaphore.name.startswith("sem.mp-")
        tracker = psutil.Process(child).children()  # multiprocessing's own, which would remove the semaphore
        kill(owner.pid)
    remove_left_over()
    assert all(path.exists() for path in names) and folder.is_dir() and ledger.exists(), "the server still runs"
    for process in tracker:
        kill(process.pid)
    kill(child)
    assert semaphore.exists() and remove_left_over() >= 4 and not semaphore.exists()
    assert [path.exists() for path in names] == [False, False, True], "what no ledger names stays"
    assert not folder.exists() and not ledger.exists()


def test_no_file_of_a_living_owner_is_removed(names: list[Path]) -> None:
    with running(OWNER, CHILD, *names) as owner:
        folder, child = Path(line(owner)), int(line(owner))
        for process in [*psutil.Process(child).children(), psutil.Process(child)]:
            kill(process.pid)
        remove_left_over()
        assert all(path.exists() for path in names) and folder.is_dir()
        kill(owner.pid)
    remove_left_over()
    assert not any(path.exists() for path in names) and not folder.exists()


def test_a_file_mapped_by_another_process_is_kept_until_that_process_ends(names: list[Path]) -> None:
    with running(CHILD, names[0]) as other:
        line(other)
        with running(OWNER, CHILD, *names) as owner:
            line(owner)
            child = int(line(owner))
            for process in [*psutil.Process(child).children(), psutil.Process(child)]:
                kill(process.pid)
            kill(owner.pid)
        remove_left_over()
        assert [path.exists() for path in names] == [True, False, False]
        kill(other.pid)
    remove_left_over()
    assert not names[0].exists()


def test_the_buffer_of_weight_updates_and_its_manager_folder_are_removed_after_both_were_killed() -> None:
    with running(SHARER) as sharer:
        socket = Path(line(sharer))
        (buffer,) = SHARED_MEMORY.glob(f"torch_{sharer.pid}_*")
        (manager,) = [process for process in psutil.process_iter() if _listens(process, socket)]
        os.kill(manager.pid, signal.SIGSTOP)  # so that it removes nothing while its clients end
        kill(sharer.pid)
        kill(manager.pid)
    assert buffer.exists() and socket.parent.is_dir()
    remove_left_over()
    assert not buffer.exists() and not socket.parent.exists()


def _listens(process: psutil.Process, socket: Path) -> bool:
    try:
        if process.name() != "torch_shm_manager":
            return False
        return any(socket.parent.name in str(found.laddr) for found in process.net_connections(kind="unix"))
    except psutil.Error:
        return False


LIARS: dict[str, Callable[[Path, Path], None]] = {
    "no ledger": lambda path, victim: path.write_text("torn {"),
    "a list": lambda path, victim: path.write_text("[]"),
    "another folder": lambda path, victim: path.write_text(
        json.dumps({"processes": {}, "files": [str(victim)], "folders": [str(victim.parent)]})
    ),
    "a way out": lambda path, victim: path.write_text(
        json.dumps(
            {"processes": {}, "files": [f"/dev/shm/../{victim}"], "folders": [f"/tmp/tropd-server-x/../{victim}"]}
        )
    ),
}


@pytest.mark.parametrize("liar", LIARS)
def test_a_forged_ledger_removes_no_file_elsewhere(tmp_path: Path, liar: str) -> None:
    victim = tmp_path / "data" / "precious.npz"
    victim.parent.mkdir()
    victim.touch()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    path = SHARED_MEMORY / f"tropd.{os.getuid()}.{namespace}.{2**22 - 1}.1.json"
    try:
        LIARS[liar](path, victim)
        remove_left_over()
        assert victim.exists()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("sees_all", [True, False])
def test_a_file_matched_only_by_process_number_is_removed_only_if_no_container_can_share_the_number(
    monkeypatch: pytest.MonkeyPatch, sees_all: bool
) -> None:
    """Containers that share /dev/shm have separate process numbers."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    monkeypatch.setattr(left_behind, "_WHOLE_MACHINE", namespace if sees_all else namespace + 1)
    gone = 2**22 - 2
    path = SHARED_MEMORY / f"tropd.{os.getuid()}.{namespace}.{gone}.1.json"
    file = SHARED_MEMORY / f"torch_{gone}_{uuid.uuid4().hex}_0"
    try:
        file.touch()
        path.write_text(Ledger({gone: 1}).to_json())
        remove_left_over()
        assert file.exists() != sees_all and not path.exists()
    finally:
        file.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def test_the_buffer_of_weight_updates_is_in_the_ledger_by_its_name() -> None:
    with running(SHARER) as sharer:
        line(sharer)
        (buffer,) = SHARED_MEMORY.glob(f"torch_{sharer.pid}_*")
        assert Ledger.from_json(ledger_of(sharer.pid).read_text()).files == {str(buffer)}
        kill(sharer.pid)
    deadline = time.monotonic() + 60
    while buffer.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not buffer.exists(), "its manager has removed it"
    remove_left_over()


def test_a_mapped_file_older_than_its_process_is_not_recorded_as_its_own(
    names: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_behind, "_CLOCK_STEP_S", 0.0)
    monkeypatch.setattr(left_behind, "_own", Ledger())
    monkeypatch.setattr(left_behind, "_write", lambda: None)
    old, new = names[:2]
    old.write_bytes(b"x" * 4096)
    time.sleep(1.5)  # the boot time, and so the start time of a process, is known to the second
    code = (
        "import mmap, sys, time\n"
        "old = open(sys.argv[1], 'rb+')\n"
        "handles = [mmap.mmap(old.fileno(), 4096)]\n"
        "with open(sys.argv[2], 'wb+') as stream:\n"
        "    stream.truncate(4096)\n"
        "    handles.append(mmap.mmap(stream.fileno(), 4096))\n"
        "print('mapped', flush=True)\n"
        "time.sleep(600)\n"
    )
    with running(code, old, new) as process:
        line(process)
        left_behind.note_process(process.pid)
        assert left_behind.mapped_files(process.pid) == {str(old), str(new)}
        assert left_behind._own.files == {str(new)}
        kill(process.pid)


def test_the_ledger_keeps_the_folder_of_a_server_after_its_owner_ended() -> None:
    with running("from tropd_mcore.serving import left_behind\nprint(left_behind.make_folder())") as process:
        folder = Path(line(process))
        process.wait(timeout=60)
    ledger = ledger_of(process.pid)
    assert folder.is_dir()
    remove_left_over()
    assert not folder.exists() and not ledger.exists()


def test_a_reused_process_number_is_another_process() -> None:
    start = start_of(os.getpid())
    assert start is not None and start_of(os.getpid()) == start
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert start_of(ended.pid) is None


def test_a_process_that_ends_normally_leaves_no_ledger() -> None:
    code = "import os\nfrom tropd_mcore.serving import left_behind\nleft_behind.note_process(os.getpid())\nprint('on')"
    with running(code) as process:
        assert line(process) == "on"
        process.wait(timeout=60)
    assert not list(SHARED_MEMORY.glob(f"tropd.{os.getuid()}.*.{process.pid}.*.json"))
    assert left_behind.mapped_files(process.pid) == set()
