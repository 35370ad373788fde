"""From an objective with its constants to its loss function, by name: no table.

Not for the mathematics (the families). The function of the kind `k` in the family `f` is `objectives.f.k`, its
constants and their defaults are `catalogue.k`, its keys `config.objectives.f`. Invariant: a constant that the function
has and the configuration lacks is an error here, not a default.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.inputs import TokenInputs

LossFunction = Callable[[TokenInputs], TokenLosses]
"""The loss of one micro-batch or of a chunk of it."""


class Configured(Protocol):
    """What the registry asks of a section of the configuration (`config.objectives.base.Objective`)."""

    kind: str

    @property
    def family(self) -> str: ...

    def constants(self, progress: float) -> dict[str, Any]: ...


def bind_objective(section: Configured, progress: float = 0.0) -> LossFunction:
    """Return the loss function of one micro-batch, with every constant taken from `section`.

    `progress` in [0, 1) is step / run.steps, for the objectives that change with time.
    """
    module = importlib.import_module(f"tropd_mcore.objectives.{section.family}")
    constants = section.constants(progress)
    if (bind := getattr(module, "bind", None)) is not None:
        bound: LossFunction = bind(constants)
        return bound
    function = getattr(module, section.kind)
    names = inspect.signature(function).parameters.keys() - {"inputs"}
    factory = getattr(catalogue, section.kind)
    return partial(function, **factory(**{name: constants[name] for name in names}).values)
