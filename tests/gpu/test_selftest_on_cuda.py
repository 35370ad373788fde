"""The selftest on GPUs: NCCL between all of them, and weights that reach a server in an environment of its own.

The server's environment is that of `examples/setup_env.sh` (.venv-server), or SERVER_PYTHON names its interpreter. Its
torch is another version than the trainer's, so this also tests publication between two versions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

REPOSITORY = Path(__file__).parents[2]
SERVER = Path(os.environ.get("SERVER_PYTHON", REPOSITORY / ".venv-server" / "bin" / "python"))
LIMIT_S = 900.0


@pytest.mark.skipif(not SERVER.exists(), reason=f"needs {SERVER} (SERVER_PYTHON): the server's environment")
@pytest.mark.timeout(LIMIT_S + 60)
def test_the_selftest_passes_on_the_gpus_of_this_machine_with_a_server_of_another_environment(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tropd_mcore.cli.main", "selftest", "--device", "cuda",
         f"rollout.server.python={SERVER}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert [words[0] for words in told] == ["ok"] * 8, done.stdout
    assert "nccl between" in done.stdout
