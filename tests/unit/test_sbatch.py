"""The Slurm script with fake `srun` and `scontrol`, and a script in the place of `tropd train`.

Real jobs of two nodes are in tests/e2e/test_schedulers.py.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import schedulers

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "examples" / "tropd_pretrain.sbatch"


def options() -> dict[str, str]:
    """The options of sbatch that the file sets."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", SBATCH.read_text(), re.MULTILINE)
    return dict(found)


class Submission:
    """One start of the script whose nodes end with given codes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "train.sh"
        self.bin = schedulers.install(folder / "bin")

    def start(
        self, codes: tuple[int, int], *arguments: str, text: str | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        self.script.write_text(
            'echo "node $NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT: $*"\n'
            f"[[ $NODE_RANK == 0 ]] && exit {codes[0]}\nexit {codes[1]}\n"
        )
        sbatch = self.folder / "job.sbatch"
        sbatch.write_text(text or SBATCH.read_text())
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.folder),
            "TROPD_SCRIPT": str(self.script),
            "SLURM_NNODES": "2",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "fake[0-1]",
            **extra,
        }
        command = ["bash", str(sbatch), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    return Submission(tmp_path)


def test_the_script_asks_for_whole_nodes_all_cores_a_requeue_and_a_signal_before_the_limit() -> None:
    found = options()
    assert {"exclusive", "requeue"} <= set(found) and found["ntasks-per-node"] == "1"
    assert int(found["cpus-per-task"]) > 1 and found["mem"] == "0"
    assert found["signal"] == "TERM@600" and found["open-mode"] == "append"


def test_every_node_gets_its_number_the_first_host_and_the_arguments_as_they_were_given(
    submission: Submission,
) -> None:
    done = submission.start((0, 0), "a.yaml", "run.dir=with space")
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines == [
        f"node {rank} of 2 at 127.0.0.1:29500: a.yaml run.dir=with space --stopped-code 75" for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("codes", "restarts", "crash_s", "requeued"),
    [
        ((0, 0), "", "900", False),
        ((75, 75), "", "900", True),
        ((0, 75), "3", "900", True),
        ((75, 75), "100", "900", False),
        ((2, 2), "", "900", False),
        ((130, 130), "", "900", False),
        ((1, 1), "", "900", False),
        ((1, 1), "", "0", True),
        ((137, 1), "", "0", True),
    ],
)
def test_a_run_is_requeued_if_the_same_command_may_help_and_not_endlessly(
    submission: Submission, codes: tuple[int, int], restarts: str, crash_s: str, requeued: bool
) -> None:
    done = submission.start(codes, "a.yaml", SLURM_RESTART_COUNT=restarts, CRASH_S=crash_s)
    assert done.returncode == max(codes) and submission.requeued() == requeued
    assert ("requeue" in done.stdout) == requeued


def test_outside_slurm_the_script_says_how_it_is_started() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(["bash", str(SBATCH)], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "start this file with sbatch" in done.stderr


@pytest.mark.parametrize("name", ["PYXIS", "APPTAINER"])
def test_a_container_line_without_its_comment_sign_wraps_the_task_of_every_node(
    submission: Submission, name: str
) -> None:
    text = re.sub(rf"^# ({name}=)", r"\1", SBATCH.read_text(), flags=re.MULTILINE)
    assert text != SBATCH.read_text()
    apptainer = submission.bin / "apptainer"
    apptainer.write_text(
        '#!/usr/bin/env bash\n[[ $1 == exec ]] || exit 9\nwhile [[ $1 != *.sif ]]; do shift; done\nshift\nexec "$@"\n'
    )
    apptainer.chmod(0o755)
    if name == "PYXIS":
        srun = submission.bin / "srun"
        plain = srun.read_text().splitlines()[-1]
        srun.write_text(
            '#!/usr/bin/env bash\nkept=()\nfor word in "$@"; do\n  case $word in\n'
            "    --container-image=*.sqsh | --container-mounts=* | --container-workdir=*) ;;\n"
            f'    *) kept+=("$word") ;;\n  esac\ndone\nset -- "${{kept[@]}}"\n{plain}\n'
        )
    done = submission.start((0, 0), "a.yaml", text=text)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.sbatch")), ids=lambda path: path.name)
def test_the_scripts_are_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
