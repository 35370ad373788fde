"""The launcher of one node: starts its ranks with torch's elastic agent, forwards signals, and reports how they ended.

This module does not parse the command line (`cli.train_command`) or connect the nodes (`rendezvous`). Invariants: when
it returns, no process that it or its ranks started is left. A failure is reported in one line, by the rank on which it
happened or by the launcher, never by torch. No signal loses anything that a resume needs (`docs/launch.md`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException, SubprocessContext

from tropd_mcore import signals
from tropd_mcore.errors import TropdError
from tropd_mcore.train.exits import BUG, BYSTANDER, EXPLAINED, INTERRUPTED, LOST, STOPPED
from tropd_mcore.train.other_nodes import TELL_LIMIT_S, Cause, OtherNodes
from tropd_mcore.train.rendezvous import LaunchError, NodesMeet, Place
from tropd_mcore.train.stopped_ranks import StoppedRanks

log = logging.getLogger(__name__)

MONITOR_INTERVAL_S = 0.1
GONE_LIMIT_S = 10.0
"""Longest wait until killed processes are gone."""
MAY_FOLLOW = (BYSTANDER, -signal.SIGABRT)
"""Ends of a rank that the loss of another node may explain. NCCL aborts a process whose connection is lost."""


@dataclass(frozen=True)
class Job:
    """What to launch on this node."""

    place: Place
    arguments: tuple[str, ...]
    """Arguments of `python -m tropd_mcore.train` on every rank."""
    run_dir: Path
    steps: int
    rank_timeout_s: float
    join_timeout_s: float
    """Longest wait for the launchers of the other nodes."""
    node_timeout_s: float
    stopped_code: int = 0
    """Exit code if a signal stopped the run."""


def launch(job: Job) -> int:
    """Run the ranks of this node to their end; returns the exit code of `tropd train`. Call it from the main thread."""
    return _Launcher(job).run()


class _Launcher:
    """State shared by the main thread, which runs the agent, and the signal thread."""

    def __init__(self, job: Job) -> None:
        self.job = job
        place = job.place
        self.others = OtherNodes(place.node_rank, place.nodes, job.node_timeout_s, self.ask_to_stop)
        self.meeting = NodesMeet(place, self.others, limit_s=job.join_timeout_s)
        self.stop: str | None = None
        """The signal that asked to stop."""
        self.started = False
        """Whether ranks were started."""
        self.failed = False
        """Whether a failure was reported to the other nodes."""
        self.interrupted = False
        """Whether the signal thread is ending the process."""
        self.word = threading.Lock()
        """Taken, and never released, by the thread that reports how the job ended."""

    def run(self) -> int:
        _quiet()
        os.environ[signals.LAUNCHER_VARIABLE] = str(os.getpid())
        for name, value in _rank_environment(self.job.place.ranks).items():
            os.environ.setdefault(name, value)
        signals.listen((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self.hear)
        agent = _Agent(self._spec(), self)
        code = 0
        try:
            result = agent.run()
            code = agent.code if result.is_failed() else 0
            if code == 0 and (self.stop is not None or self.others.asked_to_stop()):
                code = self.job.stopped_code
        except SignalException as error:
            code = 128 + error.sigval
            self.say_once(f"interrupted {where(self.job)}; the same command resumes")
        except TropdError as error:
            code = error.code if isinstance(error, LaunchError) else EXPLAINED
            self.say_once(f"error: {error}")
        except DistError as error:
            code = LOST
            reason = str(error).partition("\n")[0][:200]
            self.say_once(f"error: the launcher of node 0 at {self.job.place.address} has ended ({reason})")
        finally:
            kill_family()
        self.others.leave(linger=self.started and (self.failed or self.stop is not None))
        if self.interrupted:
            threading.Event().wait()  # the signal thread ends the process
        return code

    def say_once(self, line: str) -> None:
        """Report how the job ended, unless that was already reported."""
        if self.word.acquire(blocking=False):
            signals.say(line)

    def hear(self, number: signal.Signals) -> None:
        """React to a signal, in the thread of `signals`."""
        if number != signal.SIGINT:
            self.ask_to_stop(number.name)
            return
        self.interrupted = True
        family = psutil.Process().children(recursive=True)
        # Report before the ranks end. Otherwise the main thread sees them end and might report another cause.
        self.say_once(f"interrupted {where(self.job)}; the same command resumes")
        for process in psutil.Process().children():
            _kill_group(process.pid)
        line = f"node {self.job.place.node_rank} ({socket.gethostname()}) was interrupted"
        self.publish(line, INTERRUPTED, limit_s=1.0)
        _reap(family)
        signals.end(INTERRUPTED)

    def ask_to_stop(self, reason: str) -> None:
        """Ask all ranks of the job to end at their next safe point. The main thread tells this node's ranks."""
        if self.stop is not None:
            return
        self.stop = reason
        if not self.started:
            self.interrupted = True
            self.say_once(f"stopped by {reason} before the ranks started; the same command starts again")
            signals.end(self.job.stopped_code)

    def publish(self, line: str, code: int, *, limit_s: float = TELL_LIMIT_S) -> None:
        """Tell the other nodes why this node ended, and the exit code of the job."""
        self.failed = True
        self.others.tell(Cause(line, code), limit_s=limit_s)

    def _spec(self) -> WorkerSpec:
        return WorkerSpec(
            role="rank",
            local_world_size=self.job.place.ranks,
            entrypoint=sys.executable,
            args=("-u", "-m", "tropd_mcore.train", *self.job.arguments),
            rdzv_handler=self.meeting,
            max_restarts=0,
            monitor_interval=MONITOR_INTERVAL_S,
        )


