"""Keeps a server available: its client, its process if we started it, and a bounded number of restarts.

The requests themselves are in `rollout` and `teacher`. Invariant: a server that runs elsewhere (`url`) is never started
or stopped. After a restart the server has the weights of the model folder; callers of `recover` must expect that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tropd_mcore import stopping
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerDied, ServerError, ServerHung
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.process import ServerProcess, ServerSpec
from tropd_mcore.serving.wire import Generation, GenerationRequest

log = logging.getLogger(__name__)


class SupervisedServer:
    """The server of one configuration section. As a context manager, it stops the server that it started."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.after_restart: Callable[[], None] | None = None
        """Called after each restart, before any request."""
        self.restarts = 0
        """Restarts so far, at most `max_restarts` over the launch."""
        self._process = ServerProcess(spec) if spec.config.url is None else None
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
        else:
            assert self.config.url is not None
            self._client = SglangClient(self.config.url, self.config, key=self.spec.key, name=self.spec.called)

    def wait_ready(self) -> None:
        """Wait until the server is ready. Raises ServerError if it is not."""
        if self._process is not None:
            self._process.wait_ready()
            return
        # a launch that was killed during a weight update leaves the server paused
        self.client.resume()
        if not self.client.healthy():
            raise ServerError(
                f"{self.spec.key}.url={self.config.url}: the server there is not healthy (GET /health; it is paused, "
                "still starting, or its engine gives no results)"
            )

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
        if self._process is not None or self._told_rounding:
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

    def generate(self, requests: list[GenerationRequest]) -> list[Generation | ServerError]:
        """Like `SglangClient.generate`, but a server that dies or hangs is restarted and asked for what is missing.

        Only for a server that serves the weights of its folder. Raises ServerDied when all restarts are used up.
        """
        answers: list[Generation | ServerError | None] = [None] * len(requests)
        while True:
            missing = [index for index, answer in enumerate(answers) if answer is None]
            died: ServerDied | None = None
            for index, answer in zip(missing, self.client.generate([requests[i] for i in missing]), strict=True):
                if isinstance(answer, ServerDied):
                    died = answer
                else:
                    answers[index] = answer
            if died is None:
                return [answer for answer in answers if answer is not None]
            self.recover(died)

    def recover(self, error: ServerDied) -> None:
        """Restart the server after `error` and wait until it is ready. It then has the weights of its folder again.

        Raises `error` if the server runs elsewhere, ServerDied with the reason if `max_restarts` are used up, and
        StopRequested if the process should stop (`error` while stop requests are held back).
        """
        stopping.check()  # a scheduler's signal ends the server too, perhaps before we have looked at our own signal
        if self._process is None or stopping.requested() is not None:
            raise error
        # a hung server's process still runs, so the error says more than the process
        end = str(error) if isinstance(error, ServerHung) else self._process.describe_end()
        if self.restarts >= self.config.max_restarts:
            raise ServerDied(f"{end}; {self.spec.key}.max_restarts={self.config.max_restarts} are used up") from error
        self.restarts += 1
        log.warning("%s; restart %d of %d", end, self.restarts, self.config.max_restarts)
        self._process.restart()
        self._released = False
        if self.after_restart is not None:
            try:
                self.after_restart()
            except ServerDied as again:
                self.recover(again)

    def stop(self) -> None:
        """Stop the process that we started, if any."""
        if self._process is not None:
            self._process.stop()

    def __enter__(self) -> SupervisedServer:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            # __exit__ is not called when __enter__ fails
            self.stop()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
