"""One line of `tropd doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`FAIL` is in the way of training, `warn` may be; both say what to do."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    detail: str
