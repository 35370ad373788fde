"""Starts one SGLang server as a child process on the loopback interface, waits for it, watches it and stops it by pid.

This module does not send requests to it (see `client`) and does not deal with servers of earlier launches (see
`record`). Invariants: the server runs in its own process group, which ends with us, even if we are killed. It accepts
requests only with a random key, which exists only in its environment and in our memory. Processes are never stopped by
name.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tropd_mcore import stopping
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.config.server_checks import gpus_of
from tropd_mcore.errors import ServerError
from tropd_mcore.files import writing
from tropd_mcore.foreign_text import one_line
from tropd_mcore.progress import progress
from tropd_mcore.serving import sglang_launch
from tropd_mcore.serving.client import HEALTH_TIMEOUT_S, SglangClient
from tropd_mcore.serving.environment import Place, named_gpus, server_environment, threads_per_rank
from tropd_mcore.serving.interpreter import ask
from tropd_mcore.serving.left_behind import make_folder, note_process, remove_left_over, remove_of
from tropd_mcore.serving.log_file import ServerLog
from tropd_mcore.serving.record import (
    group_members,
    how_it_ended,
    make_record,
    stop_group,
    stop_left_over,
    stopped_member,
)

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
POLL_S = 0.25
FLOAT32_LOGITS = "--enable-fp32-lm-head"
"""Argument with which SGLang keeps the logits of a bfloat16 model in float32. On a GPU it copies no weight for that."""
ENOUGH = 0.95
"""Least share of the asked KV cache that counts as reached. SGLang rounds down to whole pages."""
SHOWN_OF_LINE = 100
"""Characters of the server's last log line that the progress line shows while the server starts."""

# the kernel's parent-death signal is tied to the starting thread, so one thread with our lifetime starts all servers
STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-starter")

_EXCEPTION_LINE = re.compile(r"(\S+ )*?[\w.]*(Error|Exception)\b\s*:")


@dataclass(frozen=True)
class ServerSpec:
    """Which server to start, and where its log and record go."""

    key: str
    """Configuration section of the server, for messages: `rollout.server` or `teacher.server`."""
    model_key: str
    """Configuration key of the model folder: `student.path` or `teacher.path`."""
    model_path: Path
    config: ServerConfig
    device: Literal["cpu", "cuda"]
    run_dir: Path
    """Folder for `<name>.log` and `<name>.server.json`."""
    name: str
    dtype: Dtype = "bfloat16"
    """Dtype of the model if `config` sets none."""
    title: str | None = None
    """Prefix of messages about the server; None = `key`."""
    tokenizer_path: Path | None = None
    """Folder of the tokenizer to serve with; None = the model folder."""
    extra_env: Mapping[str, str] = field(default_factory=dict)
    host: str = LOOPBACK
    """Address of this machine on which the server listens; any other than loopback can be reached from outside."""
    api_key: str | None = field(default=None, repr=False)
    """Key that the server asks for; None = a random one of its own. Servers behind a router share one."""
    longest: int | None = None
    """Tokens of the longest request to expect, to tell how many of them the KV cache holds; None = do not tell."""

    @property
    def called(self) -> str:
        return self.title or self.key

    @property
    def log_path(self) -> Path:
        return self.run_dir / f"{self.name}.log"

    @property
    def record_path(self) -> Path:
        return self.run_dir / f"{self.name}.server.json"


