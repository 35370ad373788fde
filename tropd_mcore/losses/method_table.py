"""From the objective section of the configuration to the loss function: the one table of all kinds.

Not for the mathematics (see `objectives`). A new method is one class in `config.{advantage,divergence}_objectives`, one
function in `objectives` and one binder in `reward_methods` or `divergence_methods`.
"""

from __future__ import annotations

from tropd_mcore.config.schema import ObjectiveConfig
from tropd_mcore.losses.binding import Binder, Objective
from tropd_mcore.losses.divergence_methods import DIVERGENCE_OBJECTIVES
from tropd_mcore.losses.reward_methods import REWARD_OBJECTIVES
from tropd_mcore.losses.tropd_methods import TROPD_OBJECTIVES

__all__ = ["OBJECTIVES", "Objective", "bind_objective"]


def bind_objective(objective: ObjectiveConfig, progress: float = 0.0) -> Objective:
    """The loss function of one micro-batch, with every constant taken from `objective`.

    `progress` in [0, 1) is step / run.steps, for the objectives that change with time.
    """
    return OBJECTIVES[objective.kind](objective, progress)


OBJECTIVES: dict[str, Binder] = TROPD_OBJECTIVES | REWARD_OBJECTIVES | DIVERGENCE_OBJECTIVES
