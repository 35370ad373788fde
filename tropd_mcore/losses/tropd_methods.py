"""Binders of TrOPD and plain on-policy distillation: from the section of a kind to its loss function.

Merged into the table of all kinds (`losses.method_table`). Not for the mathematics (`objectives`).
"""

from __future__ import annotations

from functools import partial

from tropd_mcore.config.tropd_objectives import OpdObjective, TropdObjective
from tropd_mcore.losses.binding import Binder, Objective, policy_of
from tropd_mcore.losses.objectives.tropd import opd, tropd


def bind_tropd(objective: TropdObjective, progress: float) -> Objective:
    """Return TrOPD with the constants of `objective`: also the TrOPD part of a kind that extends it."""
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
        policy=policy_of(objective.policy_gradient),
    )


def _bind_opd(objective: OpdObjective, progress: float) -> Objective:
    return partial(opd, policy=policy_of(objective.policy_gradient))


TROPD_OBJECTIVES: dict[str, Binder] = {"tropd": bind_tropd, "opd": _bind_opd}