class ServerProcess:
    """Starts and stops the server of one `ServerSpec`. As a context manager, it stops the server on exit."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reserved: socket.socket | None = None
        self._log = ServerLog(spec.log_path, int(spec.config.log_max_mib * 2**20))
        self._api_key = spec.api_key or secrets.token_urlsafe(32)
        self._ready = False
        self._started = 0.0
        """Time of the last start"""
        """Whether the server has answered since its last start"""
        self._folder: Path | None = None
        """Temporary folder of the server, removed when the server is stopped"""

    @property
    def url(self) -> str:
        """Base URL; available after `start`."""
        assert self.port is not None, "start() first"
        host = self.spec.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id; also the id of its process group."""
        assert self._process is not None, "start() first"
        return self._process.pid

    @property
    def api_key(self) -> str:
        """The key that the server asks for. It goes to a client or into the environment of a process, never a log."""
        return self._api_key

    def client(self) -> SglangClient:
        """Return a client that uses the server's key and sees whether this process has ended or is stopped."""
        return SglangClient(
            self.url,
            self.spec.config,
            key=self.spec.key,
            name=self.spec.called,
            alive=self.alive,
            stopped=self.stopped,
            api_key=self._api_key,
        )

    def start(self) -> None:
        """Start a server without waiting for it (see `wait_ready`). A left-over server of this record is stopped first.

        Raises ServerError if the model folder is missing, the configured interpreter is unusable, the configured port
        is taken, or another live process uses the server of this record.
        """
        assert not self.alive(), "already started"
        spec = self.spec
        if not (spec.model_path / "config.json").is_file():
            raise ServerError(f"{spec.model_key}={spec.model_path}: expected a model folder with a config.json there")
        if spec.config.python is not None:
            ask(spec.config.python, key=f"{spec.key}.python")
        with writing(spec.log_path):
            spec.run_dir.mkdir(parents=True, exist_ok=True)
        stop_left_over(spec.record_path, key=spec.called)
        # a restart keeps the port that the OS chose, so the URL does not change
        self._reserved = reserve_port(spec.host, self.port or spec.config.port, key=f"{spec.key}.port")
        port = self.port = self._reserved.getsockname()[1]
        remove_left_over()
        self._folder = make_folder()
        environment = server_environment(
            Place(
                device=spec.device,
                port=port,
                folder=self._folder,
                api_key=self._api_key,
                tensor_parallel=spec.config.tensor_parallel,
                threads=spec.config.threads or threads_per_rank(spec.device, spec.config.tensor_parallel),
                extra_args=spec.config.extra_args,
                python=spec.config.python,
                visible_gpus=named_gpus(spec.config.gpus, key=f"{spec.key}.gpus"),
                sized_in_tokens=spec.config.max_total_tokens is not None,
            ),
            spec.extra_env,
        )
        with writing(spec.log_path):
            log_file = self._log.open()
        with log_file:
            self._process = STARTER.submit(
                subprocess.Popen,
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            ).result()
        self._started = time.monotonic()
        note_process(self.pid)
        make_record(self.pid, port).save(spec.record_path)
        log.info(
            "%s: starting %s on %s (pid %d, log %s)", spec.called, spec.model_path, self.url, self.pid, spec.log_path
        )

    def command(self) -> list[str]:
        """Return the command line of the server."""
        spec, config = self.spec, self.spec.config
        # by path, because another interpreter cannot import this package; -P keeps our folder off its import path
        command = [str((config.python or Path(sys.executable)).absolute()), "-P", sglang_launch.__file__]
        command += ["--parent-pid", str(os.getpid())]
        command += ["--model-path", str(spec.model_path), "--host", spec.host, "--port", str(self.port)]
        if spec.tokenizer_path is not None:
            command += ["--tokenizer-path", str(spec.tokenizer_path)]
        command += ["--device", spec.device, "--dtype", config.dtype or spec.dtype]
        command += ["--tp-size", str(config.tensor_parallel)]
        if config.max_total_tokens is not None:
            command += ["--max-total-tokens", str(config.max_total_tokens)]
        if config.mem_fraction is not None:
            command += ["--mem-fraction-static", str(config.mem_fraction)]
        if spec.device == "cpu":
            # the default attention backend needs AMX; without --sleep-on-idle an idle scheduler keeps a core busy
            command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--sleep-on-idle"]
        else:
            command += [FLOAT32_LOGITS, *(["--enable-memory-saver"] if config.release_memory else [])]
        return [*command, *config.extra_args]

    def wait_ready(self) -> None:
        """Wait until the server can generate, then log the size of its KV cache. It waits once per start.

        Raises ServerError if it dies or needs longer than start_timeout_s; StopRequested.
        """
        if self._ready and self.alive():
            return
        started = time.monotonic()
        client = self.client()
        called, limit = self.spec.called, self.spec.config.start_timeout_s
        what = f"{called}: starting, at most {limit:g} s (start_timeout_s; {self.spec.log_path})"
        with progress(log, what) as state:
            while not client.healthy(min(HEALTH_TIMEOUT_S, max(1.0, limit - (time.monotonic() - started)))):
                stopping.check()
                note_process(self.pid)
                state.advance(0, f"last line: {self._last_log_line()[:SHOWN_OF_LINE]}")
                if not self.alive():
                    raise ServerError(self.describe_end())
                if time.monotonic() - started > limit:
                    end = self._last_words()
                    self.stop()
                    raise ServerError(f"{called}: not ready after {self.spec.key}.start_timeout_s={limit:g} s; {end}")
                time.sleep(POLL_S)
        self._note_ready(client)
        log.info("%s: ready on %s after %.1f s", called, self.url, time.monotonic() - self._started)

    def is_ready(self) -> bool:
        """Return whether the server can generate, without waiting for it. False if it has ended."""
        if not self.alive():
            return False
        client = self.client()
        if not self._ready and client.healthy(HEALTH_TIMEOUT_S):
            self._note_ready(client)
            log.info("%s: ready on %s", self.spec.called, self.url)
        return self._ready

    def _note_ready(self, client: SglangClient) -> None:
        self._release_port()
        note_process(self.pid)
        self._ready = True
        self._tell_cache(client)

    def _tell_cache(self, client: SglangClient) -> None:
        """Log how many requests of the longest kind the KV cache holds, and warn if it is smaller than asked for."""
        if self.spec.longest is None or (tokens := client.info().cache_tokens) is None:
            return
        config, key = self.spec.config, self.spec.key
        log.info(
            "%s: its KV cache has %s tokens; %d requests (max_concurrency) of at most %s tokens need %s, so %s fit at "
            "once if all are that long",
            self.spec.called,
            f"{tokens:,}",
            config.max_concurrency,
            f"{self.spec.longest:,}",
            f"{config.max_concurrency * self.spec.longest:,}",
            min(tokens // self.spec.longest, config.max_concurrency),
        )
        if config.max_total_tokens is not None and tokens < ENOUGH * config.max_total_tokens:
            log.warning(
                "%s: the KV cache is smaller than %s.max_total_tokens=%d: too little memory is free; lower it, or free "
                "memory of %s",
                self.spec.called,
                key,
                config.max_total_tokens,
                "this machine" if self.spec.device == "cpu" else f"GPU {', '.join(map(str, gpus_of(config)))}",
            )

    def alive(self) -> bool:
        """Return whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def stopped(self) -> str | None:
        """Return a phrase that names the stopped (SIGSTOP) process of the server; None if none is stopped."""
        return stopped_member(self.pid) if self.alive() else None

    def stop(self) -> None:
        """Stop the process group: SIGTERM first, then SIGKILL. Harmless if it has already ended."""
        self._ready = False
        self._release_port()
        self._log.close()
        if self._process is None:
            # a start that failed half-way may have made the folder
            remove_of((), self._folder)
            self._folder = None
            return
        note_process(self.pid)
        members = {member.pid for member in group_members(self.pid)}
        stop_group(self.pid)
        self._process.wait()
        remove_of({*members, self.pid}, self._folder)
        self._process = self._folder = None
        self.spec.record_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """Kill all processes of the server at once. `stop` or `restart` has to follow."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def restart(self) -> None:
        """Stop what is left of the server, start it again on the same port and wait until it is ready."""
        self.stop()
        self.start()
        self.wait_ready()

    def describe_end(self) -> str:
        """Return one line about how the process ended: exit code, last log line, log file."""
        how = how_it_ended(self._process, self.stopped())
        return f"{self.spec.called}: the server {how}; {self._last_words()}"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _last_words(self) -> str:
        return f"last line: {self._last_log_line()!r}; log: {self.spec.log_path}"

    def _last_log_line(self) -> str:
        """The last log line since the start that names an exception, otherwise the last line."""
        lines = self._log.tail()
        exceptions = [line for line in lines if _EXCEPTION_LINE.match(line)]
        return one_line((exceptions or lines or [""])[-1])

    def _release_port(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None


def reserve_port(host: str, port: int | None, *, key: str) -> socket.socket:
    """Bind a port without listening on it: the OS gives it to nobody else, but the server can still listen on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if port is not None:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen()
            except OSError as error:
                raise ServerError(
                    f"{key}={port} is taken ({error.strerror}); stop what listens there, or leave it out so that "
                    "the OS chooses a free port"
                ) from error
    reserved = socket.socket(family)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, port or 0))
    return reserved
