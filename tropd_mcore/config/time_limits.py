"""Checks of the time limits of a run against each other: the limit that explains most must be reached first.

Limits of one server against each other are checked in `checks`. Invariant: each problem is one line that names both
keys; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.derived import rollout_servers, teacher_servers
from tropd_mcore.config.schema import Config


def time_limit_problems(config: Config) -> Iterator[str]:
    """Yield the limits that would be reached in the wrong order."""
    run = config.run
    for key, who in (("rank_timeout_s", "rank"), ("node_timeout_s", "node")):
        if (limit := getattr(run, key)) >= run.stall_timeout_s:
            yield (
                f"run.{key} = {limit:g} must be below run.stall_timeout_s = {run.stall_timeout_s:g}: a {who} without a "
                "sign of life is found before a run without progress; lower the one or raise the other"
            )
    if run.collective_timeout_s is not None and run.collective_timeout_s <= run.stall_timeout_s:
        yield (
            f"run.collective_timeout_s = {run.collective_timeout_s:g} must be above run.stall_timeout_s = "
            f"{run.stall_timeout_s:g}: a stall names the missing rank, a collective that times out does not; raise the "
            "one, lower the other or leave it out"
        )
    router = config.rollout.router
    if router is not None and router.start_timeout_s >= run.stall_timeout_s:
        yield (
            f"rollout.router.start_timeout_s = {router.start_timeout_s:g} must be below run.stall_timeout_s = "
            f"{run.stall_timeout_s:g}: a router is given up before the run is; lower the one or raise the other"
        )
    for name, server in (rollout_servers(config) | teacher_servers(config)).items():
        for key in ("start_timeout_s", "request_timeout_s"):
            if (limit := getattr(server, key)) >= run.stall_timeout_s:
                yield (
                    f"{name}.{key} = {limit:g} must be below run.stall_timeout_s = {run.stall_timeout_s:g}: a "
                    "server is given up before the run is; lower the one or raise the other"
                )
