"""Every objective with its constants, their defaults and the inputs that it needs; exported by `objectives`.

This module does not contain equations (`objectives.<family>`). Invariants: neither torch nor pydantic is imported. Each
default is in one signature here, and the configuration keys read it from there (`default`). The name of a function is
the kind in the configuration and the name of the loss function; its keywords are those of the loss function.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LAMBDA_RATIO = math.log(0.3 / 0.7)
"""log(lambda / (1 - lambda)), nats. Source: REOPOLD, lambda = 0.3."""


CHOICES: dict[str, tuple[str, ...]] = {
    "trust_mode": ("bernoulli", "soft", "threshold", "none"),
    "outlier_mode": ("fkl_direct", "fkl_scalar", "mask", "clip"),
    "prefix_loss": ("nll", "none", "topk_fkl", "scalar_adv"),
    "outlier_norm": ("truncated", "tail", "renorm", "teacher_renorm"),
    "norm": ("truncated", "tail", "renorm", "teacher_renorm"),
    "divergence": ("fkl", "rkl", "jsd", "k1"),
    "support": ("student", "teacher", "intersection", "union", "xor"),
    "denominator": ("selected", "all"),
    "train": ("all", "above_floor", "selected"),
    "ratio": ("none", "importance", "ppo_clip"),
    "mismatch": ("off", "tis", "icepop", "mask"),
}
"""Constants whose values are words -> the allowed words, as in the configuration."""


def _refuse_unknown_words(what: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a word that no equation has."""
    for name, value in values.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{what}: {name}={value!r}, expected one of {', '.join(CHOICES[name])}")


@dataclass(frozen=True)
class PolicyGradient:
    """How an advantage becomes a gradient: ratio to the policy before the update, and mismatch of the two engines.

    `config.objectives.base.PolicyGradientConfig` has the meaning, range and source of each field.
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

    def __post_init__(self) -> None:
        _refuse_unknown_words("PolicyGradient", vars(self))


NO_DUAL_CLIP = PolicyGradient(dual_clip=None)
"""For objectives whose source has no dual clip."""


@dataclass(frozen=True)
class WholeVocabulary:
    """A divergence that the kernel computes over the whole vocabulary, `TokenInputs.divergence_T`."""

    divergence: str
    """fkl, rkl or jsd"""
    beta: float = 0.5
    """Weight of the teacher in the mixture, for jsd"""


@dataclass(frozen=True)
class Objective:
    """An objective with all its constants, as the functions below return it and `distill_loss` takes it."""

    family: str
    """Module of `tropd_mcore.objectives` that has the equation."""
    kind: str
    """Name of the equation."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the equation."""
    needs: frozenset[str] = frozenset()
    """Required arguments of `distill_loss` and fields of its teacher. Without them it would train something else."""
    function: Callable[..., Any] | None = None
    """The equation itself, if the caller provides it."""
    whole: WholeVocabulary | None = None
    """The divergence over the whole vocabulary, if the objective reads one."""
    trains_prefixes: bool = False
    """Whether tokens of the teacher are trained like all others, without a `prefix_loss` that says how."""

    def __post_init__(self) -> None:
        if self.function is None:
            _refuse_unknown_words(self.kind, self.values)

    @property
    def reads_teacher(self) -> bool:
        """Whether it reads any number of the teacher."""
        named = any(need.startswith("teacher") or need == "student_topk" for need in self.needs)
        return named or self.whole is not None or self.function is not None

    def __str__(self) -> str:
        """The call that makes it, with the constants that differ from the defaults."""
        if self.function is not None:
            return f"the function {getattr(self.function, '__name__', self.function)}"
        usual = globals()[self.kind]().values
        values = (f"{name}={value!r}" for name, value in self.values.items() if value != usual.get(name))
        return f"{self.kind}({', '.join(values)})"


Factory = Callable[..., Objective]

LOG_RATIO = ("target_ids_T", "teacher.logp_T")
"""Needs of log q(x) - log p(x)."""
CANDIDATES = ("teacher.ids_TK", "teacher.logp_TK")


def _needs(*names: str, policy: PolicyGradient | None = None, old: str = "old_logp_T") -> frozenset[str]:
    """Needs of an objective. `old` is the denominator of the ratio; without it every ratio is 1 and no clip acts."""
    found = set(names)
    if policy is not None and policy.ratio != "none":
        found.add(old)
    if policy is not None and policy.mismatch != "off":
        found.add("rollout_logp_T")
    return frozenset(found)


