"""Samples through a router and asks the servers behind it directly for everything else.

A `RouterLane` has the methods of an `SglangClient` that a sampler uses. This module does not send weights and does not
restart servers; its caller does both. The life of a server behind the router:

1. The caller sends the weights to the server directly and proves that they arrived. Then it calls `put_in`.
2. The server stays behind the router while it gets the weights of later steps, because nothing samples meanwhile.
3. If the server misses an update, the caller calls `take_out`. If it dies or hangs while samples are drawn, the lane
   takes it out at once and its samples go to the others; `lost` then has its error. The caller restarts it, sends the
   weights, proves them and calls `put_in` again.

Invariants: only servers that the caller put in answer; before each sampling the router's list is compared with them.
Every answer carries the weight version that it was sampled with, so a sample of other weights is refused by the sampler
even if this order is broken. A router that was started and ends is restarted with the same workers, at most
rollout.server.max_restarts times, and asked for the missing samples.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import AnswerError, ServerDied, ServerError, ServerHung
from tropd_mcore.serving import wire
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.router import KEY, Router
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.watch import Watched, hang

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
"""Seconds between two looks at the processes of the servers"""


@dataclass(frozen=True)
class LaneServer:
    """One server behind the router. `end` kills the processes of a started server; None for one at a url."""

    client: SglangClient
    config: ServerConfig
    api_key: str | None
    alive: Callable[[], bool] | None = None
    stopped: Callable[[], str | None] | None = None
    end: Callable[[], None] | None = None

    @classmethod
    def of(cls, server: SupervisedServer) -> LaneServer:
        """Return what the lane needs to know of a server that runs. Raises ServerError if its key is not set."""
        process, config = server.process, server.config
        if process is None:
            return cls(server.client, config, server.api_key)
        return cls(server.client, config, process.api_key, process.alive, process.stopped, process.kill)

    @property
    def url(self) -> str:
        return self.client.url

    def ended(self) -> bool:
        """Whether the process of a started server has ended. Of a server at a url this is not known."""
        return self.alive is not None and not self.alive()

    def watched(self) -> Watched:
        """What to probe while samples are drawn."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return Watched(self.url, self.config.hang_timeout_s, True, headers, self.stopped)


