"""A long run of tiny steps that shows whether memory, handles, threads, shared memory or disk use grow.

    python -m tests.faults.soak --steps 1500 --out tests/faults/results/soak.json [key=value ...]

The job is a real one: the launcher, its ranks, and the rollout server that it starts. Further arguments are overrides
of its configuration. The soak plays no faults and measures no speed. Invariants: the job runs the code of the
repository that contains this file. Every process is measured from outside, by its pid. No started process remains.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.e2e.jobs import REPOSITORY, environment
from tests.faults.soak_readings import Folder, ProcessTree, SharedMemory
from tests.faults.soak_report import print_table, result_of
from tests.faults.soak_stage import Stage, set_stage

SAY_S = 20.0
"""Seconds between two lines about how far the soak is."""
STALL_S = 600.0
"""Longest wait for a step. The first one includes the start of the server."""
GRACE_S = 5.0
"""Longest wait for processes that end after all others."""
STOP_S = 60.0
"""Longest wait for a job that was asked to stop."""


@dataclass
class Soak:
    """One job with all of its readings."""

    stage: Stage
    process: subprocess.Popen[bytes]
    shared: SharedMemory
    tree: ProcessTree = field(init=False)
    run_dir: Folder = field(init=False)
    temporary: Folder = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ProcessTree(self.process.pid)
        self.run_dir = Folder(self.stage.run_dir)
        self.temporary = Folder(self.stage.temporary)

    def read(self, step: int) -> None:
        """Take one reading of everything."""
        self.tree.read(step)
        self.shared.read(step, self.tree)
        self.run_dir.read(step)
        self.temporary.read(step)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="steps of the job (default 1500)")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2), help="tensor-parallel ranks (default 2)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two readings (default 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the result (default: only the table)")
    parser.add_argument("--work", type=Path, help="folder of the run, kept afterwards (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the soak. Returns 0 if the job succeeded and left nothing behind."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="tropd-soak-") as spare:
        root: Path = (options.work or Path(spare)).resolve()
        say(f"writing tiny models, prompts and the configuration to {root}")
        stage = set_stage(root, steps=options.steps, ranks=options.ranks)
        check_code(stage)
        begun = time.monotonic()
        soak = start(stage, options)
        try:
            follow(soak, options)
        except KeyboardInterrupt:
            say("interrupted; stopping the job")
            return 130
        finally:
            end(soak)
        seconds = time.monotonic() - begun
        if soak.process.returncode != 0:
            say(f"the job ended with exit code {soak.process.returncode}; the end of its log:")
            print(stage.log.read_text(errors="replace")[-4000:], flush=True)
            return 1
        result = result_of(soak.tree, soak.shared, {"run.dir": soak.run_dir, "TMPDIR": soak.temporary}, options)
        result |= {"seconds": round(seconds, 1), **left_behind(soak)}
        print_table(result)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            say(f"written to {options.out}")
        return 1 if result["left_processes"] or result["left_shared_memory"] or result["left_temporary"] else 0


def check_code(stage: Stage) -> None:
    """Check that the job's processes import this repository's package. Raises RuntimeError if they would not."""
    command = [sys.executable, "-c", "import tropd_mcore; print(tropd_mcore.__file__)"]
    answer = subprocess.run(
        command, cwd=REPOSITORY, env=job_environment(stage), check=True, capture_output=True, text=True
    )
    found = Path(answer.stdout.strip()).resolve()
    if not found.is_relative_to(REPOSITORY):
        raise RuntimeError(f"the job would run {found.parent}; expected the package below {REPOSITORY}")


def job_environment(stage: Stage) -> dict[str, str]:
    """The environment of a user who has set a folder for temporary files."""
    return environment(TMPDIR=str(stage.temporary), CUDA_VISIBLE_DEVICES="")


def start(stage: Stage, options: argparse.Namespace) -> Soak:
    """Start the job in its own session."""
    shared = SharedMemory()
    command = [sys.executable, "-m", "tropd_mcore.cli.main", "train", str(stage.config), *options.overrides]
    with stage.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=job_environment(stage),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    say(f"started the job (pid {process.pid}, log {stage.log})")
    return Soak(stage, process, shared)


def follow(soak: Soak, options: argparse.Namespace) -> None:
    """Read everything every `options.every` seconds until the job has ended. Raises TimeoutError if it stalls."""
    begun = moved = said = time.monotonic()
    first_step_at: float | None = None
    step = -1
    while soak.process.poll() is None:
        now = time.monotonic()
        reached = last_step(soak.stage.run_dir / "metrics.jsonl")
        if reached > step:
            step, moved = reached, now
            first_step_at = first_step_at or now
        if 0 <= step < options.steps - 1:  # after the last step, parts of the job end one by one
            soak.read(step)
        if now - moved > STALL_S:
            raise TimeoutError(f"no step for {STALL_S:g} s after step {step}; the log is {soak.stage.log}")
        if now - said > SAY_S:
            said = now
            say(where(step, options.steps, now - (first_step_at or begun)))
        time.sleep(max(0.0, options.every - (time.monotonic() - now)))


def where(step: int, steps: int, seconds: float) -> str:
    """A line about the progress of the soak."""
    if step < 1:
        return f"waiting for the first steps, {seconds:.0f} s so far"
    each = seconds / step
    return f"step {step} of {steps}, {each:.2f} s per step, about {each * (steps - step) / 60:.0f} min left"


def last_step(metrics: Path) -> int:
    """The step of the last complete line of metrics.jsonl. -1 if there is none."""
    try:
        with metrics.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - (1 << 16)))
            lines = stream.read().split(b"\n")
    except FileNotFoundError:
        return -1
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else -1


def end(soak: Soak) -> None:
    """Ask a job that still runs to stop, and kill processes that do not."""
    if soak.process.poll() is None:
        family = soak.tree.members()
        os.kill(soak.process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=STOP_S)
        for process in alive:
            process.kill()
    soak.process.wait()


def left_behind(soak: Soak) -> dict[str, list[str]]:
    """What the job left behind, after its last processes have had time to end."""
    deadline = time.monotonic() + GRACE_S
    while (soak.tree.survivors() or soak.shared.left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {
        "left_processes": [series.role for series in soak.tree.survivors()],
        "left_shared_memory": soak.shared.left(),
        "left_temporary": sorted(path.name for path in soak.stage.temporary.iterdir()),
    }


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
