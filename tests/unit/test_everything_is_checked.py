"""The checks of tests/run.sh reach every file. Some tools silently skip folders with certain names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("tropd_mcore", "examples", "conversion", "benchmarks", "tests")


def test_ruff_checks_every_file() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    expected = {str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} | {str(ROOT / "setup.py")}
    assert expected - set(shown.stdout.splitlines()) == set()


def test_a_run_of_all_tests_stops_if_a_test_folder_would_be_skipped(tmp_path: Path) -> None:
    """The hook of tests/conftest.py, in a project of two folders. Pytest treats one of them as a build folder."""
    for folder in ("unit", "dist"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text("def test_nothing() -> None:\n    pass\n")
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    refused = run()
    assert refused.returncode != 0
    assert "1 files of tests were not collected: tests/dist/test_dist.py; look at norecursedirs" in refused.stderr
    assert run("tests/unit").returncode == 0, "a part that is asked for by name"
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\nnorecursedirs = .*\n")
    assert run().returncode == 0
