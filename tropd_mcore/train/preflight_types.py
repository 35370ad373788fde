"""What a check of a launch says: one line that begins with a key, and how much it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a launch, or may be."""

    key: str
    """The configuration key, or section, that a user would change."""
    text: str
    """One line that begins with the key: what was expected, what was found, what to do."""
    level: Literal["refused", "not yet made", "warning"] = "refused"
    """`refused`: the job ends with it. `not yet made`: so too, until another command has made the file. `warning`: the
    job goes on."""
