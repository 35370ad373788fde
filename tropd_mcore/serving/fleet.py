"""Several servers of one model that keep the weights of its folder: one call for all of them, without those that fail.

The rollout servers of a job get new weights at every step and are handled by `rollout.policy_server`. Invariants: every
request gets one answer as long as one server is left. A server that died is started again while the others go on, here
or by the rank of its node (`serving.keeper`). It is checked like a new one (`SupervisedServer.after_restart`), and only
then gets requests again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tropd_mcore import stopping
from tropd_mcore.errors import ServerDied, ServerError, TropdError
from tropd_mcore.progress import progress
from tropd_mcore.serving.client import SglangClient, generate_on, score_on
from tropd_mcore.serving.started import Started
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.wire import Generation, GenerationRequest, ScoringRequest, ServerInfo, TokenScores
from tropd_mcore.serving.work import Dispatched, Speeds

log = logging.getLogger(__name__)

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Ask = Callable[[Sequence[SglangClient], Sequence[float], list[Question]], Dispatched[Answer]]

POLL_S = 0.5
"""Seconds between two looks at servers that are starting, if no other is left."""


class ServerFleet(Started):
    """The servers of one model. As a context manager, it starts them side by side and stops those that it started."""

    def __init__(self, servers: Sequence[SupervisedServer]) -> None:
        assert servers, "a fleet without servers"
        self.each = tuple(servers)
        self._waiting: dict[int, TropdError] = {}
        """Places of servers that are starting again, or at a url and silent -> why"""
        self._since: dict[int, float] = {}
        """Place of each of them -> time at which it was lost"""
        self._gone: dict[int, TropdError] = {}
        """Places of servers whose restarts are used up -> why"""
        self._speeds = Speeds()

    @property
    def first(self) -> SupervisedServer:
        """The first server, whose section messages about all of them name."""
        return self.each[0]

    def generate(self, requests: list[GenerationRequest]) -> list[Generation | ServerError]:
        """Sample each request on one of the servers (see `SglangClient.generate`).

        Raises ServerDied when no server is left, with all restarts used up.
        """
        return self._ask(requests, lambda clients, speeds, asked: generate_on(clients, asked, speeds=speeds))

    def score(self, requests: list[ScoringRequest]) -> list[TokenScores | ServerError]:
        """Score each request on one of the servers (see `SglangClient.score`). Raises like `generate`."""
        return self._ask(requests, lambda clients, speeds, asked: score_on(clients, asked, speeds=speeds))

    def infos(self) -> list[tuple[SupervisedServer, ServerInfo]]:
        """Return what each server that is ready says about itself. Raises like `generate`."""
        while True:
            found: list[tuple[SupervisedServer, ServerInfo]] = []
            for place in self._ready():
                try:
                    found.append((self.each[place], self.each[place].client.info()))
                except ServerDied as error:
                    self._lose(place, error)
            if found:
                return found

    def ready(self) -> list[SupervisedServer]:
        """Return the servers that can be asked, at least one. Raises like `generate`."""
        return [self.each[place] for place in self._ready()]

    def start(self) -> None:
        """Start the servers without waiting for them. Raises ServerError."""
        for server in self.each:
            server.start()

    def wait_ready(self) -> None:
        """Wait until all servers are ready. Raises ServerError if one is not."""
        for server in self.each:
            server.wait_ready()

    def stop(self) -> None:
        """Stop the processes that were started."""
        for server in self.each:
            server.stop()

    def lost(self, server: SupervisedServer, error: ServerDied) -> None:
        """Start a server again that died, and let the others go on. Raises if it was the last one."""
        self._lose(next(place for place, each in enumerate(self.each) if each is server), error)

    def _ask(self, questions: list[Question], ask: Ask[Question, Answer]) -> list[Answer | ServerError]:
        """Ask until every question has an answer, or an error of its own."""
        answers: list[Answer | ServerError | None] = [None] * len(questions)
        while True:
            missing = [index for index, answer in enumerate(answers) if answer is None]
            if not missing:
                return [answer for answer in answers if answer is not None]
            ready = self._ready()
            speeds = [self._speeds.of(str(place)) for place in ready]
            found = ask([self.each[place].client for place in ready], speeds, [questions[index] for index in missing])
            for index, answer in zip(missing, found.answers, strict=True):
                if not isinstance(answer, ServerDied):
                    answers[index] = answer
            self._speeds.note({str(ready[number]): speed for number, speed in found.speeds.items()})
            for number, error in found.lost.items():
                self._lose(ready[number], error, may_return=number in found.may_return)

    def _ready(self) -> list[int]:
        """Places of the servers that can be asked. If there is none, the first that becomes ready is waited for."""
        with progress(log, f"{self.first.spec.key}: waiting for a server"):
            while True:
                for place in list(self._waiting):
                    self._look_at(place)
                out = self._waiting.keys() | self._gone.keys()
                ready = [place for place in range(len(self.each)) if place not in out]
                if ready:
                    return ready
                if not self._waiting:
                    raise next(iter(self._gone.values()))
                stopping.check()
                time.sleep(POLL_S)

    def _look_at(self, place: int) -> None:
        """Let a server take part again if it is ready."""
        server = self.each[place]
        try:
            if not (server.is_ready() and server.answers()):
                if (ended := server.ended()) is not None:
                    raise ended
                self._give_up_late(place)
                return
            del self._waiting[place]
            if server.after_restart is not None:
                server.after_restart()
            log.info("%s: it takes requests again", server.spec.called)
        except ServerDied as error:
            self._lose(place, error)

    def _give_up_late(self, place: int) -> None:
        """Give up a server that another rank should have started again by now."""
        server, limit_s = self.each[place], self.each[place].config.start_timeout_s
        if not server.is_kept_elsewhere or time.monotonic() - self._since[place] <= limit_s:
            return
        why = self._waiting.pop(place)
        self._gone[place] = ServerDied(
            f"{why}; not back after {server.spec.key}.start_timeout_s={limit_s:g} s; its log is on node "
            f"{server.config.node}: {server.spec.log_path}"
        )
        log.warning("%s: given up", self._gone[place])

    def _lose(self, place: int, error: ServerError, *, may_return: bool = False) -> None:
        """Start a server again, in the background if there are others. Raises if it was the last one."""
        server, why = self.each[place], error
        if len(self.each) == 1 and not server.is_kept_elsewhere:
            if not isinstance(error, ServerDied):
                raise error
            server.recover(error)
            return
        if not (may_return and server.may_come_back()):
            try:
                server.begin_recovery(error)
            except ServerError as met:
                why = met
                if server.is_started and not server.is_kept_elsewhere:
                    self._gone[place] = met
        if place not in self._gone:
            self._waiting[place] = why
            self._since[place] = time.monotonic()
        left = len(self.each) - len(self._waiting) - len(self._gone)
        log.warning("%s: %d of %d servers go on", why, left, len(self.each))
        if not left and all(each in self._gone or not other.is_started for each, other in enumerate(self.each)):
            raise why


def fleet_of(servers: SupervisedServer | ServerFleet) -> ServerFleet:
    """Return a fleet: the given one, or that of one server."""
    return servers if isinstance(servers, ServerFleet) else ServerFleet([servers])
