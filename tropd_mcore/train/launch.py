"""The launcher of one node: starts its ranks by torch's elastic agent, passes signals on, and says how they ended.

Not for the command line (`cli.train_command`) or for the meeting of the nodes (`rendezvous`). Invariants: when it
returns, no process that it or its ranks started is left; a failure is told in one line, by the rank that met it or
here, and never by torch; nothing of a run is lost by any signal (`docs/launch.md`).
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
import time
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
from tropd_mcore.train.exits import BUG, BYSTANDER, EXPLAINED, INTERRUPTED, STOPPED
from tropd_mcore.train.rendezvous import NodesMeet, Place
from tropd_mcore.train.stopped_ranks import StoppedRanks

log = logging.getLogger(__name__)

MONITOR_INTERVAL_S = 0.1
STORE_INTERVAL_S = 2.0
"""Between two looks at what other nodes say."""
LINGER_S = 1.5 * STORE_INTERVAL_S
GONE_LIMIT_S = 10.0
"""Longest wait for killed processes to be gone."""
FAILURE_KEY = "failure"
"""In the store: the line of the failure that ended a node."""
STOP_KEY = "stop"
"""In the store: the signal that asked a node to stop."""


@dataclass(frozen=True)
class Job:
    """What is launched on this node."""

    place: Place
    arguments: tuple[str, ...]
    """Of `python -m tropd_mcore.train`, on every rank."""
    run_dir: Path
    steps: int
    rank_timeout_s: float


def launch(job: Job) -> int:
    """Run the ranks of this node to their end; returns the exit code of `tropd train`. Only from the main thread."""
    return _Launcher(job).run()


class _Launcher:
    """What the main thread, which runs the agent, and the thread of the signals share."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.meeting = NodesMeet(job.place)
        self.stop: str | None = None
        """The signal that asked to stop."""
        self.started = False
        """Whether ranks were started."""
        self.failed = False
        """Whether a failure was told to the other nodes."""
        self.interrupted = False
        """Whether the thread of the signals is ending the process."""
        self.word = threading.Lock()
        """Taken for good by the thread that says how the job ended."""

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
        except SignalException as error:
            code = 128 + error.sigval
            self.say_once(f"interrupted {where(self.job)}; the same command resumes")
        except TropdError as error:
            code = EXPLAINED
            self.say_once(f"error: {error}")
        except DistError as error:
            code = EXPLAINED
            reason = str(error).partition("\n")[0][:200]
            self.say_once(f"error: the launcher of node 0 at {self.job.place.address} has ended ({reason})")
        finally:
            kill_family()
        self._linger()
        if self.interrupted:
            threading.Event().wait()  # the other thread ends the process
        return code

    def _linger(self) -> None:
        """On the first node, keep the store until the others have read why this one ended."""
        place = self.job.place
        if place.nodes > 1 and place.node_rank == 0 and self.started and (self.failed or self.stop is not None):
            time.sleep(LINGER_S)

    def say_once(self, line: str) -> None:
        """Say how the job ended, unless that has been said."""
        if self.word.acquire(blocking=False):
            signals.say(line)

    def hear(self, number: signal.Signals) -> None:
        """Act on a signal, in the thread of `signals`."""
        if number != signal.SIGINT:
            self.ask_to_stop(number.name)
            return
        self.interrupted = True
        family = psutil.Process().children(recursive=True)
        # said before the ranks go: else the main thread, which sees them go, might give it another name
        self.say_once(f"interrupted {where(self.job)}; the same command resumes")
        for process in psutil.Process().children():
            _kill_group(process.pid)
        self.publish(f"node {self.job.place.node_rank} ({socket.gethostname()}) was interrupted", limit_s=1.0)
        _reap(family)
        signals.end(INTERRUPTED)

    def ask_to_stop(self, reason: str) -> None:
        """Let all ranks of the job end at their next safe point; the main thread passes it on to ours."""
        if self.stop is not None:
            return
        self.stop = reason
        if not self.started:
            self.interrupted = True
            self.say_once(f"stopped by {reason} before the ranks started; the same command starts again")
            signals.end(0)

    def publish(self, line: str, *, limit_s: float = GONE_LIMIT_S) -> None:
        """Tell the other nodes why this one ended."""
        self.failed = True
        store = self.meeting.store
        if store is None or self.job.place.nodes == 1:
            return

        def write() -> None:
            with contextlib.suppress(RuntimeError):  # the first node is gone: the others see that themselves
                store.compare_set(FAILURE_KEY, "", line)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(limit_s)

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
    """torch's agent, which ends all ranks at once where one failed or another node ended, and knows whose fault it is.

    Without that a rank that waits for a dead one gets SIGTERM, which ours take for a request to save, and 30 s.
    """

    def __init__(self, spec: WorkerSpec, launcher: _Launcher) -> None:
        super().__init__(spec, logs_specs=_Console(), start_method="spawn")
        self.code = BUG
        """Exit code of the launcher, once a rank failed."""
        self._launcher = launcher
        self._passed_on = False
        self._stopped = StoppedRanks(launcher.job.rank_timeout_s, signals.say)
        self._other_nodes: threading.Thread | None = None
        self._line: str | None = None
        """Why another node ended."""

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
        elif (line := self._elsewhere()) is not None:
            self.code = EXPLAINED
            self._launcher.say_once(f"error: {line}")
            _end_ranks(ranks)
        return super()._monitor_workers(worker_group)

    def _pass_on(self, ranks: list[subprocess.Popen[bytes]]) -> None:
        """Ask our ranks to stop, and through the store the other nodes; once."""
        launcher, self._passed_on = self._launcher, True
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        if launcher.job.place.nodes > 1 and launcher.meeting.store is not None:
            with contextlib.suppress(RuntimeError):
                launcher.meeting.store.set(STOP_KEY, str(launcher.stop))

    def _end_stopped(self, rank: int, why: str, ranks: dict[int, subprocess.Popen[bytes]]) -> None:
        """End the job because of a rank that does not even get as far as the watch of the ranks."""
        self.code = EXPLAINED
        line = f"{_who(rank, ranks[rank].pid)} {why}; the same command resumes"
        self._launcher.say_once(f"error: {line}")
        self._launcher.publish(line)
        _end_ranks(ranks)

    def _tell(self, failed: dict[int, subprocess.Popen[bytes]], *, alone: bool) -> None:
        """Say what no rank could say itself; tell the other nodes."""
        launcher = self._launcher
        if launcher.interrupted:
            return
        rank = min(failed, key=lambda rank: _blame(failed[rank].returncode))
        code, pid = failed[rank].returncode, failed[rank].pid
        if launcher.stop is not None and code in (STOPPED, -signal.SIGTERM):
            self.code = 0
            launcher.say_once(f"stopped by {launcher.stop} {where(launcher.job)}; the same command resumes")
            return
        who = _who(rank, pid)
        rest = "" if alone else "; the others were stopped"
        line = f"{who} ended with exit code {code}, see above{rest}"
        if code < 0:
            hint = " (out of memory? see dmesg)" if code == -signal.SIGKILL else ""
            line = f"{who} was killed by signal {-code}{hint}{rest}; the same command resumes"
        self.code = code if code in (EXPLAINED, INTERRUPTED) else BUG
        if code not in (EXPLAINED, BYSTANDER, INTERRUPTED):
            launcher.say_once(f"error: {line}")
        launcher.publish(line)

    def _elsewhere(self) -> str | None:
        """Why another node ended; None while all go on."""
        if self._other_nodes is None and self._launcher.job.place.nodes > 1:
            self._other_nodes = threading.Thread(target=self._listen, name="other nodes", daemon=True)
            self._other_nodes.start()
        return self._line

    def _listen(self) -> None:
        """Look at what other nodes say, and take over a stop that one of them was asked for.

        In a thread: a store whose process is stopped answers nothing, whatever time limit it was given.
        """
        launcher = self._launcher
        place, store = launcher.job.place, launcher.meeting.store
        me = f"node {place.node_rank} was stopped"
        while store is not None and self._line is None:
            try:
                if launcher.stop is None and store.check([STOP_KEY]):
                    launcher.ask_to_stop(store.get(STOP_KEY).decode())
                if store.check([FAILURE_KEY]):
                    self._line = f"{me} because of another one: {store.get(FAILURE_KEY).decode()}"
            except RuntimeError:
                self._line = f"{me}: the launcher of node 0 at {place.address} has ended"
            time.sleep(STORE_INTERVAL_S)


