"""Finds the loss function of an objective and its constants by name, without a table.

This module has no equations (see the families). For the kind `k` of the family `f`, the equation is `objectives.f.k`,
constants and defaults are `catalogue.k`, and the keys are in `config.objectives.f`. Invariant: if the configuration
lacks a constant of the equation, that is an error here and not a default.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised

LossFunction = Callable[[TokenInputs], TokenLosses]
"""The loss of the tokens of one micro-batch or of one chunk of it."""


class Configured(Protocol):
    """The part of a configuration section that the registry reads (`config.objectives.base.Objective`)."""

    kind: str

    @property
    def family(self) -> str: ...

    def constants(self, progress: float) -> dict[str, Any]: ...


def objective_of(section: Configured, progress: float = 0.0) -> Objective:
    """Return the objective with every constant taken from `section`.

    `progress` in [0, 1) is step / run.steps, for objectives that change over the run. Raises ConfigError if a custom
    function cannot be used.
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
    if objective.function is not None:
        return partial(_supervised_only, partial(objective.function, **objective.values))
    return partial(getattr(_family(objective.family), objective.kind), **objective.values)


def bind_objective(section: Configured, progress: float = 0.0) -> LossFunction:
    """`function_of(objective_of(...))`."""
    return function_of(objective_of(section, progress))


def _supervised_only(function: LossFunction, inputs: TokenInputs) -> TokenLosses:
    """Call a custom function and enforce the rule of all objectives: a token in neither mask trains nothing.

    Without this, a function that forgets the masks would train on prompts without an error.
    """
    found = function(blank_unsupervised(inputs))
    supervised_T = inputs.student_mask_T | inputs.prefix_mask_T
    if not isinstance(found, TokenLosses) or found.loss_T.shape != supervised_T.shape:
        shape = f" with losses {tuple(found.loss_T.shape)}" if isinstance(found, TokenLosses) else ""
        raise LossInputError(
            f"a custom objective returned a {type(found).__name__}{shape}, expected TokenLosses with a loss for "
            f"each of the {len(supervised_T)} tokens of its chunk"
        )
    if found.counted_T.dtype != torch.bool or found.counted_T.shape != supervised_T.shape:
        raise LossInputError(
            f"a custom objective returned counted_T as {found.counted_T.dtype} {tuple(found.counted_T.shape)}, "
            f"expected bool [{len(supervised_T)}], as inputs.student_mask_T is"
        )
    for name, column in found.columns.items():
        if column.shape != supervised_T.shape:
            raise LossInputError(
                f"a custom objective returned the column {name} as {tuple(column.shape)}, expected "
                f"[{len(supervised_T)}]"
            )
    loss_T = torch.where(supervised_T, found.loss_T, 0.0)
    return replace(found, loss_T=loss_T, counted_T=found.counted_T & supervised_T)


def _family(name: str) -> Any:
    return importlib.import_module(f"tropd_mcore.objectives.{name}")
