"""A custom objective, found by its import path.

This is no sandbox: the module is imported and its function called with the rights of the job. Invariant: any problem
with the path, the module, the arguments or the result is a ConfigError that names the key.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.catalogue import Objective, custom
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient

KEY = "objective.function"


def bind(constants: Mapping[str, Any]) -> Objective:
    """Return the objective that the section names (`registry`)."""
    return custom(load_custom(constants["function"], constants["arguments"], constants["policy"]))


def load_custom(
    path: str, arguments: Mapping[str, Any], policy: PolicyGradient
) -> Callable[[TokenInputs], TokenLosses]:
    """Return the function `package.module:function` with its keyword arguments bound, its result checked.

    `policy` is passed as the keyword of that name if the function has one. Otherwise it must be the default.
    Raises ConfigError.
    """
    function = _find(path)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            [f"{KEY}={path}: its arguments cannot be read: {error}; expected a Python function"]
        ) from None
    keywords = dict(arguments)
    if "policy" in keywords:
        raise ConfigError([f"objective.arguments: `policy` comes from objective.policy_gradient; remove it for {path}"])
    if "policy" in signature.parameters:
        keywords["policy"] = policy
    elif policy != PolicyGradient():
        raise ConfigError(
            [f"{KEY}={path} has no keyword `policy`, so objective.policy_gradient would have no effect; remove either"]
        )
    try:
        signature.bind(None, **keywords)
    except TypeError as error:
        raise ConfigError(
            [f"{KEY}={path}: {error}; expected {path.partition(':')[2]}(inputs, ...) to take objective.arguments"]
        ) from None
    return partial(_checked, function, path, keywords)


def _find(path: str) -> Callable[..., Any]:
    """The function at the end of the path."""
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError([f"{KEY}: expected an import path package.module:function, found {path!r}"])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"{KEY}={path}: no module {error.name!r}; is its folder on PYTHONPATH, and what it imports installed?"]
        ) from error
    except Exception as error:  # the user's module may fail in any way; the traceback stays in the cause
        raise ConfigError([f"{KEY}={path}: importing {module_name} failed: {type(error).__name__}: {error}"]) from error
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError([f"{KEY}={path}: {module_name} ({module.__file__}) has no {name!r}"])
    if not callable(found):
        raise ConfigError([f"{KEY}={path}: expected a function, found {type(found).__name__}"])
    function: Callable[..., Any] = found
    return function


def _checked(function: Callable[..., Any], path: str, keywords: dict[str, Any], inputs: TokenInputs) -> TokenLosses:
    """Call the function. Raises ConfigError if its result cannot be used. No host sync."""
    output = function(inputs, **keywords)
    if not isinstance(output, TokenLosses):
        raise ConfigError([f"{KEY}={path}: expected a TokenLosses, found {type(output).__name__}"])
    tokens = inputs.student_mask_T.shape
    if output.loss_T.shape != tokens or output.counted_T.shape != tokens:
        found = f"loss_T {tuple(output.loss_T.shape)}, counted_T {tuple(output.counted_T.shape)}"
        raise ConfigError([f"{KEY}={path}: expected one number per token, {tuple(tokens)}, found {found}"])
    wrong = [name for name, column in output.columns.items() if column.shape != tokens]
    missing = sorted(COLUMNS - output.columns.keys())
    if wrong or missing:
        expected = "expected the columns of `make_columns`, one number per token"
        raise ConfigError([f"{KEY}={path}: {expected}; missing: {missing}, of another shape: {wrong}"])
    return output


COLUMNS = {
    "trusted",
    "log_ratio",
    "divergence",
    "advantage",
    "ratio",
    "clipped",
    "loss",
    "teacher_mass",
    "student_mass",
}
"""Required names of `TokenLosses.columns`."""
