"""Start training jobs as a user does, wait for them, and read their results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "quickstart-cpu.yaml"
NOT_REPRODUCIBLE = ("time/", "throughput/", "gates/")
"""Metrics that a repeated run does not reproduce: of the machine, and of events since the start of a launch."""
LIMIT_S = 1200.0
"""Longest time of one job, or of one wait for it. It only ends a hang and does not judge a slow machine."""
TEST_LIMIT_S = 4 * LIMIT_S
"""Longest time of a test: the jobs that it runs one after the other, and the shared ones."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user: ours without the variables of a test runner or torchrun."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **extra}


def start(run_dir: Path, *overrides: str, ranks: int = 2, log: Path | None = None) -> subprocess.Popen[bytes]:
    """`examples/tropd_pretrain.sh` with overrides, in its own process group, with output to `log`."""
    log = log or run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["bash", "examples/tropd_pretrain.sh", str(CONFIG), f"run.dir={run_dir}", *overrides]
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment(NPROC_PER_NODE=str(ranks)),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def run(run_dir: Path, *overrides: str, ranks: int = 2, timeout_s: float = LIMIT_S) -> str:
    """Run a job to its end and return its output. Fails the test if the exit code is not 0."""
    code, output = attempt(run_dir, *overrides, ranks=ranks, timeout_s=timeout_s)
    assert code == 0, f"exit code {code}\n{output[-6000:]}"
    return output


def attempt(
    run_dir: Path, *overrides: str, ranks: int = 2, timeout_s: float = LIMIT_S, log: Path | None = None
) -> tuple[int, str]:
    """Run a job to its end, successful or not. Returns (exit code, output)."""
    log = log or run_dir.with_suffix(".log")
    written = log.stat().st_size if log.exists() else 0
    process = start(run_dir, *overrides, ranks=ranks, log=log)
    try:
        code = process.wait(timeout=timeout_s)
    finally:
        kill(process)
    return code, log.read_bytes()[written:].decode(errors="replace")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the job with all its descendants, as if the machine failed."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        # Servers are not killed here: the kernel has to end them when their parent ends.
        if "sglang" not in " ".join(_command_line(member)):
            _signal(member, signal.SIGKILL)
    process.wait()


def server_processes(run_dir: Path) -> list[psutil.Process]:
    """Living processes of the servers that were started for `run_dir`."""
    found = []
    for record in (run_dir / "logs").glob("*.server.json"):
        pid = json.loads(record.read_text())["pid"]
        found += [process for process in psutil.process_iter() if _group(process) == pid]
    return found


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, timeout_s: float = LIMIT_S
) -> None:
    """Wait until `condition` holds. Fails if the process ends or the time is up before that."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        assert process is None or process.poll() is None, "the job ended before"
        time.sleep(0.05)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that a repeated run has to reproduce."""
    return [
        {name: value for name, value in line.items() if not name.startswith(NOT_REPRODUCIBLE)}
        for line in metrics(run_dir)
    ]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
