"""Runs one cell of a study by the commands that a user would type, and writes its result.

Invariants: a cell whose result is there with the same settings is not run again. A cell that was stopped continues
where its run directory ends. Two jobs never run the same cell. What a command prints goes to a log file in the run
directory and, as progress, to the console.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import filelock

from tropd_mcore.config.derived import rollout_servers
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.evaluate import load_result as load_evaluation
from tropd_mcore.evaluation.run_records import RunRecords, read_run
from tropd_mcore.evaluation.stored_hints import hints_of
from tropd_mcore.progress import progress
from tropd_mcore.signals import die_with_parent
from tropd_mcore.study import result as results
from tropd_mcore.study.plan import Cell, Study, override
from tropd_mcore.study.result import CellResult
from tropd_mcore.study.server import CHANGED, KEY_VARIABLE, Reach, StudyServers
from tropd_mcore.train.inputs import installed_versions

log = logging.getLogger(__name__)

EVALUATION = "evaluation_after.json"
POLL_S = 0.2
SHOWN_OF_LINE = 110
"""Characters of a command's last line in the progress"""
Command = tuple[str, ...]


class CellFailed(DataError):
    """A command of a cell ended with an error. The other cells of the study can still run."""


def finished(study: Study, cell: Cell) -> bool:
    """Return whether the cell's result is there. Raises DataError if it was made with other settings."""
    path = study.result(cell)
    if not path.is_file():
        return False
    found = results.load_result(path)
    if found.settings != list(cell.overrides):
        changed = sorted(set(found.settings) ^ set(cell.overrides))
        raise DataError(
            f"{path}: its run had other settings than {study.path} asks for ({', '.join(changed[:6])}); remove this "
            f"file and the folder {cell.run_dir} to run it again, or give the objective, variant or pair another name"
        )
    return True


def run_cell(study: Study, cell: Cell, servers: StudyServers | None, prepared: set[Command]) -> CellResult:
    """Run the cell and write its result. Without `servers`, every command starts its own.

    `prepared` are the commands of `prepare` that this process has run; they are not run again, and new ones are added.
    Raises CellFailed if a command fails or another job runs the cell, and ConfigError.
    """
    folder = Path(cell.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder / ".cell.lock", f"{cell.name}: another job runs this cell"):
        with _only_one(Path(study.plan.runs) / ".prepare.lock", None):
            for command in cell.prepare:
                if command not in prepared:
                    _run(cell, [*_program(command[0]), *command[1:]], folder)
                    prepared.add(command)
        config = cell.load()
        if any(each.url is not None for each in rollout_servers(config).values()):
            servers = None  # the plan names servers of its own
        commands = []
        if cell.is_trained:
            commands.append(_train(cell, config, servers, folder))
        commands.append(_evaluate(cell, config, servers, folder))
        found = _result(study, cell, config, commands)
    found.save(study.result(cell))
    return found


def _train(cell: Cell, config: Config, servers: StudyServers | None, folder: Path) -> list[str]:
    """Train, and return the command without the server's address."""
    command = [*_program("tropd"), "train", cell.config, *cell.overrides]
    if servers is None or not config.objective.samples:
        _run(cell, command, folder)
    else:
        reach = servers.running(config)
        try:
            _run(cell, [*command, *_overrides(reach)], folder, reach.environment)
        except CellFailed:
            if servers.lives():
                raise
            log.warning("%s: its rollout server ended; it is started again, and the run continues", cell.name)
            reach = servers.running(config)
            _run(cell, [*command, *_overrides(reach)], folder, reach.environment)
    return command


def _evaluate(cell: Cell, config: Config, servers: StudyServers | None, folder: Path) -> list[str]:
    """Evaluate the exported student, or the student as it was made, and return the command without the address."""
    model = config.run.dir / "export" if cell.is_trained else config.student.path
    command = [*_program("tropd"), "eval", cell.config, *cell.overrides, "--model", str(model)]
    command += ["--prompts", cell.prompts, "--samples", str(cell.samples), "--out", str(folder / EVALUATION)]
    if servers is None:
        _run(cell, command, folder)
    else:
        reach = servers.holding(model, config)
        with_key = ["rollout.servers=[]", f"rollout.server.api_key_env={KEY_VARIABLE}"]
        with_key += [word for url in reach.urls for word in ("--url", url)]
        _run(cell, [*command, *with_key], folder, reach.environment)
    return command


