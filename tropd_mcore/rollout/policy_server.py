"""Collective access to the rollout servers: all ranks call it, and it samples from the student's current weights.

HTTP clients are on rank 0 only. A server's process is on the rank that started it. Gathering the weights needs every
rank. Invariants:
- A rollout comes from the weight version of its own step; any other is refused.
- The servers' checksums show that the weights arrived and did not change during sampling (`rollout.publication`).
- A server that missed an update takes no requests. If it is lost, the step goes on with the others. It comes back with
  the weights of a later step, or of this one if no other is left; only the missing samples are asked for then.
- A server that is slow is left out of later steps and tried again, less and less often, as long as another is left.
- A launch never reuses a version label of an earlier launch.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from tropd_mcore import stopping
from tropd_mcore.errors import GroupBroken, ServerDied, ServerError, ServerHung, StopRequested, TropdError
from tropd_mcore.mcore.collective import gather_on_rank_zero, on_rank_zero, raise_on_all_ranks, raise_the_first
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.weights_io import iterate_hf
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.progress import progress
from tropd_mcore.rollout.fleet_publisher import FleetPublisher, Target
from tropd_mcore.rollout.member import Member
from tropd_mcore.rollout.sampler import Collected, SglangSampler
from tropd_mcore.rollout.streams import Streams
from tropd_mcore.serving.background import at_once
from tropd_mcore.serving.router import Router
from tropd_mcore.serving.router_lane import LaneServer, RouterLane
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Rollout, SampleRequest

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks at servers that are starting, if no other is ready."""


@dataclass(frozen=True)
class PolicyServers:
    """The rollout servers as one rank sees them, by their configuration sections."""

    owned: Mapping[str, SupervisedServer]
    """Started by this rank, or at a url (rank 0)"""
    reached: Mapping[str, SupervisedServer]
    """All of them, to send requests to; rank 0 only"""
    router: Router | None = None
    """The router before them, if there is one; rank 0 only"""


@dataclass(frozen=True)
class PolicyTools:
    """What rank 0 needs."""

    sampler: SglangSampler
    publisher: FleetPublisher
    connect: Callable[[SupervisedServer], Target]
    """Checks a server that became ready. Raises GateError, ServerError"""


