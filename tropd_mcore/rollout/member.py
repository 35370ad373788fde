"""One rollout server as rank 0 remembers it: its state, the weights that it holds, and its rests while it is slow.

This module asks no server (see `policy_server`). A server that is slow would hold up every publication and sampling,
since all wait for the last. So it rests for REST_STEPS, then for twice as many, up to LONGEST_REST, with one step
between two rests in which it shows whether it is still slow. The first step after its start says nothing: engines
compile and fill caches in their first requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from tropd_mcore.errors import TropdError
from tropd_mcore.rollout.fleet_publisher import Target
from tropd_mcore.serving.supervisor import SupervisedServer

REST_STEPS = 2
"""Steps of the first rest."""
LONGEST_REST = 64
"""Most steps of one rest."""

State = Literal["starting", "ready", "away", "resting", "gone"]


@dataclass
class Member:
    """One server."""

    server: SupervisedServer
    state: State = "starting"
    """`away`: it cannot be used now, but may come back by itself. `resting`: it could be used but is slow. `gone`: all
    restarts are used up."""
    since: float = 0.0
    """Time of the last change of `state`"""
    error: TropdError | None = None
    """Why it was lost the last time"""
    target: Target | None = None
    version: str | None = None
    """Version of the weights that it holds, proven"""
    is_warm: bool = False
    """Whether it has sampled a step since it was started"""
    rest: int = 0
    """Steps of its last rest; 0 = it was not slow when it was used last"""
    rests_until: int = 0
    """Step that uses it again, if it is resting"""

    def may_become_ready(self) -> bool:
        """Whether it is worth to wait for it: it starts, or has not been away for long."""
        away = time.monotonic() - self.since
        return self.state == "starting" or (self.state == "away" and away <= self.server.config.hang_timeout_s)

    def become(self, state: State) -> None:
        """Change the state. The weights that it holds count as unknown."""
        self.is_warm = self.is_warm and state != "starting"
        self.state, self.since = state, time.monotonic()
        self.version = None

    def rest_after(self, step: int) -> None:
        """Rest, longer than the last time."""
        self.rest = min(2 * self.rest, LONGEST_REST) if self.rest else REST_STEPS
        self.rests_until = step + self.rest + 1
        self.become("resting")
