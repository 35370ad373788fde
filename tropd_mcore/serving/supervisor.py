"""A server with what keeps it up: its process where we started it, its client, and a bounded number of restarts.

Not for what is asked of it (see `rollout` and `teacher`). Invariant: a server that runs elsewhere (`url`) is never
started or stopped; after a restart the weights are those of the model folder, and the caller is told so by `recover`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tropd_mcore import stopping
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerDied, ServerError, ServerHung
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.process import ServerProcess, ServerSpec
from tropd_mcore.serving.wire import Generation, GenerationRequest

log = logging.getLogger(__name__)


class SupervisedServer:
    """The server of one section of the configuration; a context manager that stops what it started."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.after_restart: Callable[[], None] | None = None
        """Called after each restart, before anybody asks the server for anything."""
        self.restarts = 0
        """Restarts so far, at most `max_restarts` over the launch."""
        self._process = ServerProcess(spec) if spec.config.url is None else None
        self._client: SglangClient | None = None

    @property
    def config(self) -> ServerConfig:
        return self.spec.config

    @property
    def client(self) -> SglangClient:
        """The client of the running server."""
        assert self._client is not None, "start() first"
        return self._client

    def start(self) -> None:
        """Start the process and return at once; with `url` there is nothing to start. Raises ServerError."""
        if self._process is not None:
            self._process.start()
            self._client = self._process.client()
        else:
            assert self.config.url is not None
            self._client = SglangClient(self.config.url, self.config, key=self.spec.key, name=self.spec.called)

    def wait_ready(self) -> None:
        """Wait until the server answers. Raises ServerError where it does not."""
        if self._process is not None:
            self._process.wait_ready()
            return
        # a launch that was killed while it updated weights left the server paused
        self.client.resume()
        if not self.client.healthy():
            raise ServerError(
                f"{self.spec.key}.url={self.config.url}: the server there is not healthy (GET /health; it is paused, "
                "it starts, or its engine gives nothing)"
            )

    def generate(self, requests: list[GenerationRequest]) -> list[Generation | ServerError]:
        """`SglangClient.generate`; a server that dies or hangs is restarted and asked for what is missing.

        For a server whose weights stay those of its folder. Raises ServerDied once the restarts are used up.
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
        """Restart the server that `error` is about and wait until it is ready; its weights are the folder's again.

        Raises ServerDied with the reason where it runs elsewhere, `max_restarts` are used up, or the process shall stop
        (else StopRequested).
        """
        stopping.check()  # a scheduler's signal ends the server too, before anybody has looked at ours
        if self._process is None or stopping.requested() is not None:
            raise error
        # of a hung one the error tells more than its process, which runs
        end = str(error) if isinstance(error, ServerHung) else self._process.describe_end()
        if self.restarts >= self.config.max_restarts:
            raise ServerDied(f"{end}; {self.spec.key}.max_restarts={self.config.max_restarts} are used up") from error
        self.restarts += 1
        log.warning("%s; restart %d of %d", end, self.restarts, self.config.max_restarts)
        self._process.restart()
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
            # a block that was not entered is not left
            self.stop()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