class _Agent(LocalElasticAgent):
    """torch's agent, changed to end all ranks at once if a rank failed or another node ended, and to find the cause.

    torch's own agent sends SIGTERM to a rank that waits for a dead rank and gives it 30 s, but ranks of this project
    treat SIGTERM as a request to save.
    """

    def __init__(self, spec: WorkerSpec, launcher: _Launcher) -> None:
        super().__init__(spec, logs_specs=_Console(), start_method="spawn")
        self.code = BUG
        """Exit code of the launcher if a rank failed."""
        self._launcher = launcher
        self._passed_on = False
        self._stopped = StoppedRanks(launcher.job.rank_timeout_s, signals.say)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._launcher.started = True
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert isinstance(self._pcontext, SubprocessContext)
        ranks = {
            worker_group.workers[local].global_rank: handler.proc
            for local, handler in self._pcontext.subprocess_handlers.items()
        }
        failed = {rank: process for rank, process in ranks.items() if process.poll() not in (None, 0)}
        if failed:
            self._tell(failed, alone=len(ranks) == 1 and self._launcher.job.place.nodes == 1)
            _end_ranks(ranks)
        elif self._launcher.stop is not None and not self._passed_on:
            self._pass_on(list(ranks.values()))
        elif (stopped := self._stopped.look({rank: process.pid for rank, process in ranks.items()})) is not None:
            self._end_stopped(*stopped, ranks)
        elif (cause := self._launcher.others.look()) is not None:
            self._end_because_of(cause)
            _end_ranks(ranks)
        return super()._monitor_workers(worker_group)

    def _pass_on(self, ranks: list[subprocess.Popen[bytes]]) -> None:
        """Ask this node's ranks to stop and, through the store, the other nodes. Called once."""
        launcher, self._passed_on = self._launcher, True
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        launcher.others.ask_others_to_stop(str(launcher.stop))

    def _end_because_of(self, cause: Cause) -> None:
        """Report why another node ends the job. The first node also tells the others, which cannot see each other."""
        self.code = cause.code
        self._launcher.say_once(f"error: {cause.line}")
        if self._launcher.job.place.node_rank == 0:
            self._launcher.publish(cause.line, cause.code)

    def _end_stopped(self, rank: int, why: str, ranks: dict[int, subprocess.Popen[bytes]]) -> None:
        """End the job because of a stopped rank that the ranks' own watch did not report."""
        self.code = LOST
        line = f"{_who(rank, ranks[rank].pid)} {why}; the same command resumes"
        self._launcher.say_once(f"error: {line}")
        self._launcher.publish(line, self.code)
        _end_ranks(ranks)

    def _tell(self, failed: dict[int, subprocess.Popen[bytes]], *, alone: bool) -> None:
        """Report failures that no rank could report itself, and tell the other nodes."""
        launcher = self._launcher
        if launcher.interrupted:
            return
        rank = min(failed, key=lambda rank: _blame(failed[rank].returncode))
        code, pid = failed[rank].returncode, failed[rank].pid
        if launcher.stop is not None and code in (STOPPED, -signal.SIGTERM):
            self.code = 0
            launcher.say_once(f"stopped by {launcher.stop} {where(launcher.job)}; the same command resumes")
            return
        cause = launcher.others.await_cause() if code in MAY_FOLLOW else None
        if cause is not None:
            self._end_because_of(cause)
            return
        who = _who(rank, pid)
        rest = "" if alone else "; the others were stopped"
        line = f"{who} ended with exit code {code}, see above{rest}"
        if code < 0:
            hint = " (out of memory? see dmesg)" if code == -signal.SIGKILL else ""
            line = f"{who} was killed by signal {-code}{hint}{rest}; the same command resumes"
        self.code = code if code in (EXPLAINED, LOST, INTERRUPTED) else BUG
        if code not in (EXPLAINED, LOST, BYSTANDER, INTERRUPTED):
            launcher.say_once(f"error: {line}")
        launcher.publish(line, self.code)


