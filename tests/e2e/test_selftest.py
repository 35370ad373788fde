"""The whole selftest on this machine, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]


def test_the_selftest_passes_here_and_its_report_has_every_check(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tropd_mcore.cli.main", "selftest", "optimizer.learning_rate=2e-3"],
        cwd=tmp_path,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        timeout=jobs.LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert [words[0] for words in told] == ["ok"] * 8
    report = (tmp_path / "tropd-selftest.md").read_text(encoding="utf-8")
    for words in told:
        assert f"| {words[1]} | ok |" in report
    assert "All checks passed" in report and "optimizer.learning_rate=2e-3" in report and str(tmp_path) not in report
