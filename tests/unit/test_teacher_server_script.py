"""examples/teacher_server.sh: the command that it starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "added"),
    [(["--dtype", "bfloat16"], ["--enable-fp32-lm-head"]), (["--device", "cpu"], [])],
    ids=["gpu", "cpu"],
)
def test_a_teacher_on_a_gpu_keeps_its_logits_in_float32(given: list[str], added: list[str]) -> None:
    command = ["bash", "examples/teacher_server.sh", "models/teacher", *given]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "echo", "PORT": "7"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    started = done.stdout.splitlines()[-1].split()
    expected = ["--model-path", "models/teacher", "--host", "127.0.0.1", "--port", "7", *added, *given]
    assert started[-len(expected) :] == expected
