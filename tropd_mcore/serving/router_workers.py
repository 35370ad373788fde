"""The list of workers of SGLang's router (smg 1.13): reads and changes it, and waits until a change is in effect.

A worker is a server to which the router sends requests. The router takes in and drops workers in the background and
answers 202 at once. This module does not start a router (see `router`) and sends no request for samples (see
`router_lane`). Invariant: `add` and `remove` return only when the router's own list shows the change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from tropd_mcore import stopping
from tropd_mcore.errors import AnswerError, ServerError
from tropd_mcore.foreign_text import one_line
from tropd_mcore.serving import wire
from tropd_mcore.serving.transport import ConflictError, MissingError, Transport

POLL_S = 0.05
ASK_S = 10.0
"""Longest time in seconds for one look at the list."""
PATH = "/workers"


class _ForgottenError(ServerError):
    """The router knows nothing of a server that it was asked to take in."""


@dataclass(frozen=True)
class RouterWorker:
    """One entry of the router's list."""

    number: str
    """The router's name of it"""
    url: str
    ready: bool
    """Whether the router sends requests to it"""


class RouterWorkers:
    """The workers of the router behind `http`. A change may take `limit_s` seconds. `key` is the router's section."""

    def __init__(self, http: Transport, *, key: str, limit_s: float) -> None:
        self._http = http
        self._key = key
        self._limit_s = limit_s

    def all(self, limit_s: float | None = None) -> dict[str, RouterWorker]:
        """Return the workers by url. `limit_s` allows one attempt of that length.

        Raises ServerError if the router does not answer with a list of workers, and ServerDied if it is gone or hung.
        """
        answer = self._http.run(
            lambda session: self._http.call(session, "GET", PATH, retry=limit_s is None),
            may_stop=True,
            watched=limit_s is None,
            limit_s=limit_s,
        )
        try:
            return read_workers(answer)
        except AnswerError as error:
            raise ServerError(f"{self._key}: {error} ({self._http.url})") from error

    def check(self, urls: Iterable[str]) -> None:
        """Raise ServerError unless the router's workers are exactly the servers at `urls`, all of them ready."""
        found, expected = self.all(), {url.rstrip("/") for url in urls}
        strange, missing = sorted(found.keys() - expected), sorted(expected - found.keys())
        waiting = sorted(url for url in expected & found.keys() if not found[url].ready)
        said = [
            f"{', '.join(those)} {what}"
            for those, what in (
                (strange, "must not be one of them"),
                (missing, "is missing"),
                (waiting, "takes no requests"),
            )
            if those
        ]
        if said:
            raise ServerError(
                f"{self._key}: expected the router at {self._http.url} to have exactly the servers of rollout.servers "
                f"as its workers; {'; '.join(said)}. Correct its list (/workers) or rollout.servers"
            )

    def add(self, url: str, api_key: str | None) -> None:
        """Have the router send requests to the server at `url`, and return when it does.

        If it has a worker with this url, that one is replaced. Raises ServerError if the router gives the server up or
        has not taken it in within the limit.
        """
        url = url.rstrip("/")
        self.remove(url)
        body: wire.Json = {
            "url": url,
            # without health checks, because the engine is paused while weights are sent; no wait when it is removed
            "health": {"disable_health_check": True, "drain_settle_secs": 0},
        }
        if api_key is not None:
            body["api_key"] = api_key
        # smg forgets the progress of an addition if the removal before it ends late, and goes on adding. It then
        # answers 404 about a server that it takes in, as it does about one that it has given up
        for last in (False, True):
            number = self._ask_for(body)
            try:
                self._await(partial(self._taken_in, url, number), f"has not taken in the server at {url}")
                return
            except _ForgottenError:
                if last:
                    raise

    def remove(self, url: str) -> None:
        """Have the router send no more requests to the server at `url`. Requests that it has there go on.

        Returns at once if the router has no such worker. Raises ServerError if it still lists it after the limit.
        """
        url = url.rstrip("/")
        worker = self.all().get(url)
        if worker is None:
            return
        try:
            self._change("DELETE", f"{PATH}/{worker.number}", None)
        except MissingError:
            return  # somebody else removed it meanwhile
        self._await(lambda: url not in self.all(), f"still has the server at {url}, which was removed")

    def _change(self, method: str, path: str, body: wire.Json | None) -> object:
        return self._http.run(
            lambda session: self._http.call(session, method, path, body, retry=False, accepted=202), limit_s=ASK_S
        )

    def _ask_for(self, body: wire.Json) -> str | None:
        """Ask for a worker and return the router's name of it; None if it has come meanwhile."""
        try:
            answer = self._change("POST", PATH, body)
        except ConflictError:
            return None
        number = answer.get("worker_id") if isinstance(answer, dict) else None
        if not isinstance(number, str):
            raise ServerError(
                f"{self._key}: {PATH} answered {one_line(repr(answer), 60)}; expected a worker_id ({self._http.url})"
            )
        return number

    def _taken_in(self, url: str, number: str | None) -> bool:
        worker = self.all().get(url)
        if worker is not None or number is None:
            return worker is not None and worker.ready
        # a server that the router looks at is not in the list yet
        try:
            answer = self._http.run(
                lambda session: self._http.call(session, "GET", f"{PATH}/{number}"), watched=False, limit_s=ASK_S
            )
        except MissingError as error:
            raise _ForgottenError(
                f"{self._key}: the router at {self._http.url} has given up the server at {url}: it does not answer "
                "there, or refuses the key"
            ) from error
        job = answer.get("job_status") if isinstance(answer, dict) else None
        if isinstance(job, dict) and job.get("status") == "failed":
            raise ServerError(
                f"{self._key}: the router at {self._http.url} cannot use the server at {url}: "
                f"{one_line(job.get('message'))}"
            )
        return False

    def _await(self, done: Callable[[], bool], problem: str) -> None:
        """Wait until `done`. Raises ServerError with `problem` after the limit, and StopRequested."""
        started = time.monotonic()
        while not done():
            stopping.check()
            if time.monotonic() - started > self._limit_s:
                raise ServerError(
                    f"{self._key}: the router at {self._http.url} {problem} after "
                    f"{self._key}.start_timeout_s={self._limit_s:g} s"
                )
            time.sleep(POLL_S)


def read_workers(answer: object) -> dict[str, RouterWorker]:
    """Decode an answer of /workers: url -> worker. Raises AnswerError."""
    entries = answer.get("workers") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise AnswerError(f"{PATH} answered {one_line(repr(answer), 60)}; expected a list of workers")
    found: dict[str, RouterWorker] = {}
    for entry in entries:
        url = entry.get("url") if isinstance(entry, dict) else None
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(url, str) or not isinstance(number, str) or not number:
            raise AnswerError(f"{PATH} answered the worker {one_line(repr(entry), 60)}; expected id and url")
        # a worker that is being removed (`draining`) counts as healthy
        ready = entry.get("is_healthy") is True and entry.get("status", "ready") == "ready"
        found[one_line(url).rstrip("/")] = RouterWorker(one_line(number), one_line(url).rstrip("/"), ready)
    return found
