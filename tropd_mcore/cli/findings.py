"""One line of `tropd doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One result. `FAIL` prevents training, `warn` may prevent it, `skip` was not checked because of a FAIL."""

    level: Literal["ok", "warn", "FAIL", "skip"]
    name: str
    """The configuration key, or the part of the machine that was checked."""
    detail: str
