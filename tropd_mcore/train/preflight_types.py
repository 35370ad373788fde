"""The result of a check of a launch: one line that begins with a key, and a level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """A problem, or possible problem, of a launch."""

    key: str
    """Configuration key or section that the user would change."""
    text: str
    """One line that begins with the key: what was expected, what was found, what to do."""
    level: Literal["refused", "not yet made", "warning"] = "refused"
    """`refused`: the job ends. `not yet made`: the job ends too, until another command has made the file. `warning`:
    the job continues."""
