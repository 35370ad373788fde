"""examples/setup_env.sh with a stand-in interpreter: what it installs and when, and its messages if it cannot."""

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


def surroundings() -> dict[str, str]:
    """Our environment without VENV, because the tested script would install into that folder."""
    return {name: value for name, value in os.environ.items() if name != "VENV"}


class Checkout:
    """A copy of the files that the script reads, and an interpreter that only records its calls."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.state = folder / "state"
        self.python = folder / "bin" / "python-stand-in"
        for name in ("examples/setup_env.sh", "requirements/cpu.txt", "pyproject.toml", "setup.py"):
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
            env={**surroundings(), "PYTHON": str(self.python), "STATE": str(self.state), "CXX": "g++", **environment},
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


def test_a_second_installation_does_nothing_until_a_pin_changes(checkout):
    checkout.run()
    again = checkout.run()
    assert (again.returncode, again.stdout, checkout.calls) == (0, "", [])
    lock = checkout.root / "requirements" / "cpu.txt"
    lock.write_text(lock.read_text() + "another==1\n")
    assert checkout.run().returncode == 0
    assert len(checkout.calls) == 3, "packages are updated in place"


@pytest.mark.parametrize("marker_only", [False, True])
def test_after_an_unfinished_installation_the_next_run_starts_over(checkout, marker_only):
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


@pytest.fixture
def no_flock(tmp_path: Path) -> dict[str, str]:
    """An environment whose flock fails like Lustre without `-o flock`."""
    folder = tmp_path / "no-flock"
    folder.mkdir()
    (folder / "flock").write_text("#!/bin/sh\necho 'flock: 9: Function not implemented' >&2\nexit 71\n")
    (folder / "flock").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_without_flock_a_lock_folder_keeps_others_out_and_is_removed_at_the_end(checkout, no_flock):
    result = checkout.run(**no_flock)
    assert (result.returncode, result.stderr) == (0, "") and checkout.calls[0] == "venv"
    assert not (checkout.root / ".venv/.setup.lock.d").exists()


def test_the_lock_folder_of_a_killed_installation_on_this_machine_is_taken_over(checkout, no_flock):
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = checkout.root / ".venv/.setup.lock.d"
    folder.mkdir(parents=True)
    (folder / "owner").write_text(f"{os.uname().nodename} {ended.pid}\n")
    result = checkout.run(**no_flock)
    assert (result.returncode, result.stderr) == (0, "") and not folder.exists()


def test_an_installation_waits_for_the_lock_folder_of_a_running_one(checkout, no_flock):
    folder = checkout.root / ".venv/.setup.lock.d"
    folder.mkdir(parents=True)
    (folder / "owner").write_text(f"{os.uname().nodename} {os.getpid()}\n")
    environment = {"PYTHON": str(checkout.python), "STATE": str(checkout.state), "CXX": "g++", **no_flock}
    with subprocess.Popen(
        ["bash", str(checkout.root / "examples/setup_env.sh")],
        env={**surroundings(), **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stdout is not None
        said = waiting.stdout.readline()
        assert said.startswith("waiting for another set-up") and str(os.getpid()) in said
        assert not (checkout.state / "calls").exists()
        shutil.rmtree(folder)
        assert waiting.wait(timeout=300) == 0


def test_a_long_installation_prints_a_line_every_few_seconds(checkout):
    stand_in = checkout.python.read_text().replace(
        '"-m pip install"*)', '"-m pip install -qq"*-r*) sleep 3 ;;\n  "-m pip install"*)'
    )
    checkout.python.write_text(stand_in)
    result = checkout.run(SIGN_EVERY_S="1")
    signs = [line for line in result.stdout.splitlines() if line.startswith("installing packages: ")]
    assert result.returncode == 0 and signs and " MB in .venv" in signs[0]
    assert result.stdout.rstrip().endswith("tropd --help"), "nothing speaks on after the end"


def test_a_failing_long_installation_still_exits_with_an_error(checkout):
    stand_in = checkout.python.read_text().replace(
        'if [ -e "$STATE/broken" ]; then', 'if [ -e "$STATE/broken" ]; then sleep 2;'
    )
    checkout.python.write_text(stand_in)
    (checkout.state / "broken").touch()
    result = checkout.run(SIGN_EVERY_S="1")
    assert result.returncode == 2 and "could not be installed" in result.stderr
