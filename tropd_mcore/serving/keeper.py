"""Keeps a server running on a node whose ranks cannot be told to: starts it again by itself when it has died.

The first rank of a job asks the servers of a teacher while the ranks of other nodes wait in a collective call. So the
rank that started such a server watches its process, and the first rank only notices that it answers again (see
`serving.fleet`). Invariant: a server whose process runs is left alone, unless it is stopped (SIGSTOP) for
`hang_timeout_s`: whether it hangs in another way shows only to the one who asks it.
"""

from __future__ import annotations

import logging
import threading
import time

from tropd_mcore.errors import ServerError, ServerHung, StopRequested
from tropd_mcore.serving.supervisor import SupervisedServer

log = logging.getLogger(__name__)

POLL_S = 1.0


class Keeper:
    """Watches the server from `start` to `stop`, in a thread."""

    def __init__(self, server: SupervisedServer) -> None:
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"keeper of {server.spec.key}", daemon=True)
        self._stopped_since: float | None = None

    def start(self) -> None:
        """Begin. The server must be ready."""
        self._thread.start()

    def stop(self) -> None:
        """End; a start that is under way is waited for. The server is left as it is."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            error = self._server.ended() or self._hung()
            if error is None:
                continue
            self._stopped_since = None
            try:
                self._server.begin_recovery(error)
            except StopRequested:
                return
            except ServerError as met:
                log.error("%s; it is given up", met)
                return

    def _hung(self) -> ServerHung | None:
        """The error of a server that has been stopped for too long."""
        process = self._server.process
        stopped = process.stopped() if process is not None else None
        if stopped is None:
            self._stopped_since = None
            return None
        now, limit_s = time.monotonic(), self._server.config.hang_timeout_s
        self._stopped_since = self._stopped_since or now
        if now - self._stopped_since < limit_s:
            return None
        return ServerHung(f"{self._server.spec.called}: hung: {stopped} for {limit_s:g} s", self._server.client.url)
