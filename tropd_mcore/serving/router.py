"""Starts SGLang's router (the package smg) before a fleet of servers, watches it and stops it by pid.

The router takes requests for samples and gives each to one of its workers. This module sends none of them (see
`router_lane`). A router at a url is used without starting it. Invariants: a started router listens on the loopback
interface only, runs in its own process group and ends with us, even if we are killed. It accepts requests and changes
only with a key, which exists in its environment and in our memory. It passes the caller's key on to its workers, so
this key is theirs, too.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tropd_mcore import stopping
from tropd_mcore.config.router_section import RouterConfig
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.files import writing
from tropd_mcore.foreign_text import one_line
from tropd_mcore.progress import progress
from tropd_mcore.serving import router_launch
from tropd_mcore.serving.environment import read_api_key, router_environment
from tropd_mcore.serving.interpreter import ask_router
from tropd_mcore.serving.log_file import ServerLog
from tropd_mcore.serving.process import LOOPBACK, POLL_S, STARTER, reserve_port
from tropd_mcore.serving.record import how_it_ended, make_record, stop_group, stop_left_over, stopped_member
from tropd_mcore.serving.router_workers import ASK_S, RouterWorkers
from tropd_mcore.serving.started import Started
from tropd_mcore.serving.transport import Endpoint, Transport

log = logging.getLogger(__name__)

KEY = "rollout.router"
NAME = "router"
EXPECTED = "SGLang's router, smg 1.13"
LOG_MIB = 64
LATER_S = 60.0
"""Seconds that the router waits for a server beyond request_timeout_s, so that the job is the first to give up."""
GRACE_S = 1
"""Seconds in which a router finishes its requests after SIGTERM. Half of it passes before it stops to listen."""


@dataclass(frozen=True)
class RouterSpec:
    """Which router to start or use, and where its log and record go."""

    config: RouterConfig
    server: ServerConfig
    """The template of the servers (rollout.server), whose limits and retries hold for requests to the router, too"""
    run_dir: Path
    """Folder for `router.log` and `router.server.json`"""
    api_key: str | None = field(default=None, repr=False)
    """The key of router and servers (see `key_of_fleet`)"""

    @property
    def log_path(self) -> Path:
        return self.run_dir / f"{NAME}.log"

    @property
    def record_path(self) -> Path:
        return self.run_dir / f"{NAME}.server.json"


def key_of_fleet(router: RouterConfig, servers: Mapping[str, ServerConfig]) -> str | None:
    """Return the one key of a router and of all servers behind it; `servers` are their sections.

    It is the key of the servers that run already, or of a router that runs. If the job starts the router, and no
    section names a key, it is a random one. None for a router that runs without a key. Raises ServerError if the
    variable with the key is unset.
    """
    named = {f"{KEY}.api_key_env": router.api_key_env} if router.url is not None else {}
    named |= {f"{key}.api_key_env": server.api_key_env for key, server in servers.items() if server.url is not None}
    for key, variable in named.items():
        if variable is not None:
            return read_api_key(variable, key=key)
    return None if router.url is not None else secrets.token_urlsafe(32)


class Router(Started):
    """The router of one `RouterSpec`. As a context manager, it stops the router that it started."""

    def __init__(self, spec: RouterSpec) -> None:
        self.spec = spec
        self.restarts = 0
        """Restarts so far, at most rollout.server.max_restarts over the launch."""
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None
        self._reserved: list[socket.socket] = []
        self._log = ServerLog(spec.log_path, LOG_MIB * 2**20)
        self._known: dict[str, str | None] = {}
        """url -> key of the workers that were added, for a restart"""

    @property
    def url(self) -> str:
        """Base URL; for a started router available after `start`."""
        if self.spec.config.url is not None:
            return self.spec.config.url.rstrip("/")
        assert self._port is not None, "start() first"
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id of a started router, also the id of its process group; None at a url."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the router without waiting for it. With `url`, nothing is started.

        A left-over router of this record is stopped first. Raises ServerError if the interpreter has no smg or another
        live process uses the router of this record.
        """
        spec = self.spec
        if spec.config.url is not None:
            return
        assert self._process is None, "already started"
        version = ask_router(spec.config.python, key=KEY)
        with writing(spec.log_path):
            spec.run_dir.mkdir(parents=True, exist_ok=True)
        stop_left_over(spec.record_path, key=KEY)
        # a restart keeps the port, so the URL does not change
        self._reserved = [reserve_port(LOOPBACK, self._port, key=KEY), reserve_port(LOOPBACK, None, key=KEY)]
        self._port, metrics_port = (each.getsockname()[1] for each in self._reserved)
        assert spec.api_key is not None, "a started router has a key"
        with writing(spec.log_path):
            log_file = self._log.open()
        with log_file:
            self._process = STARTER.submit(
                subprocess.Popen,
                self.command(metrics_port),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=router_environment(spec.config.python, spec.api_key),
                start_new_session=True,
            ).result()
        make_record(self._process.pid, self._port).save(spec.record_path)
        log.info(
            "%s: starting smg %s on %s (pid %d, metrics on port %d, log %s)",
            KEY,
            version,
            self.url,
            self._process.pid,
            metrics_port,
            spec.log_path,
        )

    def command(self, metrics_port: int) -> list[str]:
        """Return the command line of the router, which has no key on it."""
        config, server = self.spec.config, self.spec.server
        # by path, because another interpreter cannot import this package; -P keeps our folder off its import path
        command = [str((config.python or Path(sys.executable)).absolute()), "-P", router_launch.__file__]
        command += ["--parent-pid", str(os.getpid()), "--host", LOOPBACK, "--port", str(self._port)]
        command += ["--policy", config.policy]
        # without these two, it would listen on port 29000 of all interfaces
        command += ["--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port)]
        command += ["--request-timeout-secs", str(int(server.request_timeout_s + LATER_S))]
        command += ["--worker-startup-timeout-secs", str(max(1, int(config.start_timeout_s)))]
        command += ["--worker-startup-check-interval", "1"]
        # the job repeats requests and watches servers itself, and sends as many requests as the servers take
        command += ["--disable-retries", "--disable-health-check", "--max-concurrent-requests", "0"]
        command += ["--disable-tokenizer-autoload", "--shutdown-grace-period-secs", str(GRACE_S)]
        command += ["--log-level", "warn"]
        return [*command, *config.extra_args]

    def wait_ready(self) -> None:
        """Wait until the router gives its list of workers.

        Raises ServerError if it ends, needs longer than start_timeout_s, or is no router; StopRequested.
        """
        started, limit = time.monotonic(), self.spec.config.start_timeout_s
        if self._process is None:
            self._workers().all(limit)
            return
        with progress(log, f"{KEY}: starting, at most {limit:g} s (start_timeout_s; {self.spec.log_path})"):
            while not _listens(self._port):
                stopping.check()
                if not self.alive():
                    raise ServerError(self.describe_end())
                if time.monotonic() - started > limit:
                    end = self._last_words()
                    self.stop()
                    raise ServerError(f"{KEY}: not ready after {KEY}.start_timeout_s={limit:g} s; {end}")
                time.sleep(POLL_S)
        self._release_ports()
        self._workers().all(limit)
        log.info("%s: ready on %s after %.1f s", KEY, self.url, time.monotonic() - started)

    def workers(self) -> tuple[str, ...]:
        """Return the urls of the workers that take requests. Raises ServerError."""
        return tuple(worker.url for worker in self._workers().all().values() if worker.ready)

    def check(self, urls: Iterable[str]) -> None:
        """Raise ServerError unless the router's workers are exactly the servers at `urls`."""
        self._workers().check(urls)

    def add(self, url: str, api_key: str | None) -> None:
        """Have the router send requests to the server at `url`; return when it does.

        Raises ServerError if the router gives the server up, or needs longer than start_timeout_s.
        """
        self._workers().add(url, api_key)
        self._known[url.rstrip("/")] = api_key

    def remove(self, url: str) -> None:
        """Have the router send no more requests to the server at `url`; return when that is in effect.

        Requests that are there already go on. Raises ServerError if it is not in effect within start_timeout_s.
        """
        self._known.pop(url.rstrip("/"), None)
        self._workers().remove(url)

    def alive(self) -> bool:
        """Return whether the process of a started router runs. A router at a url counts as running."""
        return self.spec.config.url is not None or (self._process is not None and self._process.poll() is None)

    def stopped(self) -> str | None:
        """Return a phrase that names the stopped (SIGSTOP) process of the router; None if none is stopped."""
        return stopped_member(self._process.pid) if self._process is not None and self.alive() else None

    def recover(self, error: ServerDied) -> None:
        """Restart the router after `error`, with the workers that it had.

        Raises `error` if it runs elsewhere or the process should stop, and ServerDied if rollout.server.max_restarts
        are used up.
        """
        stopping.check()
        if self._process is None or stopping.requested() is not None:
            raise error
        end = self.describe_end()
        most = self.spec.server.max_restarts
        if self.restarts >= most:
            raise ServerDied(f"{end}; rollout.server.max_restarts={most} are used up", self.url) from error
        self.restarts += 1
        log.warning("%s; restart %d of %d", end, self.restarts, most)
        self.restart()

    def restart(self) -> None:
        """Stop what is left of a started router and start it again, on the same port and with the same workers.

        A worker that it cannot take in again is left out, with a warning; `workers` shows which.
        """
        assert self.spec.config.url is None, "a router at a url is never started"
        known = dict(self._known)
        self.stop()
        self.start()
        self.wait_ready()
        for url, api_key in known.items():
            try:
                self.add(url, api_key)
            except ServerError as error:
                log.warning("%s", error)

    def stop(self) -> None:
        """Stop the router that was started, if any: SIGTERM first, then SIGKILL."""
        self._release_ports()
        self._log.close()
        self._known.clear()
        if self._process is None:
            return
        stop_group(self._process.pid)
        self._process.wait()
        self._process = None
        self.spec.record_path.unlink(missing_ok=True)

    def describe_end(self) -> str:
        """Return one line about how the process ended: exit code, last log line, log file."""
        return f"{KEY}: the router {how_it_ended(self._process, self.stopped())}; {self._last_words()}"

    def _workers(self) -> RouterWorkers:
        # the section is that of the servers, because its limits and retries are meant in messages
        config = self.spec.server.model_copy(update={"url": self.spec.config.url})
        endpoint = Endpoint(
            self.url,
            config,
            "rollout.server",
            KEY,
            alive=self.alive if self._process is not None else None,
            stopped=self.stopped if self._process is not None else None,
            api_key=self.spec.api_key,
            expected=EXPECTED,
        )
        return RouterWorkers(Transport(endpoint), key=KEY, limit_s=self.spec.config.start_timeout_s)

    def _last_words(self) -> str:
        lines = self._log.tail()
        return f"last line: {one_line((lines or [''])[-1])!r}; log: {self.spec.log_path}"

    def _release_ports(self) -> None:
        for each in self._reserved:
            each.close()
        self._reserved = []


def _listens(port: int | None) -> bool:
    """Whether something listens on this port of the loopback interface."""
    assert port is not None
    try:
        with socket.create_connection((LOOPBACK, port), timeout=ASK_S):
            return True
    except OSError:
        return False
