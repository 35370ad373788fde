"""Binders of the objectives that teach by an advantage of the sampled token or of candidates (see `binding`)."""

from __future__ import annotations

from functools import partial

from tropd_mcore.config.advantage_objectives import (
    EntropyOpdObjective,
    ExopdObjective,
    IwOpdObjective,
    KdrlObjective,
    PowerOpdObjective,
    ReopoldObjective,
    RethinkingObjective,
    RladObjective,
    TopdObjective,
    VopdObjective,
)
from tropd_mcore.losses.batch_statistics import reopold_phase
from tropd_mcore.losses.binding import Binder, Objective, policy_of
from tropd_mcore.losses.objectives.candidates import rethinking
from tropd_mcore.losses.objectives.rewards import entropy_opd, exopd, iw_opd, power_opd, reopold, topd, vopd
from tropd_mcore.losses.objectives.verified import kdrl, rlad


def _bind_reopold(config: ReopoldObjective, progress: float) -> Objective:
    phase = reopold_phase(config, progress)
    return partial(reopold, floor=config.floor, train=phase, policy=policy_of(config.policy_gradient))


def _bind_entropy_opd(config: EntropyOpdObjective, progress: float) -> Objective:
    return partial(entropy_opd, denominator=config.denominator, policy=policy_of(config.policy_gradient))


def _bind_exopd(config: ExopdObjective, progress: float) -> Objective:
    return partial(exopd, scale=config.scale, policy=policy_of(config.policy_gradient))


def _bind_topd(config: TopdObjective, progress: float) -> Objective:
    return partial(topd, mixing=config.mixing, policy=policy_of(config.policy_gradient))


def _bind_vopd(config: VopdObjective, progress: float) -> Objective:
    return partial(vopd, policy=policy_of(config.policy_gradient))


def _bind_iw_opd(config: IwOpdObjective, progress: float) -> Objective:
    return partial(iw_opd, policy=policy_of(config.policy_gradient))


def _bind_power_opd(config: PowerOpdObjective, progress: float) -> Objective:
    return partial(power_opd, power=config.power, policy=policy_of(config.policy_gradient))


def _bind_kdrl(config: KdrlObjective, progress: float) -> Objective:
    beta = config.beta_start + (config.beta_end - config.beta_start) * progress
    return partial(kdrl, beta=beta, policy=policy_of(config.policy_gradient))


def _bind_rlad(config: RladObjective, progress: float) -> Objective:
    return partial(
        rlad,
        anchor=config.anchor,
        reference_weight=config.reference_weight,
        policy=policy_of(config.policy_gradient),
    )


def _bind_rethinking(config: RethinkingObjective, progress: float) -> Objective:
    return partial(rethinking, support=config.support, policy=policy_of(config.policy_gradient))


REWARD_OBJECTIVES: dict[str, Binder] = {
    "reopold": _bind_reopold,
    "entropy_opd": _bind_entropy_opd,
    "exopd": _bind_exopd,
    "topd": _bind_topd,
    "vopd": _bind_vopd,
    "iw_opd": _bind_iw_opd,
    "power_opd": _bind_power_opd,
    "kdrl": _bind_kdrl,
    "rlad": _bind_rlad,
    "rethinking": _bind_rethinking,
}
