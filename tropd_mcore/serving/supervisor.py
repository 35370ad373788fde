"""Keeps a server available: its client, its process if we started it, and a bounded number of restarts.

The requests themselves are in `rollout` and `teacher`. Invariant: a server that runs elsewhere (`url`) is never started
or stopped. After a restart the server has the weights of the model folder; callers of `recover` must expect that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tropd_mcore import stopping
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.progress import progress
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.environment import read_api_key
from tropd_mcore.serving.process import ServerProcess, ServerSpec
from tropd_mcore.serving.started import Started

log = logging.getLogger(__name__)

POLL_S = 0.5
LOOK_S = 5.0
"""Longest wait for the answer of a server that may be gone."""


@dataclass(frozen=True)
class Address:
    """How a server that another rank started is reached."""

    url: str
    api_key: str = field(repr=False)


class SupervisedServer(Started):
    """The server of one configuration section. As a context manager, it stops the server that it started.

    With `elsewhere`, another rank of this job starts and stops it; this object only reaches it.
    """

    def __init__(self, spec: ServerSpec, elsewhere: Address | None = None) -> None:
        self.spec = spec
        self.after_restart: Callable[[], None] | None = None
        """Called after each restart, before any request."""
        self.restarts = 0
        """Restarts so far, at most `max_restarts` over the launch."""
        self.is_started = spec.config.url is None
        """Whether this job starts the server."""
        self.is_kept_elsewhere = elsewhere is not None
        """Whether another rank starts it, and starts it again when it has died."""
        self._process = ServerProcess(spec) if self.is_started and elsewhere is None else None
        self._elsewhere = elsewhere
        self._client: SglangClient | None = None
        self._told_rounding = False
        self._released = False

    @property
    def config(self) -> ServerConfig:
        return self.spec.config

    @property
    def process(self) -> ServerProcess | None:
        """The process that we start; None for a server at a url."""
        return self._process

    @property
    def client(self) -> SglangClient:
        """The client of the running server."""
        assert self._client is not None, "start() first"
        return self._client

    def start(self) -> None:
        """Start the process without waiting for it. With `url`, nothing is started. Raises ServerError."""
        if self._process is not None:
            self._process.start()
            self._client = self._process.client()
        elif self._elsewhere is not None:
            self._client = SglangClient(
                self._elsewhere.url, self.config, key=self.spec.key, name=self.spec.called,
                api_key=self._elsewhere.api_key,
            )  # fmt: skip
        else:
            assert self.config.url is not None
            self._client = SglangClient(self.config.url, self.config, key=self.spec.key, name=self.spec.called)

    def wait_ready(self) -> None:
        """Wait until the server is ready. Raises ServerError if it is not."""
        if self._process is not None:
            self._process.wait_ready()
            return
        if self._elsewhere is not None:
            self._wait_for_the_other_rank()
            return
        # a launch that was killed during a weight update leaves the server paused
        self.client.resume()
        if not self.client.healthy():
            raise ServerError(
                f"{self.spec.key}.url={self.config.url}: the server there is not healthy (GET /health; it is paused, "
                "still starting, or its engine gives no results)"
            )

    def _wait_for_the_other_rank(self) -> None:
        """Wait until the server that another rank started can generate. Raises ServerError after start_timeout_s."""
        started, limit = time.monotonic(), self.config.start_timeout_s
        with progress(log, f"{self.spec.called}: starting on node {self.config.node}, at most {limit:g} s"):
            while not self.client.healthy(LOOK_S):
                stopping.check()
                if time.monotonic() - started > limit:
                    raise ServerError(
                        f"{self.spec.called}: not ready at {self.client.url} after {self.spec.key}.start_timeout_s="
                        f"{limit:g} s; its log is on node {self.config.node}: {self.spec.log_path}"
                    )
                time.sleep(POLL_S)

    @property
    def api_key(self) -> str | None:
        """The key that the server asks for; None if it asks for none. Raises ServerError if its variable is not set."""
        if self._process is not None:
            return self._process.api_key
        if self._elsewhere is not None:
            return self._elsewhere.api_key
        return read_api_key(self.config.api_key_env, key=f"{self.spec.key}.api_key_env")

    @property
    def address(self) -> Address:
        """How another rank reaches the server that this one started."""
        assert self._process is not None
        return Address(self._process.url, self._process.api_key)

    def is_ready(self) -> bool:
        """Return whether the server can generate, without waiting for it. One that has ended is not (see `ended`)."""
        return self._process.is_ready() if self._process is not None else self.answers()

    def answers(self) -> bool:
        """Return whether the server gives results now, paused or not."""
        try:
            self.client.resume(LOOK_S)
        except ServerError:
            return False
        return self.client.healthy(LOOK_S)

    def may_come_back(self) -> bool:
        """Return whether a server that does not answer may do so later by itself. One that is stopped will not."""
        return self._process is None or (self._process.alive() and self._process.stopped() is None)

    def ended(self) -> ServerDied | None:
        """Return the error of a started server whose process has ended; None for any other."""
        if self._process is None or self._process.alive():
            return None
        return ServerDied(self._process.describe_end())

    def release_memory(self) -> None:
        """Have the server give its memory back until `resume_memory` (release_memory). Its weights are lost.

        Raises ServerError.
        """
        with self._naming_key():
            self.client.release_memory()
        self._released = True

    def resume_memory(self) -> None:
        """Have the server take its memory back, if it has given it. Its weights are undefined then.

        Raises ServerError.
        """
        if not self._released:
            return
        with self._naming_key():
            self.client.resume_memory()
        self._released = False

    @contextmanager
    def _naming_key(self) -> Iterator[None]:
        """Add to an error what to change. The error of a dead server stays as it is: a restart may help."""
        try:
            yield
        except ServerDied:
            raise
        except ServerError as error:
            raise ServerError(f"{error}; set {self.spec.key}.release_memory=false") from error

    def warn_of_rounded_logits(self) -> None:
        """Log one warning, at the first call, if a server at a url rounds its logits before it takes log-probs.

        A server that we start on a GPU does not. On a CPU it would compute with a float32 copy of the output layer.
        Raises ServerError.
        """
        if self.is_started or self._told_rounding:
            return
        self._told_rounding = True
        info = self.client.info()
        if info.rounds_logits and info.device != "cpu":
            log.warning(
                "%s (%s): it rounds its logits to %s, which changes each probability ratio by several percent; start "
                "it with --enable-fp32-lm-head, as examples/teacher_server.sh does",
                self.spec.called,
                self.client.url,
                "the dtype of its model" if info.dtype in ("?", "auto") else info.dtype,
            )

    def recover(self, error: ServerDied) -> None:
        """Restart the server after `error` and wait until it is ready. It then has the weights of its folder again.

        Raises the errors of `begin_recovery`, and ServerError if the server does not get ready.
        """
        self.begin_recovery(error)
        self.wait_ready()
        if self.after_restart is not None:
            try:
                self.after_restart()
            except ServerDied as again:
                self.recover(again)

    def begin_recovery(self, error: ServerError) -> None:
        """Stop what is left of the server after `error` and start it again, without waiting for it (`wait_ready`).

        Raises `error` if the server runs elsewhere, ServerDied with the reason if `max_restarts` are used up, and
        StopRequested if the process should stop (`error` while stop requests are held back).
        """
        stopping.check()  # a scheduler's signal ends the server too, perhaps before we have looked at our own signal
        if self._process is None or stopping.requested() is not None:
            raise error
        # a hung server's process still runs, so the error says more than the process
        end = self._process.describe_end() if type(error) is ServerDied else str(error)
        if self.restarts >= self.config.max_restarts:
            raise ServerDied(f"{end}; {self.spec.key}.max_restarts={self.config.max_restarts} are used up") from error
        self.restarts += 1
        log.warning("%s; restart %d of %d", end, self.restarts, self.config.max_restarts)
        self._released = False
        self._process.stop()
        self._process.start()

    def stop(self) -> None:
        """Stop the process that we started, if any."""
        if self._process is not None:
            self._process.stop()
