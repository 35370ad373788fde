"""The keys of an objective that is a function of the user's own (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from tropd_mcore.config.fields import PositiveInt
from tropd_mcore.config.objectives.base import PolicyGradientConfig, PolicyGradientObjective, Unused


class CustomObjective(PolicyGradientObjective):
    """An objective of one's own: a function like those in `objectives`."""

    kind: Literal["custom"] = "custom"
    function: str
    """Import path `package.module:function` of a function (TokenInputs, *, ...) -> TokenLosses."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function; `policy` is policy_gradient, for a function that has such a keyword."""
    topk: PositiveInt = 64
    """Teacher support size."""
    student_topk: int = Field(default=0, ge=0)
    """Student candidates; 0 = none."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()

    @property
    def has_prefix_loss(self) -> bool:
        """Where the arguments say so, by the keyword that `tropd` itself has."""
        return bool(self.arguments.get("prefix_loss", "none") != "none")

    @property
    def function_path(self) -> str | None:
        return self.function

    def unused(self) -> Iterator[Unused]:
        """Nothing: the function decides what it reads."""
        yield from ()
