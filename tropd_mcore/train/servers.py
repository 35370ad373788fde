"""Starts the servers of a job: each on its node, by the first rank there.

Rank 0 gets a handle of every server. What servers are asked is in `rollout.policy_server` and `teacher`.
Invariants: a server that the job starts is stopped by the rank that started it. The key of a server reaches other ranks
through the job's own process groups only.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.config.derived import server_name
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.config.server_checks import gpus_of
from tropd_mcore.config.teachers import the_teacher
from tropd_mcore.errors import ConfigError, ServerError
from tropd_mcore.mcore.collective import gather_on_rank_zero, on_rank_zero, raise_on_all_ranks
from tropd_mcore.mcore.parallel import Layout, RankEnvironment
from tropd_mcore.rollout.policy_server import PolicyServers
from tropd_mcore.rollout.served_tokenizer import server_spec
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.keeper import Keeper
from tropd_mcore.serving.process import LOOPBACK, ServerSpec
from tropd_mcore.serving.router import Router, RouterSpec, key_of_fleet
from tropd_mcore.serving.supervisor import Address, SupervisedServer
from tropd_mcore.serving.weight_group import local_address

if TYPE_CHECKING:
    from tropd_mcore.train.components import JobContext


@dataclass(frozen=True)
class Nodes:
    """The machines of the job as one rank sees them."""

    first_ranks: tuple[int, ...] = (0,)
    """The first rank of each node, in the order of the nodes"""
    address: str = LOOPBACK
    """This machine's address for ranks on the first node"""


@dataclass(frozen=True)
class _Served:
    """The model that servers load."""

    key: str
    path: Path
    dtype: Dtype


def find_nodes(layout: Layout, environment: RankEnvironment) -> Nodes:
    """Return the nodes of the job. Collective. Raises ServerError if the first node cannot be reached from this one."""
    starts = gather_on_rank_zero(environment.local_rank == 0, layout.groups.control)
    firsts = on_rank_zero(lambda: tuple(rank for rank, first in enumerate(starts) if first), layout.groups.control)
    address = LOOPBACK
    with raise_on_all_ranks(layout.groups.control):
        if len(firsts) > 1 and layout.rank >= firsts[1]:
            try:
                address = local_address(f"tcp://{environment.master}")
            except OSError as error:
                raise ServerError(
                    f"MASTER_ADDR={environment.master}: no way from this machine to the first one: {error.strerror}"
                ) from error
    return Nodes(firsts, address)


def start_policy_servers(
    used: Mapping[str, ServerConfig], context: JobContext, cleanup: ExitStack, longest: int
) -> PolicyServers:
    """Start the rollout servers `used`, by their sections. Collective.

    On GPUs all are ready when this returns. Raises ConfigError if a server is meant for a node that the job lacks.
    """
    control, nodes = context.layout.groups.control, context.nodes
    owners = _owners(used, nodes)
    student = _Served("student.path", context.config.student.path, context.config.student.dtype)
    owned: dict[str, SupervisedServer] = {}
    template, router_config = context.config.rollout.server, context.config.rollout.router if used else None
    key_of_all: str | None = None
    if router_config is not None:
        asked = router_config
        key_of_all = on_rank_zero(lambda: key_of_fleet(asked, used), control)
    with raise_on_all_ranks(control):
        for key, server in used.items():
            if owners[key] == context.layout.rank:
                owned[key] = SupervisedServer(
                    _spec(context, key, server, student, longest, here=server.url is None, api_key=key_of_all)
                )
                cleanup.callback(owned[key].stop)
                for other in _on_its_gpus(key, used, owned) if context.platform.name == "cuda" else ():
                    other.wait_ready()  # a server takes a part of what is free when it starts
                owned[key].start()
    with raise_on_all_ranks(control):
        if context.platform.name == "cuda":
            for server_here in owned.values():
                if server_here.is_started:
                    server_here.wait_ready()
    addresses = _addresses(owned, context)
    reached, router = {}, None
    with raise_on_all_ranks(control):
        if context.layout.rank == 0 and router_config is not None:
            router = Router(RouterSpec(router_config, template, context.run_dir.logs, key_of_all))
            cleanup.callback(router.stop)
            router.start()
    if context.layout.rank == 0:
        for key, server in used.items():
            reached[key] = owned.get(key) or _of_another_rank(
                _spec(context, key, server, student, None, here=False), addresses[key]
            )
    return PolicyServers(owned, reached, router)