def _overrides(reach: Reach) -> list[str]:
    """Overrides that name the running servers, and take back how they would be started."""
    found = [server.model_dump(mode="json") for server in reach.servers]
    if len(found) > 1:
        return [f"rollout.servers={json.dumps(found)}"]
    return ["rollout.servers=[]", *(override(f"rollout.server.{name}", found[0][name], {}) for name in CHANGED)]


def _program(name: str) -> list[str]:
    """The words that start `tropd` or `python` in this environment; another program starts as it is."""
    own = {"tropd": [sys.executable, "-m", "tropd_mcore.cli.main"], "python": [sys.executable]}
    return own.get(name, [name])


def _shown(command: Sequence[str]) -> str:
    """A command as a user types it."""
    for name in ("tropd", "python"):
        start = _program(name)
        if list(command[: len(start)]) == start:
            return shlex.join([name, *command[len(start) :]])
    return shlex.join(command)


def _run(cell: Cell, command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command, its output in `<run.dir>/study.log`, and show its last line as progress. Raises CellFailed."""
    path = folder / "study.log"
    with path.open("a", encoding="utf-8") as output, progress(log, f"{cell.name}: {_verb(command)}") as state:
        output.write(f"$ {_shown(command)}\n")
        output.flush()
        begin = output.tell()
        parent = os.getpid()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            preexec_fn=lambda: die_with_parent(parent),
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                state.advance(0, textwrap.shorten(_last_line(path, begin), SHOWN_OF_LINE, placeholder=" ..."))
        finally:
            if process.poll() is None:
                process.terminate()  # a job saves a checkpoint and ends
                process.wait()
    if process.returncode:
        what = f"{cell.name}: {_verb(command)} ended with exit code {process.returncode}"
        raise CellFailed(f"{what}: {_last_line(path, begin)} ({path})")


def _verb(command: Sequence[str]) -> str:
    words = _shown(command).split()
    return " ".join(words[: 2 if words[0] == "tropd" else 3])


def _last_line(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - 2000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _only_one(path: Path, refusal: str | None) -> Iterator[None]:
    """Hold the lock file `path`. If it is taken, raise CellFailed with `refusal`, or wait if that is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0 if refusal else -1)
    except filelock.Timeout as error:
        raise CellFailed(str(refusal)) from error
    try:
        yield
    finally:
        lock.release()


def _result(study: Study, cell: Cell, config: Config, commands: list[list[str]]) -> CellResult:
    folder = Path(cell.run_dir)
    evaluation = load_evaluation(folder / EVALUATION)
    run = read_run(folder, token_steps=0) if cell.is_trained else None
    commit, modified = _commit()
    again = ["tropd", "study", str(study.path), "--only", cell.name]
    return CellResult(
        cell=cell.name,
        group=cell.group,
        pair=cell.pair,
        objective=cell.objective,
        variant=cell.variant,
        seed=cell.seed,
        settings=list(cell.overrides),
        config=cell.config,
        commands=[*(_shown(command) for command in commands), shlex.join(again)],
        commit=commit,
        modified=modified,
        machine=_machine(config),
        finished=datetime.now(UTC).date().isoformat(),
        seconds=_seconds(run),
        counts=results.counts_of(run) if run else {},
        accuracy=results.accuracy_of(evaluation),
        hints=hints_of(run) if run else [],
        **(results.curves_of(run) if run else {"steps": 0}),
    )


def _seconds(run: RunRecords | None) -> float:
    return round(sum(value or 0.0 for value in run.series("time/step")), 1) if run else 0.0


def _commit() -> tuple[str, bool]:
    """The commit of the package's checkout and whether it has changes; ("", False) outside of a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], check=True, capture_output=True, text=True).stdout

    try:
        return git("rev-parse", "--short=10", "HEAD").strip(), bool(git("status", "--porcelain", "-uno", ".").strip())
    except (OSError, subprocess.CalledProcessError):
        return "", False


def _machine(config: Config) -> dict[str, str]:
    cpu = re.search(r"model name\s*:\s*(.+)", _text(Path("/proc/cpuinfo")))
    return {
        "platform": config.platform.kind,
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **installed_versions(),
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def describe(found: CellResult) -> str:
    """Return one line about a finished cell."""
    accuracy = found.accuracy
    sampled = f", sampled {accuracy.sampled:.1%}" if accuracy.sampled is not None else ""
    return f"{found.cell}: greedy {accuracy.greedy:.1%}{sampled}, {found.steps} steps"
