"""A server in another virtual environment: what it is started with, and how an unusable interpreter is refused.

The environment is real and bare. The package `sglang` in it is a stand-in.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import psutil
import pytest

from tests.glue.server_site import ServerSite
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.errors import ServerError
from tropd_mcore.serving import interpreter, sglang_launch
from tropd_mcore.serving.environment import of_interpreter
from tropd_mcore.serving.process import ServerProcess
from tropd_mcore.train.preflight_machine import interpreter_problem, packages

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
WANTED = f"expected a Python {MINOR} interpreter with sglang"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the standard library and nothing else."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture
def second(site: ServerSite, tmp_path: Path) -> Path:
    """The interpreter of an environment with the stand-in."""
    venv.create(tmp_path / "second", with_pip=False, symlinks=True)
    (packages_there,) = (tmp_path / "second").glob("lib/python*/site-packages")
    (packages_there / "stand-in.pth").write_text(f"{site.packages}\n")
    return tmp_path / "second" / "bin" / "python"


def script(folder: Path, text: str) -> Path:
    """A program that is named as an interpreter."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ServerError) as caught:
        interpreter.ask(path, key="rollout.server.python")
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"rollout.server.python={path}: ")
    return line.removeprefix(f"rollout.server.python={path}: ")


def test_a_server_runs_in_the_interpreter_of_its_key_without_this_project_and_our_python_path(
    site: ServerSite, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/of/ours")
    spec = site.spec({"silent": True}, config={"python": second})
    process = ServerProcess(dataclasses.replace(spec, extra_env={"STAND_IN": spec.extra_env["STAND_IN"]}))
    site.made.append(process)
    process.start()
    told = site.told()
    assert psutil.Process(process.pid).cmdline()[:3] == [str(second), "-P", sglang_launch.__file__]
    assert not {"PYTHONPATH", "PYTHONHOME"} & set(told["environment"])
    assert told["environment"]["PATH"].startswith(f"{second.parent}{os.pathsep}")


def test_without_the_key_a_server_runs_in_our_interpreter(site: ServerSite) -> None:
    process = site.started({"silent": True})
    assert psutil.Process(process.pid).cmdline()[:3] == [sys.executable, "-P", sglang_launch.__file__]


def test_the_launch_file_needs_the_standard_library_and_sglang_alone(bare: Path) -> None:
    done = subprocess.run(
        [bare, "-P", sglang_launch.__file__, "--parent-pid", str(os.getpid())],
        env=of_interpreter(bare), cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.strip().endswith("(ModuleNotFoundError: No module named 'sglang')"), done.stderr


def test_libraries_of_our_torch_are_kept_from_a_server_with_another_one_and_other_folders_are_not(
    second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = sysconfig.get_path("purelib")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{ours}/nvidia/cudnn/lib{os.pathsep}/usr/local/nvidia/lib64")
    monkeypatch.setenv("CUDNN_HOME", f"{ours}/nvidia/cudnn")
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    found = of_interpreter(second)
    assert found["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64" and found["CUDA_HOME"] == "/usr/local/cuda"
    assert "CUDNN_HOME" not in found


def test_an_interpreter_tells_its_versions(second: Path) -> None:
    found = interpreter.ask(second, key="rollout.server.python")
    assert (found.python, found.torch) == (sys.version.split()[0], None)
    assert str(found).endswith("sglang of unknown version, torch not installed")


def test_a_path_without_an_interpreter_is_refused(tmp_path: Path, bare: Path) -> None:
    assert refusal(tmp_path / "nope") == f"not found; {WANTED}"
    assert refusal(tmp_path) == f"is a folder; {WANTED}"
    assert refusal(bare.parents[1]) == f"is a folder; {WANTED}; did you mean {bare}?"
    (tmp_path / "plain").write_text("text")
    assert refusal(tmp_path / "plain") == f"cannot be executed (Permission denied); {WANTED}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("echo bad option >&2; exit 3", f"answers with 'bad option' and exit code 3; {WANTED}"),
        ("exit 0", f"answers with '' and exit code 0; {WANTED}"),
        ("echo hello; echo '{}'", f"answers with '{{}}' and exit code 0; {WANTED}"),
        ("echo '[1]'", f"answers with '[1]' and exit code 0; {WANTED}"),
    ],
)
def test_a_program_that_is_no_python_is_refused(tmp_path: Path, text: str, line: str) -> None:
    assert refusal(script(tmp_path, text)) == line


def test_the_server_environment_beside_this_one_is_offered_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What examples/setup_env.sh makes on a GPU machine: .venv-trainer, in which this runs, and .venv-server."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv-trainer"))
    assert interpreter.beside() is None
    assert "on a GPU machine examples/setup_env.sh makes one" in interpreter.way_to_sglang("rollout.server")
    python = tmp_path / ".venv-server" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert interpreter.beside() == python
    assert interpreter.way_to_sglang("rollout.server") == (
        f"set rollout.server.python to {python}, which examples/setup_env.sh made"
    )


def test_an_interpreter_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "ANSWER_S", 0.2)
    assert refusal(script(tmp_path, "exec sleep 60")) == f"has not answered within 0.2 s; {WANTED}"


def test_an_interpreter_of_another_minor_version_or_without_sglang_is_refused(tmp_path: Path, bare: Path) -> None:
    other = script(tmp_path, 'echo \'{"python": "3.10.1", "sglang": "0.5.23", "torch": "2.14.1"}\'')
    assert refusal(other).startswith("is Python 3.10.1, but this program runs in Python 3.")
    assert refusal(bare) == (f"has no package sglang; run `{bare} -m pip install sglang==0.5.23`, or name another one")


@pytest.mark.parametrize("section", ["rollout.server", "teacher.server"])
def test_a_launch_names_the_key_of_an_unusable_interpreter(section: str, bare: Path) -> None:
    config = Config.model_validate(
        {
            "run": {"dir": "run"}, "student": {"path": "s"}, "data": {"prompts": "p"},
            "teacher": {"path": "t", "kind": "sglang", "server": {"python": bare} if section[0] == "t" else {}},
            "rollout": {"server": {"python": bare} if section[0] == "r" else {}},
        }
    )  # fmt: skip
    faults = [fault for fault in packages(config, {}) if fault.key.endswith("python")]
    assert [fault.key for fault in faults] == [f"{section}.python"]
    assert "has no package sglang" in faults[0].text


def test_a_server_with_an_unusable_interpreter_is_not_started(site: ServerSite, bare: Path) -> None:
    process = site.process(config={"python": bare})
    with pytest.raises(ServerError, match=r"rollout\.server\.python=.*: has no package sglang"):
        process.start()
    assert not process.alive() and not site.log.exists()


def test_the_interpreter_of_a_server_that_runs_elsewhere_is_not_asked_for(bare: Path) -> None:
    config = ServerConfig(url="http://127.0.0.1:9", python=bare)
    assert interpreter_problem("rollout.server", config) is None