class _Console(LogsSpecs):
    """Lets ranks write to the launcher's output. It creates no files and leaves no folder in /tmp."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=console, error_files=dict.fromkeys(envs, os.devnull))

    @property
    def root_log_dir(self) -> str:
        return os.devnull


def _who(rank: int, pid: int) -> str:
    """Return the name of a rank of this machine for a message."""
    return f"rank {rank} (pid {pid} on {socket.gethostname()})"


def where(job: Job) -> str:
    """Return how far the run is, for a message: `at step 12 of 200`."""
    try:
        with (job.run_dir / "metrics.jsonl").open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65536))
            line = stream.read().rstrip(b"\n").rpartition(b"\n")[2]
        done = int(json.loads(line)["step"]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return "before the first step was done"
    return f"at step {min(done, job.steps)} of {job.steps}"


def kill_family() -> None:
    """End every descendant of this process, and wait until they are gone."""
    _reap(psutil.Process().children(recursive=True))


def _end_ranks(ranks: dict[int, subprocess.Popen[bytes]]) -> None:
    """Send SIGKILL to the running ranks, which also ends a stopped one. They hold nothing that a resume needs."""
    family = psutil.Process().children(recursive=True)
    for process in ranks.values():
        if process.poll() is None:
            _kill_group(process.pid)
    for process in ranks.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GONE_LIMIT_S)
    _reap(family)


def _kill_group(pid: int) -> None:
    """Send SIGKILL to a rank and to all of its process group. The agent gives each rank a separate group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _reap(family: list[psutil.Process]) -> None:
    """Wait for processes to end, as servers do after their rank, and kill those that do not."""
    _, alive = psutil.wait_procs(family, timeout=GONE_LIMIT_S / 4)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GONE_LIMIT_S)


def _blame(code: int) -> int:
    """Order failures that are seen together: explained errors, then signals and bugs, then ranks that only followed."""
    if code in (EXPLAINED, LOST, INTERRUPTED):
        return 0
    return 2 if code in (BYSTANDER, STOPPED) else 1


def _rank_environment(ranks: int) -> dict[str, str]:
    """Return environment variables that ranks get unless the user has set them."""
    values = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # hides lines about connections that end with a rank
    if ranks > 1:
        values["OMP_NUM_THREADS"] = "1"  # as torchrun does
    return values


def _quiet() -> None:
    """Silence torch's own lines about ranks that end; this launcher reports them."""
    elastic = logging.getLogger("torch.distributed.elastic")  # a level here would not help: each module sets its own
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # this launcher handles the others