class PolicyServer:
    """The rollout servers for all ranks. `tools` is given on rank 0 only; nothing is asked before the first sample.

    With `release_memory`, the servers have their memory only from a publication to the end of the sampling, and the
    trainer returns its cached memory before that. `clock` is the step's clock; it gets the phases `server` (waiting for
    servers) and `publish`.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        servers: PolicyServers,
        tools: PolicyTools | None,
        *,
        verify_sync: bool,
        release_memory: bool = False,
        clock: StepClock | None = None,
    ) -> None:
        self._model = model
        self._layout = layout
        self._control = layout.groups.control
        self._owned = servers.owned
        self._members = {key: Member(server) for key, server in servers.reached.items()}
        self._tools = tools
        self._router = servers.router
        self._verify_sync = verify_sync
        self._release_memory = release_memory
        self._clock = clock or StepClock()
        self._launch = on_rank_zero(lambda: uuid.uuid4().hex[:8], self._control)
        self._started = False

    def sample(self, requests: list[SampleRequest], *, step: int) -> list[Rollout]:
        """Sample all requests from the student's current weights. Returns the rollouts in order on every rank.

        Collective. Samples without a usable answer are left out (see `SglangSampler`). Raises ServerError (ServerDied
        when all restarts of all servers are used up) and GateError (the weights did not arrive).
        """
        version = f"{self._launch}/step-{step:06d}"
        found = Collected()
        self._wake(step)
        while True:
            with self._clock.phase("server"):
                self._assemble()
                lost = self._resume_memory()
            if not lost:
                with self._clock.phase("publish"):
                    lost = self._publish(version)
            if on_rank_zero(lambda: bool(self._holding(version)), self._control):
                found = on_rank_zero(partial(self._collect, requests, step, version, found), self._control)
                lost = {**lost, **found.lost}
                if not found.misses(requests):
                    with self._clock.phase("server"):
                        self._drop(lost, alive=found.may_return, may_end=False)
                        self._give_memory_back()
                        self._rest_slow_ones(found.keeps_up, step)
                    return [rollout for request in requests if (rollout := found.rollouts.get(request.sample_id))]
            with self._clock.phase("server"):
                self._drop(lost, alive=found.may_return)

    def _wake(self, step: int | None = None) -> bool:
        """End the rests that are over before `step`, or all of them. Returns whether there was one. Rank 0."""
        over = [
            member
            for member in self._members.values()
            if member.state == "resting" and (step is None or member.rests_until <= step)
        ]
        for member in over:
            member.become("away")  # looked at, and connected anew if it answers
        return bool(over)

    def _rest_slow_ones(self, keeps_up: Mapping[str, bool], step: int) -> None:
        """Leave the servers that did not keep up out of the next steps, if another is left. Rank 0; nothing elsewhere.

        The first step of a server says nothing. If nothing is known of one that was tried again, it rests again.
        """
        used = {key: member for key, member in self._members.items() if member.state in ("ready", "away")}
        slow = {key for key, member in used.items() if member.is_warm and not keeps_up.get(key, not member.rest)}
        for key in keeps_up.keys() & used.keys():
            used[key].is_warm = True
        if not self._ready().keys() - slow:
            return
        for key, member in used.items():
            if key not in slow:
                member.rest = 0
                continue
            member.rest_after(step)
            log.warning(
                "%s: too slow for the others; left out until step %d: %d of %d rollout servers go on",
                member.server.spec.called, member.rests_until, len(self._ready()), len(self._members),
            )  # fmt: skip

    def close(self) -> None:
        """Leave what the publisher holds on the servers, and no server at a url paused. Not collective."""
        if self._tools is None:
            return
        self._tools.publisher.close()
        for member in self._members.values():
            if member.state == "away" and not member.server.is_started:
                member.server.answers()  # asks it to go on first

    def _holding(self, version: str) -> dict[str, Member]:
        """The ready servers with the weights of `version`. Rank 0."""
        return {key: member for key, member in self._ready().items() if member.version == version}

    def _ready(self) -> dict[str, Member]:
        return {key: member for key, member in self._members.items() if member.state == "ready"}

    def _collect(self, requests: list[SampleRequest], step: int, version: str, found: Collected) -> Collected:
        """Sample what `found` lacks from the servers that hold `version`, then check that they still do. Rank 0."""
        assert self._tools is not None
        sampler, holding = self._tools.sampler, self._holding(version)
        sampler.clients = [member.server.client for member in holding.values()]
        if sampler.lane is not None:
            _put_behind(sampler.lane, [member.server for member in holding.values()])
        collected = sampler.collect(requests, step=step, expected_version=version, found=found)
        targets = [member.target for key, member in holding.items() if key not in collected.lost and member.target]
        collected.lost |= self._tools.publisher.check_unchanged(targets, version)
        return collected

    def _publish(self, version: str) -> dict[str, ServerError]:
        """Publish the current weights as `version` to the ready servers that lack it. Returns those that were lost.

        Collective.
        """
        lacking = on_rank_zero(
            lambda: [key for key, member in self._ready().items() if member.version != version], self._control
        )
        for _ in range(len(lacking) + 1):
            if not lacking:
                return {}
            failed = self._publish_to(lacking, version)
            lost = {key: error for key, error in failed.items() if not isinstance(error, GroupBroken)}
            # a broken group says nothing about its other servers, so they get another stream
            lacking = [key for key in failed if key not in lost]
            if lost or not lacking:
                break
        return lost or failed

    def _publish_to(self, keys: list[str], version: str) -> dict[str, ServerError]:
        """One publication to these servers. Returns {section: error} of those that did not get it. Collective."""
        verify_sync = self._verify_sync
        error: TropdError | None = None
        failed: dict[str, ServerError] = {}
        members = [self._members[key] for key in keys] if self._tools is not None else []
        targets = [member.target for member in members if member.target is not None]
        assert len(targets) == len(members), "a server that was not connected"
        # a broadcast between GPUs takes the tensors from the trainer's GPU
        on_device = (
            self._tools is not None
            and self._model.platform.name == "cuda"
            and self._tools.publisher.broadcasts_to(targets)
        )
        streams = Streams(
            lambda: iterate_hf(self._model, self._layout, on_device=on_device), expected=2 if verify_sync else 1
        )
        if self._tools is not None:
            for member in members:
                member.version = None
            try:
                if verify_sync:
                    failed = self._tools.publisher.verify_sync(targets, streams.next, version)
                else:
                    failed = self._tools.publisher.publish(targets, streams.next(), version)
            except TropdError as met:
                error = met
            if error is None:
                for key, member in zip(keys, members, strict=True):
                    member.version = None if key in failed else version
                if len(self._members) == 1:
                    error = next((met for met in failed.values() if not isinstance(met, ServerDied)), None)
        streams.exhaust()
        raise_the_first(error, self._control)
        failed = on_rank_zero(lambda: failed, self._control)
        if len(failed) < len(keys):
            self._verify_sync = False
        return failed

    def _resume_memory(self) -> dict[str, ServerError]:
        """Have the servers take their memory back. Returns those that died meanwhile, on every rank."""
        if not self._release_memory:
            return {}
        with raise_on_all_ranks(self._control):
            self._model.platform.empty_cache()
        return self._ask_all(lambda server: server.resume_memory())

    def _give_memory_back(self) -> None:
        """Have the servers give their memory back. One that dies meanwhile is restarted, and asked again."""
        if not self._release_memory:
            return
        for member in self._members.values():
            if member.server.config.release_memory:
                member.version = None  # the weights are lost
        while True:
            self._assemble(all_of_them=True)
            lost = self._ask_all(lambda server: server.release_memory())
            if not lost:
                return
            self._drop(lost, may_end=False)

    def _ask_all(self, ask: Callable[[SupervisedServer], None]) -> dict[str, ServerError]:
        """Run `ask` on rank 0 for every ready server with release_memory. Returns those that died, on every rank."""

        def asked() -> dict[str, ServerError]:
            died: dict[str, ServerError] = {}
            for key, member in self._ready().items():
                if not member.server.config.release_memory:
                    continue
                try:
                    ask(member.server)
                except ServerDied as error:
                    died[key] = error
            return died

        return on_rank_zero(asked, self._control)

    def _assemble(self, *, all_of_them: bool = False) -> None:
        """Connect the servers that are ready. Waits if none is, and the first time for all. Collective."""
        while True:
            lost = on_rank_zero(partial(self._connect_ready, wait=all_of_them or not self._started), self._control)
            self._started = True
            if not lost:
                return
            self._drop(lost)

    def _connect_ready(self, *, wait: bool) -> dict[str, ServerError]:
        """Connect the servers that became ready. Returns those that will not by themselves. Rank 0.

        Without `wait`, servers are waited for only if no other is ready.
        """
        lost: dict[str, ServerError] = {}
        if self._router is not None and not self._started:
            self._router.wait_ready()
        with progress(log, "waiting for a rollout server"):
            while True:
                answer = self._answering()
                for key, member in self._members.items():
                    if member.state in ("starting", "away") and key not in lost:
                        try:
                            self._look_at(member, answers=key in answer, wait=wait or len(self._members) == 1)
                        except ServerDied as error:
                            lost[key] = error
                if lost or self._ready():
                    return lost
                if self._wake():
                    continue
                if not any(member.may_become_ready() for member in self._members.values()):
                    raise self._an_error()
                stopping.check()
                time.sleep(POLL_S)

    def _answering(self) -> set[str]:
        """The servers that were away and answer now. Each is asked at the same time, since a silent one takes long."""
        away = {key: member.server.answers for key, member in self._members.items() if member.state == "away"}
        return {key for key, answers in at_once(away)[0].items() if answers}

    def _look_at(self, member: Member, *, answers: bool, wait: bool) -> None:
        """Connect a server if it is ready. Raises ServerDied if it has to be started again.

        `answers`: whether it answers, if it was away. `wait`: wait for one that starts.
        """
        server = member.server
        if member.state == "away":
            if not answers:
                limit_s = server.config.hang_timeout_s
                if server.is_started and time.monotonic() - member.since > limit_s:
                    raise ServerHung(f"{server.spec.called}: it has not answered for {limit_s:g} s")
                return
        elif wait:
            server.wait_ready()
        elif not server.is_ready():
            if (ended := server.ended()) is not None:
                raise ended
            if time.monotonic() - member.since > server.config.start_timeout_s:
                limit = f"{server.spec.key}.start_timeout_s={server.config.start_timeout_s:g} s"
                raise ServerDied(f"{server.spec.called}: not ready after {limit}")
            return
        assert self._tools is not None
        member.target = self._tools.connect(server)
        if member.since and len(self._members) > 1:
            log.info("%s: it takes requests again", server.spec.called)
        member.become("ready")

    def _drop(self, lost: dict[str, ServerError], *, alive: Collection[str] = (), may_end: bool = True) -> None:
        """Take servers out, and start those again that this job started. Nothing is waited for. Collective.

        Those of `alive` that still run are only asked again later. Raises the error of a server if none is left that
        could be ready; with `may_end=False`, the next step does.
        """
        if not lost:
            return
        away = on_rank_zero(
            lambda: {key for key in lost if key in alive and self._members[key].server.may_come_back()}, self._control
        )
        failed: dict[str, TropdError] = {}
        stop: StopRequested | None = None
        for key, error in lost.items():
            if key in self._owned and key not in away:
                try:
                    self._owned[key].begin_recovery(error)
                except StopRequested as met:
                    stop = met
                except TropdError as met:
                    failed[key] = met
        raise_the_first(stop, self._control)
        results = gather_on_rank_zero(failed, self._control)
        with raise_on_all_ranks(self._control):
            if self._members:
                self._note_lost(lost, away, {key: met for each in results for key, met in each.items()}, may_end)

    def _note_lost(
        self, lost: dict[str, ServerError], away: set[str], failed: dict[str, TropdError], may_end: bool
    ) -> None:
        """Remember which servers are lost. Raises the error of one if there is no hope. Rank 0."""
        for key, error in lost.items():
            member = self._members[key]
            member.error = failed.get(key, error)
            if not isinstance(error, ServerHung):
                member.is_warm = False  # at a url, too, it may be another process when it comes back
            if key in away or not member.server.is_started:
                member.become("away")
            else:
                member.become("gone" if key in failed else "starting")
            if len(self._members) > 1:
                left = len(self._ready())
                what = {"away": "asked again at the next step", "gone": "given up", "starting": "started again"}
                log.warning(
                    "%s (%s): %d of %d rollout servers go on", member.error, what[member.state], left,
                    len(self._members),
                )  # fmt: skip
        hope = {"ready", "starting", "resting"} | ({"away"} if len(self._members) > 1 else set())
        if (may_end or len(self._members) == 1) and not any(each.state in hope for each in self._members.values()):
            raise self._an_error()

    def _an_error(self) -> TropdError:
        """Why no server is left."""
        return next(member.error for member in self._members.values() if member.error is not None)


def _put_behind(lane: RouterLane, servers: list[SupervisedServer]) -> None:
    """Let exactly these servers answer what is asked of the router. Raises ServerError."""
    for url in set(lane.servers) - {server.client.url for server in servers}:
        lane.take_out(url)
    for server in servers:
        if server.client.url not in lane.servers:
            lane.put_in(LaneServer.of(server))
