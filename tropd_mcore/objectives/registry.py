"""From an objective with its constants to its loss function, by name: no table.

Not for the mathematics (the families). The equation of the kind `k` in the family `f` is `objectives.f.k`, its
constants and their defaults are `catalogue.k`, its keys `config.objectives.f`. Invariant: a constant that the equation
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
from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.objectives.inputs import TokenInputs

LossFunction = Callable[[TokenInputs], TokenLosses]
"""The loss of the tokens of one micro-batch or of a chunk of it."""


class Configured(Protocol):
    """What the registry asks of a section of the configuration (`config.objectives.base.Objective`)."""

    kind: str

    @property
    def family(self) -> str: ...

    def constants(self, progress: float) -> dict[str, Any]: ...


def objective_of(section: Configured, progress: float = 0.0) -> Objective:
    """Return the objective with every constant taken from `section`.

    `progress` in [0, 1) is step / run.steps, for the objectives that change with time. Raises ConfigError where a
    function of the user's own cannot be used.
    """
    module, constants = _family(section.family), section.constants(progress)
    if (bind := getattr(module, "bind", None)) is not None:
        bound: Objective = bind(constants)
        return bound
    names = inspect.signature(getattr(module, section.kind)).parameters.keys() - {"inputs"}
    made: Objective = getattr(catalogue, section.kind)(**{name: constants[name] for name in names})
    return made


def function_of(objective: Objective) -> LossFunction:
    """Return the loss function of one micro-batch or chunk."""
    function = objective.function or getattr(_family(objective.family), objective.kind)
    return partial(function, **objective.values)


def bind_objective(section: Configured, progress: float = 0.0) -> LossFunction:
    """`function_of(objective_of(...))`."""
    return function_of(objective_of(section, progress))


def _family(name: str) -> Any:
    return importlib.import_module(f"tropd_mcore.objectives.{name}")
