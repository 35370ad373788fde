"""Keys of an objective that another key leaves without effect, where they are not at their default.

Not for settings that train something wrong (`objective_checks`, `divergence_checks`) or for a custom objective, whose
function decides what it reads. Invariant: each problem is one line that names both keys; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.advantage_objectives import ReopoldObjective, RladObjective
from tropd_mcore.config.derived import policy_gradient
from tropd_mcore.config.divergence_objectives import CustomObjective, GkdObjective
from tropd_mcore.config.fields import Section
from tropd_mcore.config.schema import ObjectiveConfig
from tropd_mcore.config.tropd_objectives import PolicyGradientConfig, PolicyGradientObjective, TropdObjective


def keys_without_effect(objective: ObjectiveConfig) -> Iterator[str]:
    """Return a line for each key that was changed and is not looked at."""
    if isinstance(objective, CustomObjective):
        return
    if isinstance(objective, PolicyGradientObjective):
        yield from _policy_gradient(policy_gradient(objective), objective.default_policy_gradient())
    if isinstance(objective, TropdObjective):
        yield from _tropd(objective)
    if isinstance(objective, ReopoldObjective) and objective.stages == 1:
        yield from _changed(objective, "objective", ("switch_at", "entropy_fraction"), "objective.stages=1")
    if isinstance(objective, RladObjective) and objective.reference_weight == 0:
        yield from _changed(objective, "objective", ("reference",), "objective.reference_weight=0")
    if isinstance(objective, GkdObjective):
        if objective.divergence != "jsd":
            yield from _changed(objective, "objective", ("beta",), f"objective.divergence={objective.divergence}")
        if objective.full_vocabulary:
            yield from _changed(objective, "objective", ("norm",), "objective.full_vocabulary=true")


def _policy_gradient(policy: PolicyGradientConfig, default: PolicyGradientConfig) -> Iterator[str]:
    """`default`: that of the objective's kind."""
    key = "objective.policy_gradient"
    if policy.ratio != "ppo_clip":
        of_the_clip = ("clip_low", "clip_high", "dual_clip")
        yield from _changed(policy, key, of_the_clip, f"{key}.ratio={policy.ratio}", default)
    constants = {"tis": ("tis_cap",), "icepop": ("icepop_low", "icepop_high"), "mask": ("mask_below",)}
    for mode, names in constants.items():
        if policy.mismatch != mode:
            yield from _changed(policy, key, names, f"{key}.mismatch={policy.mismatch}", default)


def _tropd(objective: TropdObjective) -> Iterator[str]:
    trust, outlier, guidance = objective.trust, objective.outlier, objective.guidance
    outlier_mode = f"objective.outlier.mode={outlier.mode}"
    if outlier.mode in ("mask", "clip"):  # they trust where the log-ratio is above outlier.clip_tau
        yield from _changed(trust, "objective.trust", ("mode", "threshold"), outlier_mode)
    else:
        yield from _changed(outlier, "objective.outlier", ("clip_tau",), outlier_mode)
        if trust.mode != "threshold":
            yield from _changed(trust, "objective.trust", ("threshold",), f"objective.trust.mode={trust.mode}")
    if outlier.mode == "mask":
        yield from _changed(outlier, "objective.outlier", ("weight",), outlier_mode)
    if guidance.loss == "none":
        yield from _changed(guidance, "objective.guidance", ("beta",), "objective.guidance.loss=none")
    if guidance.schedule == "constant":
        yield from _changed(guidance, "objective.guidance", ("total_steps",), "objective.guidance.schedule=constant")


def _changed(
    section: Section, key: str, names: tuple[str, ...], other: str, default: Section | None = None
) -> Iterator[str]:
    """A line for each of the keys `names` that is not at its default, because of the setting `other`.

    `default` has the defaults where they are not those of the section's class.
    """
    for name in names:
        value = getattr(section, name)
        usual = type(section).model_fields[name].default if default is None else getattr(default, name)
        if value != usual:
            yield f"{key}.{name}={value} has no effect with {other}; remove the one or change the other"
