"""The constants of every objective and their defaults, once: for the configuration and for callers of the loss alike.

Not for equations (`objectives.<family>`). Invariants: neither torch nor pydantic is imported; a default stands in one
signature here, and the keys of the configuration read it there (`default`); the name of a function is the kind of the
configuration and the name of the loss function; its keywords are those of the loss function.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LAMBDA_RATIO = math.log(0.3 / 0.7)
"""log(lambda / (1 - lambda)), nats. Source: REOPOLD, lambda = 0.3."""


@dataclass(frozen=True)
class PolicyGradient:
    """How an advantage becomes a gradient: the ratio of a policy that moved, and the mismatch of two engines.

    Of each field, `config.objectives.base.PolicyGradientConfig` has the meaning, range and source.
    """

    ratio: str = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    mismatch: str = "off"
    tis_cap: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    mask_below: float = -0.2
    advantage_clip: float | None = None


NO_DUAL_CLIP = PolicyGradient(dual_clip=None)
"""Of objectives whose source has no dual clip."""


@dataclass(frozen=True)
class Constants:
    """An objective with every constant in place."""

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the loss function."""


Factory = Callable[..., Constants]


def default(factory: Factory, name: str) -> Any:
    """Return the default of the constant `name` of an objective."""
    value = inspect.signature(factory).parameters[name].default
    assert value is not inspect.Parameter.empty, f"{factory.__name__}: {name} has no default"
    return value


# trust_region


def tropd(
    *,
    trust_mode: str = "bernoulli",
    trust_threshold: float = LAMBDA_RATIO,
    outlier_mode: str = "fkl_direct",
    outlier_weight: float = 1.0,
    outlier_norm: str = "truncated",
    clip_tau: float = LAMBDA_RATIO,
    beta: float = 1e-3,
    prefix_loss: str = "nll",
    policy: PolicyGradient = PolicyGradient(),
) -> Constants:
    """Trust-region on-policy distillation."""
    return Constants("tropd", locals())


def tropd_aopd(*, aopd_threshold: float = 0.0, aopd_weight: float = 1.0, **of_tropd: Any) -> Constants:
    """TrOPD plus AOPD's forward KL; the other keywords are those of `tropd`."""
    added = {"aopd_threshold": aopd_threshold, "aopd_weight": aopd_weight}
    return Constants("tropd_aopd", {**tropd(**of_tropd).values, **added})


def opd(*, policy: PolicyGradient = PolicyGradient()) -> Constants:
    """Plain on-policy distillation."""
    return Constants("opd", locals())


def aopd(*, threshold: float = 0.0, norm: str = "truncated", policy: PolicyGradient = NO_DUAL_CLIP) -> Constants:
    """Asymmetric OPD."""
    return Constants("aopd", locals())


# rewards


def reopold(*, floor: float = LAMBDA_RATIO, train: str = "all", policy: PolicyGradient = NO_DUAL_CLIP) -> Constants:
    """Relaxed OPD."""
    return Constants("reopold", locals())


def entropy_opd(*, denominator: str = "selected", policy: PolicyGradient = PolicyGradient()) -> Constants:
    """OPD on the tokens where the student is most uncertain."""
    return Constants("entropy_opd", locals())


def exopd(*, scale: float = 1.25, policy: PolicyGradient = PolicyGradient(mismatch="tis", tis_cap=5.0)) -> Constants:
    """G-OPD and ExOPD. Source of the mismatch weight: G-OPD's code, token level, at most 5.0."""
    return Constants("exopd", locals())


def topd(*, mixing: float = 0.9, policy: PolicyGradient = NO_DUAL_CLIP) -> Constants:
    """TOP-D."""
    return Constants("topd", locals())


def vopd(*, policy: PolicyGradient = NO_DUAL_CLIP) -> Constants:
    """VOPD: OPD with a baseline."""
    return Constants("vopd", locals())


def iw_opd(*, policy: PolicyGradient = NO_DUAL_CLIP) -> Constants:
    """OPD with more weight on early tokens."""
    return Constants("iw_opd", locals())


def power_opd(*, power: float = 5.0, policy: PolicyGradient = NO_DUAL_CLIP) -> Constants:
    """PowerOPD."""
    return Constants("power_opd", locals())


# verified


def kdrl(*, beta: float = 5e-3, policy: PolicyGradient = NO_DUAL_CLIP) -> Constants:
    """KDRL. The configuration lowers beta over the run, from this value."""
    return Constants("kdrl", locals())


def rlad(
    *,
    anchor: float = 0.5,
    reference_weight: float = 0.0,
    policy: PolicyGradient = PolicyGradient(ratio="ppo_clip", dual_clip=None),
) -> Constants:
    """RLAD."""
    return Constants("rlad", locals())


# candidates


def rethinking(*, support: str = "student", policy: PolicyGradient = PolicyGradient(ratio="ppo_clip")) -> Constants:
    """Rethinking OPD."""
    return Constants("rethinking", locals())


# matching


def eopd(
    *, entropy_threshold: float = 0.8, norm: str = "truncated", policy: PolicyGradient = NO_DUAL_CLIP
) -> Constants:
    """Entropy-aware OPD."""
    return Constants("eopd", locals())


def jsd(*, beta: float = 0.5, policy: PolicyGradient = PolicyGradient()) -> Constants:
    """TrOPD's Jensen-Shannon baseline."""
    return Constants("jsd", locals())


def gkd(*, divergence: str = "fkl", beta: float = 0.5, norm: str = "tail", full_vocabulary: bool = False) -> Constants:
    """Generalised knowledge distillation on the student's rollouts."""
    return Constants("gkd", locals())


def lsm(*, sampled_tail: bool = False, clip_log_ratio: float | None = None) -> Constants:
    """Local support matching."""
    return Constants("lsm", locals())


# self_distillation


def sdpo(
    *,
    alpha: float = 0.5,
    norm: str = "tail",
    ratio_cap: float = 2.0,
    policy: PolicyGradient = PolicyGradient(dual_clip=None, mismatch="tis", tis_cap=2.0),
) -> Constants:
    """Self-distillation. Source of the mismatch weight: SDPO's code, token level, at most 2.0."""
    return Constants("sdpo", locals())
