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
  "-c import sysconfig"*include*) echo "$STATE/include" ;;
  "-c import sysconfig"*purelib*) echo "/site-packages" ;;
  "-c import sys;"*"3, 11"*) test "$(cat "$STATE/version")" != 3.10.1 ;;
  "-c import sys;"*"3, 13"*) test "$(cat "$STATE/version")" = 3.13.0 && exit 1; true ;;
  "-c import ensurepip"*) test ! -e "$STATE/no-venv" ;;
  "-m venv "*) echo "venv" >>"$STATE/calls"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install"*)
    echo "$*" >>"$STATE/calls"
    case "$*" in *--no-build-isolation*==*) env | sort >"$STATE/build-environment" ;; esac
    case "$*" in *transformer_engine_torch*) if [ -e "$STATE/no-build" ]; then exit 1; fi ;; esac
    if [ -e "$STATE/broken" ]; then echo "no such package" >&2; exit 1; fi ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


def surroundings() -> dict[str, str]:
    """Our environment without folders of environments, because the tested script would install into them."""
    folders = ("VENV", "TRAINER_VENV", "SERVER_VENV")
    return {**{name: value for name, value in os.environ.items() if name not in folders}, "PLATFORM": "cpu"}


class Checkout:
    """A copy of the files that the script reads, and an interpreter that only records its calls."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.state = folder / "state"
        self.python = folder / "bin" / "python-stand-in"
        locks = [
            f"requirements/{name}.txt" for name in ("cpu", "trainer-gpu", "trainer-gpu-source", "server-gpu", "router")
        ]
        for name in ("examples/setup_env.sh", *locks, "pyproject.toml", "setup.py"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.state.mkdir()
        (self.state / "version").write_text("3.11.7")
        (self.state / "include").mkdir()
        (self.state / "include" / "Python.h").touch()
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

    def gpu(self, folder: Path, capability: str) -> str:
        """A PATH on which nvidia-smi finds a GPU."""
        folder.mkdir()
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && echo 'GPU 0: X' || echo {capability}\n")
        (folder / "nvidia-smi").chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    @property
    def calls(self) -> list[str]:
        return (self.state / "calls").read_text().splitlines()

    @property
    def installed(self) -> list[str]:
        return [call.removeprefix("-m pip install -qq --disable-pip-version-check ") for call in self.calls]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_first_run_installs_the_lock_then_sglang_without_dependencies_then_the_project(checkout):
    result = checkout.run()
    assert (result.returncode, result.stderr) == (0, "")
    assert checkout.installed == [
        "venv",
        "-r requirements/cpu.txt",
        "--no-deps sglang==0.5.23",
        "-r requirements/router.txt",
        "--no-deps --no-build-isolation -e .",
    ]


def test_a_second_installation_does_nothing_until_a_pin_changes(checkout):
    checkout.run()
    again = checkout.run()
    assert (again.returncode, again.stdout, checkout.calls) == (0, "", [])
    lock = checkout.root / "requirements" / "cpu.txt"
    lock.write_text(lock.read_text() + "another==1\n")
    assert checkout.run().returncode == 0
    assert len(checkout.calls) == 4, "packages are updated in place"


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
    assert checkout.calls[0] == "venv" and len(checkout.calls) == 5
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


TRAINER = ["venv", "-r requirements/trainer-gpu.txt", "--no-deps --no-build-isolation transformer_engine_torch==2.12.0"]
PROJECT = "--no-deps --no-build-isolation -e ."
SERVER = ["venv", "-r requirements/server-gpu.txt", "-r requirements/router.txt"]


@pytest.mark.parametrize(
    ("capability", "choice", "more"),
    [("9.0", "auto", []), ("8.0", "auto", ["flash-attn"]), ("9.0", "1", ["flash-attn"]), ("8.0", "0", [])],
)
def test_a_machine_with_a_gpu_gets_a_trainer_and_a_server_and_flash_attn_where_the_gpu_is_old(
    checkout, tmp_path, capability, choice, more
):
    path = checkout.gpu(tmp_path / "gpu", capability)
    result = checkout.run(PLATFORM="auto", PATH=path, FLASH_ATTN=choice)
    assert (result.returncode, result.stderr) == (0, "")
    extra = [f"--no-deps --no-build-isolation {name}==2.8.3" for name in more]
    assert checkout.installed == [*TRAINER, *extra, PROJECT, *SERVER]
    assert (checkout.root / ".venv-trainer/bin/python").exists() and (
        checkout.root / ".venv-server/bin/python"
    ).exists()
    assert not (checkout.root / ".venv").exists()
    assert f"set rollout.server.python={checkout.root}/.venv-server/bin/python in a run" in result.stdout
    again = checkout.run(PLATFORM="auto", PATH=path, FLASH_ATTN=choice)
    assert (again.returncode, again.stdout, checkout.calls) == (0, "", [])


def test_the_platform_of_a_machine_can_be_overridden(checkout, tmp_path):
    assert checkout.run(PLATFORM="cpu", PATH=checkout.gpu(tmp_path / "gpu", "9.0")).returncode == 0
    assert "-r requirements/cpu.txt" in checkout.installed
    assert checkout.run(PLATFORM="gpu", ONLY="server").returncode == 0 and checkout.installed == SERVER
    assert checkout.run(PLATFORM="gpu").returncode == 0 and checkout.installed == [*TRAINER, PROJECT]


def test_transformer_engine_is_built_with_the_compiler_and_headers_that_torch_came_with(checkout):
    assert checkout.run(PLATFORM="gpu", ONLY="trainer").returncode == 0
    built = (checkout.state / "build-environment").read_text().splitlines()
    assert "CUDA_HOME=/site-packages/nvidia/cu13" in built and "NVTE_PYTORCH_FORCE_BUILD=TRUE" in built
    assert "CPLUS_INCLUDE_PATH=/site-packages/nvidia/cudnn/include:/site-packages/nvidia/nccl/include" in built
    assert any(line.startswith(f"PATH={checkout.root}/.venv-trainer/bin:") for line in built), "for ninja"


def test_after_a_failed_build_the_next_run_keeps_the_packages_and_builds_again(checkout):
    (checkout.state / "no-build").touch()
    failed = checkout.run(PLATFORM="gpu")
    assert failed.returncode == 2 and "error: transformer_engine_torch==2.12.0 could not be built" in failed.stderr
    assert checkout.installed == TRAINER, "no server either"
    (checkout.state / "no-build").unlink()
    assert checkout.run(PLATFORM="gpu").returncode == 0
    assert checkout.installed == [*TRAINER[1:], PROJECT, *SERVER]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"PLATFORM": "tpu"}, "PLATFORM is 'tpu', expected cpu, gpu or auto"),
        ({"PLATFORM": "gpu", "ONLY": "both"}, "ONLY is 'both', expected trainer or server"),
        ({"PLATFORM": "gpu", "FLASH_ATTN": "yes"}, "FLASH_ATTN is 'yes', expected 0, 1 or auto"),
        ({"PLATFORM": "gpu", "VENV": "x"}, "VENV=x is the environment of a CPU; set TRAINER_VENV and SERVER_VENV, or"),
        ({"PLATFORM": "cpu", "ONLY": "server"}, "ONLY=server: a CPU machine has one environment; unset it or set PLA"),
    ],
)
def test_a_wrong_choice_of_environments_is_one_line_and_installs_nothing(checkout, given, line):
    result = checkout.run(**given)
    assert result.returncode == 2 and result.stdout == "" and checkout.calls == []
    assert result.stderr.startswith(f"error: {line}") and result.stderr.count("\n") == 1


def test_a_gpu_environment_needs_python_headers_and_a_python_that_has_wheels(checkout):
    (checkout.state / "include" / "Python.h").unlink()
    assert "has no Python.h, which builds need; install it" in checkout.run(PLATFORM="gpu").stderr
    (checkout.state / "version").write_text("3.13.0")
    said = checkout.run(PLATFORM="gpu").stderr
    assert "Python 3.11 or 3.12 is needed on a GPU machine" in said and "is Python 3.13.0" in said


@pytest.mark.parametrize("name", ["trainer", "server"])
def test_a_failure_in_either_gpu_environment_ends_the_script_with_the_file_that_failed(checkout, name):
    (checkout.state / "broken").touch()
    result = checkout.run(PLATFORM="gpu", ONLY=name)
    assert result.returncode == 2 and "ready" not in result.stdout
    assert f"error: the packages of requirements/{name}-gpu.txt could not be installed" in result.stderr
