"""Rows of a server that fails once, or lies about a sample: one row per lie, all of them played in one run.

Not for how a lie is told (`lies`) or seen (`rows_servers`, `rows_teachers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen

PlayOf = Callable[[str], Callable[[Scene], Seen]]
"""What plays the lie of this name."""
LIMIT_S = 180.0


def told_once(group: str, who: str, names: Iterable[str], play: PlayOf, wanted: str) -> list[Fault]:
    """Rows of failures that pass; `group` is also the beginning of their ids."""
    return [
        Fault(
            id=f"{group}-once-{_slug(name)}",
            group=group,
            done=f"{who} answers once: {name}",
            wanted=wanted,
            play=play(name),
            code=(0,),
            line="" if name == "slow" else r"attempt \d+ follows|asked for once more",
            limit_s=LIMIT_S,
            chain=f"{group}-once",
            shared=True,
        )
        for name in names
    ]


def lied_about(group: str, who: str, names: Iterable[str], play: PlayOf, wanted: str, *, line: str = "") -> list[Fault]:
    """Rows of answers about single samples that cannot be used; `group` is also the beginning of their ids."""
    return [
        Fault(
            id=f"{group}-lie-{_slug(name)}",
            group=group,
            done=f"{who} lies about a sample: {name}",
            wanted=wanted,
            play=play(name),
            code=(0,),
            line=line,
            limit_s=LIMIT_S,
            chain=f"{group}-lies",
            shared=True,
        )
        for name in names
    ]


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")
