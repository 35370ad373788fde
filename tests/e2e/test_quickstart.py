"""The README's first command, shortened: from models to a better student and its report, with real servers.

It runs as on a machine with a GPU: torch says that it sees one, as long as GPUs are not hidden.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

SHORT = ("run.steps=30", "run.checkpoint_every=15", "rollout.prompts_per_step=8")
MARGIN = 0.05
"""Rise of the greedy accuracy that the tiny example has to reach (measured after 20 steps: 0.20)."""

A_GPU = """
import os
if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    import torch
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.version.cuda = "13.0"
"""
"""`sitecustomize.py`, which every Python process runs at its start."""


@pytest.fixture
def gpu_machine(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine whose nvidia-smi and torch see a GPU."""
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(A_GPU)
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: X'\n")
    (folder / "nvidia-smi").chmod(0o755)
    extra = {"PYTHONPATH": f"{folder}:{jobs.REPOSITORY}", "PATH": f"{folder}:{os.environ['PATH']}"}
    return {name: value for name, value in jobs.environment(**extra).items() if name != "CUDA_VISIBLE_DEVICES"}


@pytest.mark.parametrize("hidden", [False, True])
def test_a_step_of_the_quickstart_fails_on_a_machine_with_a_gpu_unless_the_gpu_is_hidden(
    gpu_machine: dict[str, str], hidden: bool
) -> None:
    """Without this, the test below would prove nothing."""
    command = [sys.executable, "-c", "from tropd_mcore.mcore.platform import choose; choose('cpu')"]
    environment = {**gpu_machine, **({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})}
    done = subprocess.run(command, cwd=jobs.REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert ("torch sees a GPU" in done.stderr, done.returncode == 0) == (not hidden, hidden), done.stderr


def quickstart(run_dir: Path, environment: dict[str, str]) -> str:
    """Run it and return its output."""
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", *SHORT],
        cwd=jobs.REPOSITORY,
        env={**environment, "QUICKSTART_SIZE": "tiny", "QUICKSTART_RUN": str(run_dir)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=jobs.LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def server_logs(run_dir: Path) -> dict[Path, bytes]:
    """The logs of the servers of this run. Every server that starts writes one."""
    return {path: path.read_bytes() for path in run_dir.rglob("*.log")}


def test_the_quickstart_improves_the_student_and_a_second_run_does_nothing(
    example: Path, tmp_path: Path, gpu_machine: dict[str, str]
) -> None:
    run_dir = tmp_path / "quickstart"
    printed = quickstart(run_dir, gpu_machine)
    assert "platform: CPU; the GPUs of this machine are hidden" in printed and "Everything is in" in printed
    before, after = (json.loads((run_dir / f"evaluation_{when}.json").read_text()) for when in ("before", "after"))
    assert before["greedy"]["total"] == after["greedy"]["total"] == 64
    assert after["greedy"]["accuracy"] >= before["greedy"]["accuracy"] + MARGIN, printed[-2000:]
    report = (run_dir / "report.html").read_text()
    assert report.count("<svg") >= 7
    for word in ("trust", "prefix", "entropy", "outlier"):
        assert word in report.lower()

    weights = (run_dir / "export" / "model.safetensors").stat().st_mtime_ns
    lines = (run_dir / "metrics.jsonl").read_text()
    logs = server_logs(run_dir)
    assert logs
    again = quickstart(run_dir, gpu_machine)
    assert server_logs(run_dir) == logs, "the second run started a server"
    assert "is complete: 30 of 30 steps" in again
    assert (run_dir / "export" / "model.safetensors").stat().st_mtime_ns == weights
    assert (run_dir / "metrics.jsonl").read_text() == lines
