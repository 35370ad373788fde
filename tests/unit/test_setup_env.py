"""examples/setup_env.sh with a stand-in interpreter: what it installs and when, and what it says where it cannot."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """\
#!/bin/sh
case "$*" in
  "-V") echo "Python $(cat "$STATE/version")" ;;
  "-c import sys"*) test "$(cat "$STATE/version")" != 3.10.1 ;;
  "-c import ensurepip"*) test ! -e "$STATE/no-venv" ;;
  "-m venv "*) echo "venv" >>"$STATE/calls"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install"*)
    echo "$*" >>"$STATE/calls"
    if [ -e "$STATE/broken" ]; then echo "no such package" >&2; exit 1; fi ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


class Checkout:
    """A copy of the files that the script reads, and an interpreter that only notes what it is asked to do."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.state = folder / "state"
        self.python = folder / "bin" / "python-stand-in"
        for name in ("examples/setup_env.sh", "requirements/cpu.txt", "pyproject.toml"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.state.mkdir()
        (self.state / "version").write_text("3.11.7")
        self.python.parent.mkdir()
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.state / "calls").write_text("")
        return subprocess.run(
            ["bash", str(self.root / "examples" / "setup_env.sh")],
            env={**os.environ, "PYTHON": str(self.python), "STATE": str(self.state), "CXX": "g++", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    @property
    def calls(self) -> list[str]:
        return (self.state / "calls").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_first_run_installs_the_lock_then_sglang_without_dependencies_then_the_project(checkout):
    result = checkout.run()
    assert (result.returncode, result.stderr) == (0, "")
    assert checkout.calls[0] == "venv"
    installed = [call.removeprefix("-m pip install -qq --disable-pip-version-check ") for call in checkout.calls[1:]]
    assert installed == [
        "-r requirements/cpu.txt",
        "--no-deps sglang==0.5.23",
        "--no-deps --no-build-isolation -e .",
    ]


def test_a_second_run_does_nothing_until_a_pin_changes(checkout):
    checkout.run()
    again = checkout.run()
    assert (again.returncode, again.stdout, checkout.calls) == (0, "", [])
    lock = checkout.root / "requirements" / "cpu.txt"
    lock.write_text(lock.read_text() + "another==1\n")
    assert checkout.run().returncode == 0
    assert len(checkout.calls) == 3, "packages are updated in place"


@pytest.mark.parametrize("marker_only", [False, True])
def test_after_an_installation_that_did_not_finish_the_next_run_starts_over(checkout, marker_only):
    if marker_only:
        checkout.run()
        (checkout.root / ".venv" / ".setup.unfinished").touch()
    else:
        (checkout.state / "broken").touch()
        failed = checkout.run()
        assert failed.returncode == 2
        assert "error: the packages of requirements/cpu.txt could not be installed" in failed.stderr
        (checkout.state / "broken").unlink()
    assert checkout.run().returncode == 0
    assert checkout.calls[0] == "venv" and len(checkout.calls) == 4
    assert checkout.run().returncode == 0 and checkout.calls == []


def test_each_missing_tool_is_one_line_that_says_what_to_install_or_set(checkout, tmp_path):
    def said(**environment: str) -> str:
        result = checkout.run(**environment)
        assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
        return result.stderr

    assert "error: no-such-python not found; install Python 3.11" in said(PYTHON="no-such-python")
    broken = tmp_path / "broken-python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert "broken-python does not run; set PYTHON" in said(PYTHON=str(broken))
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "sh"):
        (tools / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    assert "error: no C++ compiler found" in said(PATH=str(tools), CXX="")
    (checkout.state / "no-venv").touch()
    assert "has no venv module; install it (Debian and Ubuntu: python3-venv)" in said()
    (checkout.state / "version").write_text("3.10.1")
    assert "Python 3.11 or newer is needed" in said() and "is Python 3.10.1" in said()
