"""examples/quickstart.sh with steps that only record their calls: environment, failures, signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

INTERPRETER = """\
#!/usr/bin/env bash
echo "$2 ${*:3:1}" >> "$CALLS"
echo "${CUDA_VISIBLE_DEVICES-unset} $*" >> "$CALLS.devices"
case "$*" in
  *"$FAIL_AT"*) exit 7 ;;
  *make_models*)
    if [[ -n "$SLEEP" ]]; then
      trap 'echo ended by TERM >> "$CALLS"; exit 143' TERM
      trap 'echo ended by INT >> "$CALLS"; exit 130' INT
      echo $$ > "$CALLS.pid"
      while :; do sleep 0.05; done
    fi ;;
esac
"""
STEPS = [
    "examples.make_models models/arithmetic",
    "tropd_mcore.cli.main prefixes",
    "tropd_mcore.cli.main eval",
    "tropd_mcore.cli.main train",
    "tropd_mcore.cli.main eval",
    "tropd_mcore.cli.main report",
    "examples.quickstart_table runs/quickstart",
]
LIMIT_S = 120.0


class Clone:
    """A copy of the script with an environment of stubs."""

    def __init__(self, root: Path, venv: str) -> None:
        self.root, self.calls = root / "a clone", root / "calls"
        (self.root / "examples").mkdir(parents=True)
        (self.root / "configs").mkdir()
        shutil.copy(EXAMPLES / "quickstart.sh", self.root / "examples")
        for config in ("wrong-prior-cpu.yaml", "quickstart-cpu.yaml"):
            shutil.copy(EXAMPLES.parent / "configs" / config, self.root / "configs")
        setup = 'echo "setup ${VENV-for} $PLATFORM" >> "$CALLS"\n'
        (self.root / "examples" / "setup_env.sh").write_text(setup)
        self.venv = venv
        interpreter = self.root / venv / "bin" / "python"
        interpreter.parent.mkdir(parents=True)
        interpreter.write_text(INTERPRETER)
        interpreter.chmod(0o755)

    def start(
        self, *settings: str, venv: str | None = None, fail_at: str = "nothing", sleep: bool = False, **extra: str
    ) -> subprocess.Popen[str]:
        variables = {"VENV": venv or self.venv, "CALLS": str(self.calls), "FAIL_AT": fail_at, "SLEEP": "1" * sleep}
        kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "SETUP")}
        environment = {**kept, **variables, **extra}
        return subprocess.Popen(
            ["bash", "examples/quickstart.sh", "run.steps=3", *settings],
            cwd=self.root,
            env={name: value for name, value in environment.items() if value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


@pytest.mark.parametrize("venv", [".venv", "an environment/of mine"])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_python_environment_of_the_quickstart_may_be_anywhere(tmp_path: Path, venv: str, absolute: bool) -> None:
    clone = Clone(tmp_path, venv)
    code, out, err = result(clone.start(venv=str(clone.root / venv) if absolute else None))
    assert (code, err) == (0, "") and "Everything is in runs/quickstart" in out
    assert clone.called() == [f"setup {clone.root / venv} cpu", *STEPS]


@pytest.fixture
def with_gpu(tmp_path: Path) -> str:
    """A PATH on which nvidia-smi lists a GPU."""
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: X'\n")
    (tmp_path / "gpu" / "nvidia-smi").chmod(0o755)
    return f"{tmp_path / 'gpu'}:{os.environ['PATH']}"


def test_the_quickstart_hides_the_gpus_of_a_machine_from_every_step_and_says_so(tmp_path: Path, with_gpu: str) -> None:
    clone = Clone(tmp_path, ".venv")
    code, out, _ = result(clone.start(PATH=with_gpu))
    assert code == 0 and out.splitlines()[0] == "platform: CPU; the GPUs of this machine are hidden"
    assert clone.called() == [f"setup {clone.root / '.venv'} cpu", *STEPS]
    seen = Path(f"{clone.calls}.devices").read_text().splitlines()
    assert len(seen) == len(STEPS) and all(line.startswith(" ") for line in seen), "set, and empty"


@pytest.mark.parametrize(("kind", "gpu"), [("cuda", True), ("cuda", False), ("auto", True), ("auto", False)])
def test_another_platform_takes_the_environments_for_it(tmp_path: Path, with_gpu: str, kind: str, gpu: bool) -> None:
    if kind == "auto" and not gpu and list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    on_gpu = kind == "cuda" or gpu
    clone = Clone(tmp_path, ".venv-trainer" if on_gpu else ".venv")
    path = with_gpu if gpu else os.environ["PATH"]
    process = clone.start(f"platform.kind={kind}", PATH=path, VENV="")
    code, out, err = result(process)
    assert (code, err) == (0, "") and out.splitlines()[0] == f"platform: {'GPU' if on_gpu else 'CPU'}"
    assert clone.called() == ["setup for gpu" if on_gpu else f"setup {clone.root / '.venv'} cpu", *STEPS]
    seen = Path(f"{clone.calls}.devices").read_text()
    assert ("unset" in seen) == on_gpu and ("rollout.server.python=.venv-server/bin/python" in seen) == on_gpu


@pytest.mark.parametrize(
    ("step", "done", "words"), [("prefixes", 2, "teacher responses"), ("quickstart_table", 7, "result")]
)
def test_a_failing_quickstart_step_is_named_and_the_next_ones_are_not_started(
    tmp_path: Path, step: str, done: int, words: str
) -> None:
    clone = Clone(tmp_path, ".venv")
    code, _, err = result(clone.start(fail_at=step))
    assert code == 7 and err.startswith(f"error: quickstart: the step '{words}") and err.count("\n") == 1
    assert clone.called()[1:] == STEPS[:done]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_running_step_and_the_quickstart(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """As `kill` sends it, only to the script."""
    clone = Clone(tmp_path, ".venv")
    process = clone.start(sleep=True)
    pid_file = Path(f"{clone.calls}.pid")
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
    process.send_signal(number)
    found, _, err = result(process)
    assert found == code and err.strip().endswith("; the same command goes on")
    assert clone.called()[-1] == f"ended by {number.name.removeprefix('SIG')}"
    wait_for(lambda: not Path(f"/proc/{pid_file.read_text().strip()}").exists())


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