def _owners(used: Mapping[str, ServerConfig], nodes: Nodes) -> dict[str, int]:
    """The rank that starts each server; 0 for one at a url. Raises ConfigError if the job lacks the node of one."""
    count = len(nodes.first_ranks)
    beyond = [
        f"{key}.node = {server.node}: the last node of this launch is {count - 1}; lower it, or launch on more (NNODES)"
        for key, server in used.items()
        if server.url is None and server.node >= count
    ]
    if beyond:
        raise ConfigError(beyond)
    return {key: 0 if server.url is not None else nodes.first_ranks[server.node] for key, server in used.items()}


def _addresses(owned: Mapping[str, SupervisedServer], context: JobContext) -> dict[str, Address]:
    """How rank 0 reaches the started servers of all nodes; nothing in a job of one node. Collective."""
    found: dict[str, Address] = {}
    if len(context.nodes.first_ranks) > 1:
        mine = {key: server.address for key, server in owned.items() if server.is_started}
        for of_rank in gather_on_rank_zero(mine, context.layout.groups.control):
            found |= of_rank
    return found


def _on_its_gpus(
    key: str, used: Mapping[str, ServerConfig], owned: Mapping[str, SupervisedServer]
) -> list[SupervisedServer]:
    """The servers that this rank has started on a GPU of the server `key`."""
    mine = set(gpus_of(used[key]))
    return [
        server
        for other, server in owned.items()
        if other != key and server.is_started and mine & set(gpus_of(used[other]))
    ]


def start_teacher_servers(context: JobContext, cleanup: ExitStack, longest: int) -> ServerFleet | None:
    """Start the servers of the one teacher of `context`; rank 0 gets handles of all, the other ranks None. Collective.

    If all of them are at a url, every rank gets handles of them. On GPUs they are ready when this returns, and those of
    other nodes always. Raises ConfigError if a server is meant for a node that the job lacks.
    """
    teacher, layout = the_teacher(context.config), context.layout
    owners = _owners(teacher.servers, context.nodes)
    at_urls = all(server.url is not None for server in teacher.servers.values())

    model = _Served(teacher.path_key, teacher.path, teacher.config.dtype)
    owned: dict[str, SupervisedServer] = {}
    with raise_on_all_ranks(layout.groups.control):
        for key, server in teacher.servers.items():
            if owners[key] == layout.rank or at_urls:
                owned[key] = SupervisedServer(_spec(context, key, server, model, longest, here=server.url is None))
                cleanup.callback(owned[key].stop)
                owned[key].start()
        for server_here in owned.values():
            is_kept = server_here.is_started and layout.rank != 0
            if context.platform.name == "cuda" or is_kept:
                server_here.wait_ready()
            if is_kept:
                keeper = Keeper(server_here)
                keeper.start()
                cleanup.callback(keeper.stop)
    addresses = _addresses(owned, context)
    if layout.rank != 0 and not at_urls:
        return None
    return ServerFleet(
        [
            owned.get(key) or _of_another_rank(_spec(context, key, server, model, longest, here=False), addresses[key])
            for key, server in teacher.servers.items()
        ]
    )


def _of_another_rank(spec: ServerSpec, address: Address) -> SupervisedServer:
    server = SupervisedServer(spec, elsewhere=address)
    server.start()
    return server


def _spec(
    context: JobContext,
    key: str,
    config: ServerConfig,
    model: _Served,
    longest: int | None,
    *,
    here: bool,
    api_key: str | None = None,
) -> ServerSpec:
    spec = server_spec(
        server_name(key),
        key=key,
        model_key=model.key,
        model=model.path,
        dtype=model.dtype,
        config=config,
        device=context.platform.name,
        logs=context.run_dir.logs,
        here=here,
        longest=longest,
        host=context.nodes.address if config.node else LOOPBACK,
    )
    return replace(spec, api_key=api_key)
