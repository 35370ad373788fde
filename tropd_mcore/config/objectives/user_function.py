"""The keys of an objective that is a user-supplied function (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from tropd_mcore.config.fields import PositiveInt
from tropd_mcore.config.objectives.base import PolicyGradientConfig, PolicyGradientObjective, Unused


class CustomObjective(PolicyGradientObjective):
    """A custom objective: a user-supplied function with the interface of those in `objectives`."""

    kind: Literal["custom"] = "custom"
    function: str
    """Import path `package.module:function` of a function (TokenInputs, *, ...) -> TokenLosses that computes the
    loss."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function. A function with the keyword `policy` also gets the section policy_gradient."""
    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token."""
    student_topk: int = Field(default=0, ge=0)
    """Number of student candidates per token. 0 = none."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()

    @property
    def has_prefix_loss(self) -> bool:
        """True if the arguments set `prefix_loss`, the keyword of `tropd`, to anything but `none`."""
        return bool(self.arguments.get("prefix_loss", "none") != "none")

    @property
    def leaves_confident_mistakes(self) -> None:
        return None

    @property
    def keeps_rare_mistakes(self) -> None:
        return None

    @property
    def function_path(self) -> str | None:
        return self.function

    def unused(self) -> Iterator[Unused]:
        """Yield nothing: only the function knows which keys it reads."""
        yield from ()