def _needs_of_tropd(values: Mapping[str, Any]) -> frozenset[str]:
    region = values["outlier_mode"] in ("mask", "clip")  # a static one, in place of the gate
    needs = set(_needs(*LOG_RATIO, policy=values["policy"]))
    if values["trust_mode"] == "bernoulli" and not region:
        needs.add("trust_u_T")
    diverges = not region and values["trust_mode"] != "none" and values["outlier_weight"] != 0
    if diverges or (values["prefix_loss"] == "topk_fkl" and values["beta"] != 0):
        needs.update(CANDIDATES)
    return frozenset(needs)


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
) -> Objective:
    """Trust-region on-policy distillation."""
    return Objective("trust_region", "tropd", locals(), _needs_of_tropd(locals()))


def tropd_aopd(*, aopd_threshold: float = 0.0, aopd_weight: float = 1.0, **of_tropd: Any) -> Objective:
    """TrOPD plus AOPD's forward KL; the other keywords are those of `tropd`."""
    added, of = {"aopd_threshold": aopd_threshold, "aopd_weight": aopd_weight}, tropd(**of_tropd)
    needs = of.needs | (frozenset(CANDIDATES) if aopd_weight else frozenset())
    return Objective("trust_region", "tropd_aopd", {**of.values, **added}, needs)


def opd(*, policy: PolicyGradient = PolicyGradient()) -> Objective:
    """Plain on-policy distillation."""
    return Objective("trust_region", "opd", locals(), _needs(*LOG_RATIO, policy=policy))


def aopd(*, threshold: float = 0.0, norm: str = "truncated", policy: PolicyGradient = NO_DUAL_CLIP) -> Objective:
    """Asymmetric OPD."""
    return Objective("trust_region", "aopd", locals(), _needs(*LOG_RATIO, *CANDIDATES, policy=policy))


# rewards


def reopold(*, floor: float = LAMBDA_RATIO, train: str = "all", policy: PolicyGradient = NO_DUAL_CLIP) -> Objective:
    """Relaxed OPD."""
    return Objective(
        "rewards",
        "reopold",
        locals(),
        _needs(*LOG_RATIO, *(("selected_T",) if train == "selected" else ()), policy=policy),
    )


def entropy_opd(*, denominator: str = "selected", policy: PolicyGradient = PolicyGradient()) -> Objective:
    """OPD on the tokens with the highest student entropy."""
    return Objective("rewards", "entropy_opd", locals(), _needs(*LOG_RATIO, "selected_T", policy=policy))


def exopd(*, scale: float = 1.25, policy: PolicyGradient = PolicyGradient(mismatch="tis", tis_cap=5.0)) -> Objective:
    """G-OPD and ExOPD. Source of the mismatch weight: G-OPD's code, per token, at most 5.0."""
    return Objective("rewards", "exopd", locals(), _needs(*LOG_RATIO, "reference_logp_T", policy=policy))


def topd(*, mixing: float = 0.9, policy: PolicyGradient = NO_DUAL_CLIP) -> Objective:
    """TOP-D."""
    return Objective("rewards", "topd", locals(), _needs(*LOG_RATIO, "advantage_T", policy=policy))


def vopd(*, policy: PolicyGradient = NO_DUAL_CLIP) -> Objective:
    """VOPD: OPD with a baseline."""
    return Objective("rewards", "vopd", locals(), _needs(*LOG_RATIO, "student_topk", policy=policy))


def iw_opd(*, policy: PolicyGradient = NO_DUAL_CLIP) -> Objective:
    """OPD with more weight on early tokens."""
    return Objective(
        "rewards", "iw_opd", locals(), _needs(*LOG_RATIO, "history_weight_T", "rollout_logp_T", policy=policy)
    )


def power_opd(*, power: float = 5.0, policy: PolicyGradient = NO_DUAL_CLIP) -> Objective:
    """PowerOPD."""
    return Objective("rewards", "power_opd", locals(), _needs(*LOG_RATIO, policy=policy))


# verified


def kdrl(*, beta: float = 5e-3, policy: PolicyGradient = NO_DUAL_CLIP) -> Objective:
    """KDRL. The configuration lowers beta over the run, starting at this value."""
    return Objective("verified", "kdrl", locals(), _needs(*LOG_RATIO, "advantage_T", policy=policy))


