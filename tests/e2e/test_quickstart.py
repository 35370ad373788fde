"""The README's first command, shortened: from models to a better student and its report, with real servers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

SHORT = ("run.steps=30", "run.checkpoint_every=15", "rollout.prompts_per_step=8")
MARGIN = 0.05
"""Rise of the greedy accuracy that the tiny example has to reach (measured after 20 steps: 0.20)."""


def quickstart(run_dir: Path) -> str:
    """Run it and return its output."""
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", *SHORT],
        cwd=jobs.REPOSITORY,
        env=jobs.environment(QUICKSTART_SIZE="tiny", QUICKSTART_RUN=str(run_dir)),
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


def test_the_quickstart_improves_the_student_and_a_second_run_does_nothing(example: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "quickstart"
    printed = quickstart(run_dir)
    assert "Everything is in" in printed
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
    again = quickstart(run_dir)
    assert server_logs(run_dir) == logs, "the second run started a server"
    assert "is complete: 30 of 30 steps" in again
    assert (run_dir / "export" / "model.safetensors").stat().st_mtime_ns == weights
    assert (run_dir / "metrics.jsonl").read_text() == lines
