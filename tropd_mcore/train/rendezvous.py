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

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from tropd_mcore.errors import TropdError
from tropd_mcore.progress import progress

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
ATTEMPT_S = 5.0
"""Longest attempt to connect; short, because a signal is delayed by it."""
POLL_S = 0.5
OPERATION_LIMIT = timedelta(seconds=60)


class LaunchError(TropdError):
    """The job could not be launched on these nodes."""


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

    def __init__(self, place: Place, *, limit_s: float) -> None:
        self._place = place
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
        base = _host_store(place) if place.node_rank == 0 else _join_store(place, deadline)
        base.set_timeout(OPERATION_LIMIT)
        store = PrefixStore("tropd", base)
        if place.nodes > 1:
            try:
                self._introduce(store, deadline)
            except RuntimeError as error:  # base class of every store error
                reason = str(error).partition("\n")[0][:200]
                raise LaunchError(
                    f"the launcher of node 0 at {place.address}:{place.port} has ended ({reason}); see its output"
                ) from error
        self.store = store
        address = LOOPBACK if place.nodes == 1 else place.address
        return RendezvousInfo(store, place.node_rank, place.nodes, RendezvousStoreInfo(address, base.port))

    def _introduce(self, store: Store, deadline: float) -> None:
        place = self._place
        me = Node(place.node_rank, place.nodes, place.ranks, place.job, socket.gethostname(), os.getpid())
        mine = json.dumps(asdict(me))
        found = store.compare_set(f"node/{place.node_rank}", "", mine).decode()
        if found != mine:
            other = Node(**json.loads(found))
            raise LaunchError(
                f"NODE_RANK={place.node_rank} is taken by {other.host} (pid {other.pid}); every node of a job needs "
                f"its own number, 0 to {place.nodes - 1}, and every job its own MASTER_PORT"
            )
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
                        f"MASTER_ADDR={place.address} MASTER_PORT={place.port}"
                    )
                time.sleep(POLL_S)
        for rank in range(place.nodes):
            other = Node(**json.loads(store.get(f"node/{rank}")))
            if (other.nodes, other.job, other.ranks) != (me.nodes, me.job, me.ranks):
                raise LaunchError(
                    f"node {rank} ({other.host}) was started with other settings than node {me.rank} ({me.host}): "
                    f"NNODES {other.nodes} and {me.nodes}, ranks {other.ranks} and {me.ranks}, configuration "
                    f"{other.job[:8]} and {me.job[:8]}; use the same command on all nodes"
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
                        f"{str(error).splitlines()[0][:200]}"
                    ) from error
                time.sleep(POLL_S)
