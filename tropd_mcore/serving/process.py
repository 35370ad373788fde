"""One SGLang server as a process of ours: started on loopback, waited for, watched, and stopped by its pid.

Not for talking to it (see `client`). Invariants: the server runs in a process group of its own that ends with us, even
when we are killed; a server that an earlier launch left behind is stopped before a new one starts, and only after its
pid and its start time both match the record; nothing is ever stopped by name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerError
from tropd_mcore.files import publish_text
from tropd_mcore.progress import progress
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.environment import server_environment

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
POLL_S = 0.25
STOP_GRACE_S = 2.0
"""A server holds nothing that is worth a longer wait; by itself it takes about 5 s."""
STOP_TIMEOUT_S = 30.0
SAME_START_S = 1.0
LOG_TAIL_BYTES = 65536

# the kernel's parent-death signal is tied to the starting thread, so one that lives as long as we do starts all servers
_STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-starter")

_EXCEPTION_LINE = re.compile(r"(\S+ )*?[\w.]*(Error|Exception)\b\s*:")


@dataclass(frozen=True)
class ServerSpec:
    """What to start and where to write about it."""

    key: str
    """Section of the configuration, for messages: `rollout.server` or `teacher.server`."""
    model_key: str
    """Key that names the model folder: `student.path` or `teacher.path`."""
    model_path: Path
    config: ServerConfig
    device: Literal["cpu", "cuda"]
    run_dir: Path
    """Gets `<name>.log` and `<name>.server.json`."""
    name: str
    dtype: Dtype = "bfloat16"
    """Of the model, for a `config` that names none."""
    tokenizer_path: Path | None = None
    """Tokenizer files to serve with; None = those of the model folder."""
    extra_env: Mapping[str, str] = field(default_factory=dict)
    cpu_threads: int = 1
    """Threads of each rank of a CPU server."""

    @property
    def log_path(self) -> Path:
        return self.run_dir / f"{self.name}.log"

    @property
    def record_path(self) -> Path:
        return self.run_dir / f"{self.name}.server.json"


class ServerProcess:
    """Starts and stops the server of one `ServerSpec`; a context manager that stops it at the end."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reserved: socket.socket | None = None
        self._log_start = 0

    @property
    def url(self) -> str:
        """Base URL; the port is known once started."""
        assert self.port is not None, "start() first"
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its process group."""
        assert self._process is not None, "start() first"
        return self._process.pid

    def client(self) -> SglangClient:
        """Return a client that knows when this process has ended."""
        return SglangClient(self.url, self.spec.config, key=self.spec.key, alive=self.alive)

    def start(self) -> None:
        """Stop a left-over server of this record, then start a new one; does not wait for it (see `wait_ready`).

        Raises ServerError where the model folder is missing or the configured port is taken.
        """
        assert not self.alive(), "already started"
        spec = self.spec
        if not (spec.model_path / "config.json").is_file():
            raise ServerError(f"{spec.model_key}={spec.model_path}: expected a model folder with a config.json there")
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        stop_left_over(spec.record_path)
        # a restart keeps the port that the OS chose, so that the URL stays
        self._reserved = _reserve_port(self.port or spec.config.port, key=f"{spec.key}.port")
        self.port = self._reserved.getsockname()[1]
        environment = server_environment(
            spec.device,
            tensor_parallel=spec.config.tensor_parallel,
            cpu_threads=spec.cpu_threads,
            extra=spec.extra_env,
        )
        with spec.log_path.open("ab") as log_file:
            self._log_start = log_file.tell()
            self._process = _STARTER.submit(
                subprocess.Popen,
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            ).result()
        record = {"pid": self.pid, "start_time": psutil.Process(self.pid).create_time(), "port": self.port}
        publish_text(spec.record_path, json.dumps(record) + "\n")
        log.info("%s: starting %s on %s (pid %d, log %s)", spec.key, spec.model_path, self.url, self.pid, spec.log_path)

    def command(self) -> list[str]:
        """Return the command line of the server."""
        spec, config = self.spec, self.spec.config
        command = [sys.executable, "-m", "tropd_mcore.serving.sglang_launch", "--parent-pid", str(os.getpid())]
        command += ["--model-path", str(spec.model_path), "--host", HOST, "--port", str(self.port)]
        if spec.tokenizer_path is not None:
            command += ["--tokenizer-path", str(spec.tokenizer_path)]
        command += ["--device", spec.device, "--dtype", config.dtype or spec.dtype]
        command += ["--tp-size", str(config.tensor_parallel)]
        if config.max_total_tokens is not None:
            command += ["--max-total-tokens", str(config.max_total_tokens)]
        if config.mem_fraction is not None:
            command += ["--mem-fraction-static", str(config.mem_fraction)]
        if spec.device == "cpu":
            # the default attention wants AMX; an idle scheduler spins on a whole core unless it sleeps
            command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--sleep-on-idle"]
        return [*command, *config.extra_args]

    def wait_ready(self) -> None:
        """Wait until the server generates. Raises ServerError where it dies or takes longer than start_timeout_s."""
        started = time.monotonic()
        client = self.client()
        limit = self.spec.config.start_timeout_s
        with progress(log, f"{self.spec.key}: starting, at most {limit:g} s (start_timeout_s; {self.spec.log_path})"):
            while not client.healthy():
                if not self.alive():
                    raise ServerError(self.describe_end())
                if time.monotonic() - started > limit:
                    self.stop()
                    raise ServerError(
                        f"{self.spec.key}: not ready after start_timeout_s={limit:g} s; "
                        f"last line: {self._last_log_line()!r}; log: {self.spec.log_path}"
                    )
                time.sleep(POLL_S)
        self._release_port()
        log.info("%s: ready on %s after %.1f s", self.spec.key, self.url, time.monotonic() - started)

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop the process group, gently and then not; harmless where it has ended already."""
        self._release_port()
        if self._process is None:
            return
        _stop_group(self._process.pid)
        self._process.wait()
        self._process = None
        self.spec.record_path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Stop what is left, start again on the same port and wait until ready."""
        self.stop()
        self.start()
        self.wait_ready()

    def describe_end(self) -> str:
        """Return how the process ended (exit code, last log line, log file), one line."""
        code = None if self._process is None else self._process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        how = "runs but does not answer" if self.alive() else how
        return f"{self.spec.key}: the server {how}; last line: {self._last_log_line()!r}; log: {self.spec.log_path}"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _last_log_line(self) -> str:
        """The last line since the start that names an exception, else the last line."""
        with self.spec.log_path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
        exceptions = [line for line in lines if _EXCEPTION_LINE.match(line)]
        return (exceptions or lines or [""])[-1][:300]

    def _release_port(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None


def stop_left_over(record_path: Path) -> bool:
    """Stop the server that `record_path` describes if it still runs; return whether one was stopped.

    A process counts as that server where both pid and start time match, so a reused pid is never touched.
    """
    try:
        record = json.loads(record_path.read_text())
        pid, start_time = int(record["pid"]), float(record["start_time"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s: not a server record (%s); ignored", record_path, error)
        return False
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - start_time) > SAME_START_S or os.getpgid(pid) != pid:
            return False
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    log.warning("stopping the server with pid %d that an earlier launch left behind (%s)", pid, record_path)
    _stop_group(pid)
    record_path.unlink(missing_ok=True)
    return True


def _stop_group(group: int) -> None:
    """SIGTERM to the leader, at most STOP_GRACE_S to wind up, then SIGKILL to the whole group that was made for it.

    Its children get no SIGTERM: SGLang takes a child that ends by itself for a crash and waits to diagnose it.
    """
    members = _group_members(group)
    try:
        os.kill(group, signal.SIGTERM)
        psutil.wait_procs(members, timeout=STOP_GRACE_S)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    psutil.wait_procs(members, timeout=STOP_TIMEOUT_S)


def _group_members(group: int) -> list[psutil.Process]:
    try:
        leader = psutil.Process(group)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _reserve_port(port: int | None, *, key: str) -> socket.socket:
    """Bind a port without listening on it: the OS gives it to nobody else, and a server may still listen on it."""
    if port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                probe.listen()
            except OSError as error:
                raise ServerError(
                    f"{key}={port} is taken ({error.strerror}); stop what listens there, or leave it out so that "
                    "the OS chooses a free port"
                ) from error
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((HOST, port or 0))
    return reserved