def rlad(
    *,
    anchor: float = 0.5,
    reference_weight: float = 0.0,
    policy: PolicyGradient = PolicyGradient(ratio="ppo_clip", dual_clip=None),
) -> Objective:
    """RLAD."""
    return Objective(
        "verified",
        "rlad",
        locals(),
        _needs(*LOG_RATIO, "advantage_T", *(("reference_logp_T",) if reference_weight else ()), policy=policy),
    )


# candidates


def rethinking(*, support: str = "student", policy: PolicyGradient = PolicyGradient(ratio="ppo_clip")) -> Objective:
    """Rethinking OPD."""
    return Objective(
        "candidates",
        "rethinking",
        locals(),
        _needs(
            *(CANDIDATES if support != "student" else ()),
            *(("student_topk",) if support != "teacher" else ()),
            policy=policy,
            old="student_topk.old_logp_TL" if support == "student" else "old_logp_T",
        ),
    )


# matching


def eopd(
    *, entropy_threshold: float = 0.8, norm: str = "truncated", policy: PolicyGradient = NO_DUAL_CLIP
) -> Objective:
    """Entropy-aware OPD."""
    return Objective("matching", "eopd", locals(), _needs(*LOG_RATIO, *CANDIDATES, "teacher.entropy_T", policy=policy))


def jsd(*, beta: float = 0.5, policy: PolicyGradient = PolicyGradient()) -> Objective:
    """TrOPD's Jensen-Shannon baseline."""
    return Objective("matching", "jsd", locals(), _needs(*LOG_RATIO, *CANDIDATES, policy=policy))


def gkd(*, divergence: str = "fkl", beta: float = 0.5, norm: str = "tail", full_vocabulary: bool = False) -> Objective:
    """Generalised knowledge distillation on the student's rollouts."""
    whole = WholeVocabulary(divergence, beta) if full_vocabulary else None
    values = {"divergence": divergence, "beta": beta, "norm": norm, "full_vocabulary": full_vocabulary}
    return Objective("matching", "gkd", values, _needs(*(("teacher logits",) if whole else CANDIDATES)), whole=whole)


def lsm(*, sampled_tail: bool = False, clip_log_ratio: float | None = None) -> Objective:
    """Local support matching."""
    return Objective("matching", "lsm", locals(), _needs(*CANDIDATES, *(LOG_RATIO if sampled_tail else ())))


# self_distillation


def sdpo(
    *,
    alpha: float = 0.5,
    norm: str = "tail",
    ratio_cap: float = 2.0,
    policy: PolicyGradient = PolicyGradient(dual_clip=None, mismatch="tis", tis_cap=2.0),
) -> Objective:
    """Self-distillation. Source of the mismatch weight: SDPO's code, per token, at most 2.0."""
    return Objective("self_distillation", "sdpo", locals(), _needs("target_ids_T", "student_topk", policy=policy))


def opsd(*, entry_clip: float = 0.05, norm: str = "tail") -> Objective:
    """On-policy self-distillation: forward KL with a bound on each entry."""
    return Objective("self_distillation", "opsd", locals(), _needs("student_topk"))


# supervised


def sft() -> Objective:
    """Supervised fine-tuning on responses of the teacher."""
    return Objective("supervised", "sft", {}, _needs("target_ids_T"), trains_prefixes=True)


# user_function


def custom(function: Callable[..., Any], *, needs: tuple[str, ...] = (), **keywords: Any) -> Objective:
    """Return an objective from your function (`TokenInputs` to `TokenLosses`), called once per chunk with `keywords`.

    `needs` are names as in `Objective.needs`. A call without one of them is refused in one line.
    """
    return Objective("user_function", "custom", keywords, frozenset(needs), function)


def from_name(name: str, **constants: Any) -> Objective:
    """Return the objective with this name, as in configuration files. Raises ValueError that lists the names."""
    known = sorted(found for found, made in globals().items() if _is_factory(made))
    if name not in known:
        raise ValueError(f"no objective {name!r}; there are {', '.join(known)}")
    objective: Objective = globals()[name](**constants)
    return objective


def _is_factory(made: object) -> bool:
    if not inspect.isfunction(made) or made.__name__ in ("custom", "from_name"):
        return False
    return made.__annotations__.get("return") == "Objective" and not made.__name__.startswith("_")
