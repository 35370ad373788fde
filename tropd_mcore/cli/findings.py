"""One line of `tropd doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`FAIL` is in the way of training, `warn` may be, `skip` was not looked at because of a FAIL; all say why."""

    level: Literal["ok", "warn", "FAIL", "skip"]
    name: str
    """The configuration key, or what of the machine it is about."""
    detail: str
