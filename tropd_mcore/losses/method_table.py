"""From the objective section of the configuration to the loss function: the one place that knows both.

Not for the mathematics (see `objectives`). A new method is one class in `config.schema`, one function in `objectives`
and one binder here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tropd_mcore.config.schema import ObjectiveConfig, OpdObjective, PolicyGradientConfig, TropdObjective
from tropd_mcore.losses.objectives import ObjectiveOutput, TokenInputs, opd, tropd

Objective = Callable[[TokenInputs], ObjectiveOutput]


def bind_objective(objective: ObjectiveConfig) -> Objective:
    """The loss function of one micro-batch, with every constant taken from `objective`."""
    return OBJECTIVES[objective.kind](objective)


def _bind_tropd(objective: TropdObjective) -> Objective:
    trust, outlier, guidance = objective.trust, objective.outlier, objective.guidance
    return partial(
        tropd,
        trust_mode=trust.mode,
        trust_threshold=trust.threshold,
        outlier_mode=outlier.mode,
        outlier_weight=outlier.weight,
        outlier_norm=outlier.norm,
        clip_tau=outlier.clip_tau,
        beta=guidance.beta,
        prefix_loss=guidance.loss if guidance.enabled else "none",
        **_policy_gradient_keys(objective.policy_gradient),
    )


def _bind_opd(objective: OpdObjective) -> Objective:
    return partial(opd, **_policy_gradient_keys(objective.policy_gradient))


def _policy_gradient_keys(config: PolicyGradientConfig) -> dict[str, Any]:
    return config.model_dump()


OBJECTIVES: dict[str, Callable[[Any], Objective]] = {"tropd": _bind_tropd, "opd": _bind_opd}
