"""Stands for a scheduler that starts two nodes on this machine: fake `srun` and `scontrol`, and fake pods.

Run as a program, it is one of the two commands. Invariants: it does what Slurm's manual says of the options in use and
refuses others. Every process that it starts ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

SRUN_OPTIONS = ("--kill-on-bad-exit=0", "--wait=", "--cpus-per-task=")
NODES = 2


def install(folder: Path) -> Path:
    """A folder for PATH with the two commands."""
    folder.mkdir(parents=True)
    for name in ("srun", "scontrol"):
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    return folder


def srun(arguments: list[str]) -> int:
    """Run the command once per node, pass signals on to the tasks, and return their highest exit code."""
    while arguments[0].startswith("--"):
        option = arguments.pop(0)
        if not option.startswith(SRUN_OPTIONS):
            raise SystemExit(f"srun: unexpected option {option}")
    step = {"SLURM_STEP_NUM_NODES": str(NODES), "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "fake[0-1]"}
    tasks = [
        subprocess.Popen(arguments, env=os.environ | step | {"SLURM_NODEID": str(node)}, start_new_session=True)
        for node in range(NODES)
    ]
    (Path(os.environ["FAKE_SLURM"]) / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: [task.send_signal(number) for task in tasks])
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(arguments: list[str]) -> int:
    """`show hostnames` of the fake nodes; `requeue` records the job."""
    if arguments[:2] == ["show", "hostnames"]:
        print("127.0.0.1\n127.0.0.2")
        return 0
    if arguments[0] == "requeue":
        with (Path(os.environ["FAKE_SLURM"]) / "requeued").open("a") as stream:
            stream.write(f"{arguments[1]}\n")
        return 0
    raise SystemExit(f"scontrol: unexpected {arguments}")


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
