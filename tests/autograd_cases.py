"""The loss inside other autograd code: whether each form of the loss is right in each situation.

This is not a test. A situation is run once with the loss under test and once with a plain PyTorch loss in float64. The
outcome is `right`, `refused` (one clear error) or `WRONG`. Runs on any device and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from tests.autograd_program import FORMS, Program, Setting
from tests.autograd_situations import SITUATIONS, Situation
from tropd_mcore.errors import LossInputError

__all__ = ["FORMS", "SITUATIONS", "Setting", "outcome", "outcomes"]

TOLERANCE = 1e-10
REFUSALS = (
    "has no second derivative",
    "second backward pass",
    "functional transform",
    "no forward-mode derivative",
    "two dtypes",
    "run again inside a backward pass",
    "modified by an inplace operation",
    "Inference tensors cannot be saved for backward",
)
"""Parts of error messages that count as clear: ours, and autograd's about in-place changes and inference tensors."""


def outcome(setting: Setting, situation: Situation) -> str:
    """`right`, `refused: why`, or `WRONG: how`. Runs the situation with the loss and with the truth."""
    found, expected = Program(setting, truth=False), Program(setting, truth=True)
    try:
        situation(found)
    except (LossInputError, RuntimeError) as error:
        why = next((words for words in REFUSALS if words in str(error)), None)
        return f"refused: {why}" if why else f"WRONG: {type(error).__name__}: {error}"
    situation(expected)
    right, numbers = expected.gradients(), found.gradients()
    missing = right.keys() - numbers.keys() - ({"weight"} if setting.given else set())
    if missing:
        return f"WRONG: no {missing}"
    for name, number in numbers.items():
        error = _difference(number, right.get(name, torch.zeros_like(number)), found)
        if not error <= TOLERANCE:
            return f"WRONG: {name} off by {error:.1e}"
    return "right"


def _difference(number: Tensor, right: Tensor, program: Program) -> float:
    """Error relative to the largest entry. For a weight, only this rank's rows are compared."""
    if number.shape == program.numbers.weight_VD.shape and not program.setting.given:
        rows = slice(program.shard.start, program.shard.stop)
        number, right = number[rows], right[rows]
    scale = max(1.0, float(right.detach().abs().max()))
    return float((number.detach() - right.detach()).abs().max()) / scale


def outcomes(
    backend: str, device: str = "cpu", situations: Iterable[str] = SITUATIONS, forms: Iterable[str] = FORMS
) -> dict[str, dict[str, str]]:
    """{situation: {form: outcome}} for one backend."""
    settings = {name: replace(Setting(backend, device=device), **FORMS[name]) for name in forms}
    return {
        name: {form: outcome(setting, SITUATIONS[name]) for form, setting in settings.items()} for name in situations
    }
