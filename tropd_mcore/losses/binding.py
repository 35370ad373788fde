"""What every binder of an objective is made of: its type, and the policy gradient from its configuration section.

A binder takes an objective's section and the progress of the run, and returns the loss function with all constants in
place; the tables of binders are `method_table`, `reward_methods` and `divergence_methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tropd_mcore.config.tropd_objectives import PolicyGradientConfig
from tropd_mcore.losses.objectives.inputs import ObjectiveOutput, TokenInputs
from tropd_mcore.losses.policy_gradient import PolicyGradient

Objective = Callable[[TokenInputs], ObjectiveOutput]
"""The loss of one micro-batch or of a chunk of it."""
Binder = Callable[[Any, float], Objective]
"""(section of the objective, progress of the run in [0, 1)) -> objective."""


def policy_of(config: PolicyGradientConfig) -> PolicyGradient:
    """The part of the section that the loss knows; mini-batches and epochs are the trainer's."""
    return PolicyGradient(**config.model_dump(exclude={"mini_batches", "epochs"}))
