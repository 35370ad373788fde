"""The section of the router that stands before a fleet of rollout servers.

Checks of it are in `router_checks`. This module knows nothing of how a router is started (see `serving.router`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tropd_mcore.config.fields import PositiveFloat, Section

OF_A_ROUTERS_START = ("python", "policy", "extra_args")
"""Keys of a router section that say how a router is started, so they mean nothing for one that runs."""


class RouterConfig(Section):
    """SGLang's router (the package smg) before the servers of rollout.servers. The job starts and stops it, unless
    `url` names a router that runs elsewhere."""

    url: str | None = None
    """Base URL of a running router whose workers are exactly the servers of rollout.servers. null = start a router on
    the loopback address of the first node."""
    python: Path | None = None
    """Python interpreter that runs the started router, for example .venv-server/bin/python. It needs the package smg
    and nothing else. null = the interpreter of this program."""
    policy: Literal["round_robin", "cache_aware", "least_load", "random"] = "round_robin"
    """How the started router chooses the server of a request. `round_robin`: in turn, so that each gets the same
    number. `cache_aware`: the server that has read the beginning of the prompt before. `least_load`: the one with the
    least reported load, which the router asks for every 10 s. All samples of a step are sent at once, so only
    round_robin and random divide them evenly (docs/servers.md)."""
    extra_args: tuple[str, ...] = ()
    """Additional arguments for `smg launch`, written as on its command line."""
    start_timeout_s: PositiveFloat = 60.0
    """Longest time in seconds until the router responds, and until it has taken in or given up a server."""
    api_key_env: str | None = None
    """Only with `url`: name of the environment variable that holds the router's API key. The router passes it on, so
    it is the key of the servers, too."""