class _Console(LogsSpecs):
    """Ranks write where the launcher does; no files, and no folder in /tmp that nobody removes."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=console, error_files=dict.fromkeys(envs, os.devnull))

    @property
    def root_log_dir(self) -> str:
        return os.devnull


def _who(rank: int, pid: int) -> str:
    """A rank of this machine as a message names it."""
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
    """End every process below this one, and wait until they are gone."""
    _reap(psutil.Process().children(recursive=True))


def _end_ranks(ranks: dict[int, subprocess.Popen[bytes]]) -> None:
    """SIGKILL to ranks that run, which a stopped one gets as well; they hold nothing that a resume needs."""
    family = psutil.Process().children(recursive=True)
    for process in ranks.values():
        if process.poll() is None:
            _kill_group(process.pid)
    for process in ranks.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GONE_LIMIT_S)
    _reap(family)


def _kill_group(pid: int) -> None:
    """SIGKILL to a rank and to what shares its process group; the agent gives each rank a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _reap(family: list[psutil.Process]) -> None:
    """Wait for processes to go, as servers do with their rank, and end those that do not."""
    _, alive = psutil.wait_procs(family, timeout=GONE_LIMIT_S / 4)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GONE_LIMIT_S)


def _blame(code: int) -> int:
    """Order of failures that are seen together: what explains itself, then signals and bugs, then who only followed."""
    if code in (EXPLAINED, INTERRUPTED):
        return 0
    return 2 if code in (BYSTANDER, STOPPED) else 1


def _rank_environment(ranks: int) -> dict[str, str]:
    """What ranks get unless the user has set it."""
    values = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # lines about connections that end with a rank
    if ranks > 1:
        values["OMP_NUM_THREADS"] = "1"  # as torchrun does
    return values


def _quiet() -> None:
    """torch's own lines about ranks that end follow no message of ours."""
    elastic = logging.getLogger("torch.distributed.elastic")  # each of its modules sets a level of its own
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
