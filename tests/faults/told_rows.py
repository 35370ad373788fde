"""Rows of a server that fails once or lies about a sample: one row per lie, all played in one run.

`lies` says how a lie is told. `rows_servers` and `rows_teachers` say how it is observed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen

PlayOf = Callable[[str], Callable[[Scene], Seen]]
"""The function that plays the lie of this name."""
LIMIT_S = 180.0


def told_once(group: str, who: str, names: Iterable[str], play: PlayOf, wanted: str) -> list[Fault]:
    """Rows of transient failures. `group` is also the beginning of their ids."""
    again = r"attempt \d+ follows|asked for once more"
    return [
        _row(group, "once", name, f"{who} answers once", wanted, play, "" if name == "slow" else again)
        for name in names
    ]


def lied_about(group: str, who: str, names: Iterable[str], play: PlayOf, wanted: str, *, line: str = "") -> list[Fault]:
    """Rows of unusable answers about single samples. `group` is also the beginning of their ids."""
    return [_row(group, "lie", name, f"{who} lies about a sample", wanted, play, line) for name in names]


def _row(group: str, way: str, name: str, done: str, wanted: str, play: PlayOf, line: str) -> Fault:
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    return Fault(
        id=f"{group}-{way}-{slug}",
        group=group,
        done=f"{done}: {name}",
        wanted=wanted,
        play=play(name),
        code=(0,),
        line=line,
        limit_s=LIMIT_S,
        chain=f"{group}-{way}",
        shared=True,
    )