class RouterLane:
    """The way to sample from all servers behind `router`. `key` is the section of limits and retries in messages."""

    def __init__(self, router: Router, *, key: str = "rollout.server") -> None:
        self.key = key
        self.name = KEY
        self.url = router.url
        self.retries = 0
        """Number of retries over the lane's life."""
        self.asked_again = 0
        """Number of answers that made no sense, so that the request was sent once more; over the lane's life."""
        self.lost: dict[str, ServerDied] = {}
        """Url -> error of each server that died or hung since it was put in. It is not behind the router any more."""
        self._router = router
        self._servers: dict[str, LaneServer] = {}

    @property
    def servers(self) -> tuple[str, ...]:
        """Urls of the servers that were put in and not taken out or lost."""
        return tuple(self._servers)

    def put_in(self, server: LaneServer) -> None:
        """Let the server answer from now on. Its weights must have been proven.

        At a router with a url that already has it as a worker, nothing is changed. Raises ServerError if the router
        does not take it in.
        """
        if self._router.spec.config.url is None or server.url not in self._router.workers():
            self._router.add(server.url, server.api_key)
        self._servers[server.url] = server
        self.lost.pop(server.url, None)

    def take_out(self, url: str) -> None:
        """Let the server at `url` answer nothing any more; return when that is in effect. Raises ServerError."""
        self._servers.pop(url.rstrip("/"), None)
        self._router.remove(url)

    def info(self) -> wire.ServerInfo:
        """Return what all servers have in common: their weight version, and the smallest of their limits.

        Asks each server directly. Raises ServerDied if there is none or one is gone, and ServerError if their weight
        versions differ.
        """
        if not self._servers:
            raise self._nobody()
        found = {url: server.client.info() for url, server in self._servers.items()}
        versions = {info.weight_version for info in found.values()}
        if len(versions) > 1:
            shown = ", ".join(f"{url} {info.weight_version!r}" for url, info in found.items())
            raise ServerError(
                f"{self.name}: the servers behind it have different weights: {shown}; expected one version: publish "
                "the weights to all of them, or take the others out"
            )
        return replace(
            next(iter(found.values())),
            longest_input=min(info.longest_input for info in found.values()),
            longest_sequence=min(info.longest_sequence for info in found.values()),
        )

    def generate(self, requests: list[wire.GenerationRequest]) -> list[wire.Generation | ServerError]:
        """Sample each request. Entry i is the continuation of request i, or the error that it failed with.

        A server that dies or hangs meanwhile is taken out (see `lost`), and its requests are sent again to the others.
        Entries are ServerDied if no server is left, if a server at a url hangs, or if the router is gone for good: the
        caller may put servers in and ask for these again. Raises ServerError if the router has other workers than
        those that were put in.
        """
        answers: list[wire.Generation | ServerError | None] = [None] * len(requests)
        while True:
            missing = [index for index, answer in enumerate(answers) if answer is None]
            died = self._round(requests, missing, answers)
            if died is None:
                return [answer for answer in answers if answer is not None]
            if died.url == self.url and self._servers:
                try:
                    self._recover(died)
                    continue
                except ServerDied as final:
                    died = final
            elif self._servers and died.url in self.lost and self.lost[died.url] is not died:
                continue
            return [died if answer is None else answer for answer in answers]

    def _round(
        self,
        requests: list[wire.GenerationRequest],
        missing: list[int],
        answers: list[wire.Generation | ServerError | None],
    ) -> ServerDied | None:
        """Send the missing requests once and note their answers. Return the error because of which some are missing."""
        if not self._servers:
            return self._nobody()
        try:
            self._router.check(self._servers)
        except ServerDied as error:
            return error
        client = self._client()
        before = len(self.lost)
        found = client.generate([requests[index] for index in missing])
        self.retries += client.retries
        self.asked_again += client.asked_again
        for server in [each for each in self._servers.values() if each.ended()]:
            self._lose(server, _of_ended(server))  # its end came after the last look at it
        died: ServerDied | None = None
        for index, answer in zip(missing, found, strict=True):
            if isinstance(answer, ServerDied):
                died = answer
            elif isinstance(answer, ServerError) and not isinstance(answer, AnswerError) and len(self.lost) > before:
                # it was given up by a server that is gone, more often than max_retries allows
                gone = list(self.lost.values())[-1]
                died = ServerDied(f"{answer}; {gone}", gone.url)
            else:
                answers[index] = answer
        return died

    def _client(self) -> SglangClient:
        """A client of the router for as many requests as all servers take."""
        router = self._router
        most = sum(server.config.max_concurrency for server in self._servers.values())
        started = router.spec.config.url is None
        return SglangClient(
            self.url,
            router.spec.server.model_copy(update={"max_concurrency": most, "url": router.spec.config.url}),
            key=self.key,
            name=self.name,
            alive=router.alive if started else None,
            stopped=router.stopped if started else None,
            api_key=router.spec.api_key,
            beside=self._attend,
        )

    async def _attend(self) -> ServerDied:
        """Watch all servers. Take out those that die or hang, and return an error when no answer can come any more."""
        watches = {
            asyncio.ensure_future(watch(server)): server
            for server in self._servers.values()
            for watch in (_death, _hang)
        }
        try:
            while True:
                await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
                for watch in [each for each in watches if each.done()]:
                    server, error = watches.pop(watch), watch.result()
                    if server.url not in self._servers:
                        continue  # its other watch has seen it, too
                    await asyncio.to_thread(self._lose, server, error)
                    if server.end is None or not self._servers:
                        return error
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    def _lose(self, server: LaneServer, error: ServerDied) -> None:
        """Take out a server that is gone. What a hung one was asked is freed by its end, so the others are asked."""
        log.warning("%s; it is taken out of the router, and %d servers are left", error, len(self._servers) - 1)
        self._servers.pop(server.url, None)
        self.lost[server.url] = error
        self._router.remove(server.url)
        if server.end is not None:
            server.end()

    def _recover(self, died: ServerDied) -> None:
        """Restart the router. Servers that it does not take in again are lost. Raises ServerDied."""
        self._router.recover(died)
        found = self._router.workers()
        for url in [url for url in self._servers if url not in found]:
            del self._servers[url]
            self.lost[url] = ServerDied(f"{self.name}: the restarted router cannot use the server at {url}", url)

    def _nobody(self) -> ServerDied:
        gone = "".join(f"; {error}" for error in self.lost.values())
        return ServerDied(f"{self.name}: no server is behind the router at {self.url}{gone}")


async def _death(server: LaneServer) -> ServerDied:
    """Return an error when the process of a started server has ended."""
    while not server.ended():
        await asyncio.sleep(LOOK_EVERY_S)
    return _of_ended(server)


def _of_ended(server: LaneServer) -> ServerDied:
    return ServerDied(f"{server.client.name}: its process has ended (at {server.url})", server.url)


async def _hang(server: LaneServer) -> ServerDied:
    """Return an error when the server is hung, or does not answer at a url."""
    reason = await hang(server.watched())
    limit = f"{server.client.key}.hang_timeout_s={server.config.hang_timeout_s:g}"
    return ServerHung(f"{server.client.name}: {reason} (at {server.url}; {limit})", server.url)
