"""Connects the launchers of a job through a store on the first node, where each node describes itself.

Ranks use the same store through torch.distributed, not through this module. Invariants: a job on one machine listens
only on loopback. Nodes that were started with different arguments are detected before any rank starts. Every wait is
logged and has a limit.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from uuid import uuid4

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from tropd_mcore.errors import TropdError
from tropd_mcore.progress import progress
from tropd_mcore.train.exits import EXPLAINED, LOST
from tropd_mcore.train.other_nodes import LEFT, OtherNodes, beat_key
from tropd_mcore.train.silence import Silence

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
ATTEMPT_S = 5.0
"""Longest attempt to connect; short, because a signal is delayed by it."""
POLL_S = 0.5
OPERATION_LIMIT = timedelta(seconds=60)
HOLDER_S = 10.0
"""A launcher without a sign of life for this time gives its number to one that is started in its place."""
RUNNING_KEY = "running"
"""Store key that exists when all nodes have joined."""


class LaunchError(TropdError):
    """The job could not be launched on these nodes. `code` is the exit code of the launcher."""

    def __init__(self, line: str, code: int = EXPLAINED) -> None:
        super().__init__(line)
        self.code = code


class _EndedJobError(Exception):
    """The store belonged to an earlier launch of the job, which has ended now."""


@dataclass(frozen=True)
class Node:
    """Description of a launcher for the other launchers."""

    rank: int
    nodes: int
    ranks: int
    """Number of ranks that it starts."""
    job: str
    """Digest of its configuration."""
    host: str
    pid: int
    launch: str
    """A random word: a container that is started again may have the same host name and pid."""

    def name(self) -> str:
        """Return the name of the node for a message."""
        first, last = self.rank * self.ranks, (self.rank + 1) * self.ranks - 1
        return f"node {self.rank} ({self.host}, {f'rank {first}' if first == last else f'ranks {first} to {last}'})"


@dataclass(frozen=True)
class Place:
    """Position of this launcher in the job."""

    nodes: int
    node_rank: int
    address: str
    """Address of the first node."""
    port: int
    """Port on the first node; 0 = chosen by the OS, for a job of one node."""
    ranks: int
    """Number of ranks on this node."""
    job: str
    """Digest of the configuration."""


class NodesMeet(RendezvousHandler):
    """The rendezvous of `tropd train` for torch's elastic agent: no restarts, no change of the number of nodes."""

    def __init__(self, place: Place, others: OtherNodes, *, limit_s: float) -> None:
        self._place = place
        self._others = others
        self._limit_s = limit_s
        self.store: Store | None = None
        """The store; None until all nodes have joined."""

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "static"

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes. Raises LaunchError if they do not join or were started for another job."""
        place = self._place
        deadline = time.monotonic() + self._limit_s
        while True:
            base = _host_store(place) if place.node_rank == 0 else _join_store(place, deadline)
            base.set_timeout(OPERATION_LIMIT)
            store = PrefixStore("tropd", base)
            try:
                if place.nodes > 1:
                    self._introduce(store, deadline)
                break
            except _EndedJobError:
                log.info("the launch before has ended; joining the next one")
            except RuntimeError as error:  # base class of every store error
                reason = str(error).partition("\n")[0][:200]
                raise LaunchError(
                    f"the launcher of node 0 at {place.address}:{place.port} has ended ({reason}); see its output", LOST
                ) from error
        self.store = store
        address = LOOPBACK if place.nodes == 1 else place.address
        return RendezvousInfo(store, place.node_rank, place.nodes, RendezvousStoreInfo(address, base.port))

    def _introduce(self, store: Store, deadline: float) -> None:
        place = self._place
        me = Node(place.node_rank, place.nodes, place.ranks, place.job, socket.gethostname(), os.getpid(), uuid4().hex)
        self._take_number(store, json.dumps(asdict(me)), deadline)
        self._others.begin(store)
        missing = list(range(place.nodes))
        with progress(
            log, f"waiting for {place.nodes} nodes at {place.address}:{place.port}", total=place.nodes
        ) as state:
            while missing := [rank for rank in missing if not store.check([f"node/{rank}"])]:
                state.note = f"missing: node {', '.join(map(str, missing))}"
                state.advance(place.nodes - len(missing) - state.done)
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"node {', '.join(map(str, missing))} of {place.nodes} did not join in {self._limit_s:g} s "
                        f"(run.join_timeout_s); start the same command there with NODE_RANK={missing[0]} "
                        f"MASTER_ADDR={place.address} MASTER_PORT={place.port}",
                        LOST,
                    )
                time.sleep(POLL_S)
        found = {rank: Node(**json.loads(store.get(f"node/{rank}"))) for rank in range(place.nodes)}
        for rank, other in found.items():
            if (other.nodes, other.job, other.ranks) != (me.nodes, me.job, me.ranks):
                raise LaunchError(
                    f"node {rank} ({other.host}) was started with other settings than node {me.rank} ({me.host}): "
                    f"NNODES {other.nodes} and {me.nodes}, ranks {other.ranks} and {me.ranks}, configuration "
                    f"{other.job[:8]} and {me.job[:8]}; use the same command on all nodes"
                )
        store.set(RUNNING_KEY, "yes")
        self._others.join({rank: node.name() for rank, node in found.items()})

    def _take_number(self, store: Store, mine: str, deadline: float) -> None:
        """Take this node's number. If it is that of a lost launcher, replace it, or wait for the end of its job.

        Schedulers that restart a lost node (Kubernetes) may do so before the other nodes have noticed the loss.
        Raises LaunchError if the number belongs to a launcher that gives signs of life.
        """
        rank = self._place.node_rank
        key = f"node/{rank}"
        found = store.compare_set(key, "", mine).decode()
        if found == mine:
            return
        other = Node(**json.loads(found))
        silence, last = Silence(), time.monotonic()
        what = f"NODE_RANK={rank} was taken by {other.host} (pid {other.pid}): waiting for its signs of life"
        with progress(log, what):
            while time.monotonic() < deadline:
                try:
                    beat = store.get(beat_key(rank)) if store.check([beat_key(rank)]) else None
                    running = store.check([RUNNING_KEY])
                    now = time.monotonic()
                    silent_s, last = silence.look(beat, now - last), now
                    if silence.changes > 1 and beat != LEFT.encode():
                        break
                    if silent_s > HOLDER_S and not running and store.compare_set(key, found, mine).decode() == mine:
                        return
                except RuntimeError as error:
                    raise _EndedJobError from error
                time.sleep(POLL_S)
            else:
                raise LaunchError(
                    f"NODE_RANK={rank} was taken by {other.host} (pid {other.pid}), which gives no sign of life, and "
                    f"its job has not ended in {self._limit_s:g} s; stop that job, then start this command again",
                    LOST,
                )
        raise LaunchError(
            f"NODE_RANK={rank} is taken by {other.host} (pid {other.pid}); every node of a job needs its own number, "
            f"0 to {self._place.nodes - 1}, and every job its own MASTER_PORT"
        )

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "tropd"

    def shutdown(self) -> bool:
        return True


def _host_store(place: Place) -> TCPStore:
    """Start the store of the job. On one node it listens on loopback, otherwise on all addresses."""
    family = socket.AF_INET6 if place.nodes > 1 and socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        listener.bind((LOOPBACK if place.nodes == 1 else "", place.port))
    except OSError as error:
        raise LaunchError(
            f"MASTER_PORT={place.port} cannot be used on this machine ({error.strerror}); another job may have it: set "
            "another MASTER_PORT, the same on all nodes"
        ) from error
    listener.listen(1024)
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=OPERATION_LIMIT,
    )


def _join_store(place: Place, deadline: float) -> TCPStore:
    with progress(log, f"waiting for node 0 at {place.address}:{place.port}"):
        while True:
            try:
                return TCPStore(
                    place.address,
                    place.port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=ATTEMPT_S),
                )
            except DistNetworkError as error:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"no launcher answers at MASTER_ADDR={place.address} MASTER_PORT={place.port} (NODE_RANK=0): "
                        f"{str(error).splitlines()[0][:200]}",
                        LOST,
                    ) from error
                time.sleep(POLL_S)
