"""Binders of the objectives with a differentiable divergence: from the section of a kind to its loss function.

Merged into the table of all kinds (`losses.method_table`). Not for the mathematics (`objectives`).
"""

from __future__ import annotations

from functools import partial

from tropd_mcore.config.divergence_objectives import (
    AopdObjective,
    CustomObjective,
    EopdObjective,
    GkdObjective,
    JsdObjective,
    LsmObjective,
    SdpoObjective,
    TropdAopdObjective,
)
from tropd_mcore.losses.binding import Binder, Objective, policy_of
from tropd_mcore.losses.objectives.custom import load_custom
from tropd_mcore.losses.objectives.matching import gkd, lsm
from tropd_mcore.losses.objectives.mixed import aopd, eopd, jsd, tropd_aopd
from tropd_mcore.losses.objectives.self_teacher import sdpo
from tropd_mcore.losses.tropd_methods import bind_tropd


def _bind_eopd(objective: EopdObjective, progress: float) -> Objective:
    return partial(
        eopd,
        entropy_threshold=objective.entropy_threshold,
        norm=objective.norm,
        policy=policy_of(objective.policy_gradient),
    )


def _bind_aopd(objective: AopdObjective, progress: float) -> Objective:
    return partial(
        aopd, threshold=objective.threshold, norm=objective.norm, policy=policy_of(objective.policy_gradient)
    )


def _bind_tropd_aopd(objective: TropdAopdObjective, progress: float) -> Objective:
    return partial(
        tropd_aopd,
        tropd=bind_tropd(objective, progress),
        aopd_threshold=objective.aopd_threshold,
        aopd_weight=objective.aopd_weight,
        norm=objective.outlier.norm,
    )


def _bind_jsd(objective: JsdObjective, progress: float) -> Objective:
    return partial(jsd, beta=objective.beta, policy=policy_of(objective.policy_gradient))


def _bind_gkd(objective: GkdObjective, progress: float) -> Objective:
    return partial(
        gkd,
        divergence=objective.divergence,
        beta=objective.beta,
        norm=objective.norm,
        full_vocabulary=objective.full_vocabulary,
    )


def _bind_lsm(objective: LsmObjective, progress: float) -> Objective:
    return partial(lsm, sampled_tail=objective.sampled_tail, clip_log_ratio=objective.clip_log_ratio)


def _bind_sdpo(objective: SdpoObjective, progress: float) -> Objective:
    return partial(
        sdpo,
        alpha=objective.alpha,
        norm=objective.norm,
        ratio_cap=objective.ratio_cap,
        policy=policy_of(objective.policy_gradient),
    )


def _bind_custom(objective: CustomObjective, progress: float) -> Objective:
    return load_custom(objective.function, objective.arguments, policy_of(objective.policy_gradient))


DIVERGENCE_OBJECTIVES: dict[str, Binder] = {
    "eopd": _bind_eopd,
    "aopd": _bind_aopd,
    "tropd_aopd": _bind_tropd_aopd,
    "jsd": _bind_jsd,
    "gkd": _bind_gkd,
    "lsm": _bind_lsm,
    "sdpo": _bind_sdpo,
    "custom": _bind_custom,
}
