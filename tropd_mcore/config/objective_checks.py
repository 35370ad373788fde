"""Settings of an objective that would train nothing, the wrong thing, or something other than what the keys say.

Not for ranges of single keys (the objective classes) or for other sections (`checks`). Invariant: each problem is one
line that names the keys to change; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.advantage_objectives import (
    EntropyOpdObjective,
    KdrlObjective,
    PowerOpdObjective,
    ReopoldObjective,
    RethinkingObjective,
    RladObjective,
    TopdObjective,
    VopdObjective,
)
from tropd_mcore.config.derived import policy_gradient, updates_per_step
from tropd_mcore.config.divergence_checks import divergence_problems
from tropd_mcore.config.divergence_objectives import SdpoObjective, TropdAopdObjective
from tropd_mcore.config.effect_checks import keys_without_effect
from tropd_mcore.config.schema import Config, ObjectiveConfig
from tropd_mcore.config.tropd_objectives import TropdObjective


def objective_problems(config: Config) -> Iterator[str]:
    """Return every problem of the objective's own settings."""
    yield from _rewards(config)
    yield from divergence_problems(config)
    yield from keys_without_effect(config.objective)


def _rewards(config: Config) -> Iterator[str]:
    objective = config.objective
    yield from reward_objective_problems(objective)
    if isinstance(objective, KdrlObjective | RladObjective | SdpoObjective) and config.verifier.kind == "none":
        yield (
            f"objective.kind={objective.kind} learns from a verifier, but verifier.kind=none; "
            "set verifier.kind=exact_match or math_verify, and give the prompts an `answer`"
        )
    in_groups = isinstance(objective, KdrlObjective | RladObjective) or (
        isinstance(objective, TopdObjective) and objective.normalise
    )
    if in_groups and config.rollout.samples_per_prompt < 2:
        yield (
            f"objective.kind={objective.kind} compares the samples of a prompt, but rollout.samples_per_prompt = "
            f"{config.rollout.samples_per_prompt}; set it to 2 or more"
        )
    if isinstance(objective, SdpoObjective):
        yield from _self_teacher(config)
    if _counts_trained_only(objective) and config.loss.aggregation == "sequence_mean":
        yield (
            "loss.aggregation=sequence_mean divides by the number of all tokens of a sample, but objective.kind="
            f"{objective.kind} by that of the tokens it trains; set loss.aggregation=token_mean"
        )


def _self_teacher(config: Config) -> Iterator[str]:
    kind = config.objective.kind
    if config.teacher.path != config.student.path:
        yield (
            f"objective.kind={kind} has the student itself as teacher, but teacher.path={config.teacher.path} is not "
            f"student.path={config.student.path}; set teacher.path={config.student.path}"
        )
    if config.rollout.samples_per_prompt < 2:
        yield (
            f"objective.kind={kind} shows the teacher the solution of another sample of the prompt, but "
            f"rollout.samples_per_prompt = {config.rollout.samples_per_prompt}; set it to 2 or more"
        )


def reward_objective_problems(objective: ObjectiveConfig) -> Iterator[str]:
    """Return every problem of the objective's section that can be seen without the other sections."""
    policy, updates = policy_gradient(objective), updates_per_step(objective)
    key = "objective.policy_gradient"
    if updates > 1 and policy.ratio == "none" and not isinstance(objective, SdpoObjective):
        yield (
            f"{key}: mini_batches * epochs = {policy.mini_batches} * {policy.epochs} = {updates} updates a rollout "
            "batch with ratio=none, which ignores that the policy has moved since the rollout; "
            "set ratio=ppo_clip or importance, or make one update"
        )
    if isinstance(objective, RladObjective) and policy.ratio == "none":
        yield f"{key}.ratio=none leaves objective.kind=rlad without the ratio that it anchors; set ratio=ppo_clip"
    without_log_ratio = KdrlObjective | RladObjective | TopdObjective | PowerOpdObjective
    if isinstance(objective, without_log_ratio) and policy.advantage_clip is not None:
        yield (
            f"{key}.advantage_clip clamps a log-ratio, but the advantage of objective.kind={objective.kind} is none; "
            "remove it"
        )
    if isinstance(objective, RethinkingObjective):
        yield from _rethinking(objective)
    if isinstance(objective, VopdObjective) and objective.own_topk == 1:
        yield (
            "objective.own_topk = 1: renormalised on one candidate, student and teacher are equal and the baseline "
            "of vopd is always 0; set it to 2 or more, or objective.kind=opd"
        )
    extends_tropd = isinstance(objective, TropdAopdObjective)  # `divergence_checks`
    if isinstance(objective, TropdObjective) and not extends_tropd and _topk_divergence_is_zero(objective):
        yield (
            "objective.outlier.topk = 1 with norm=renorm: renormalised on one token, student and teacher are equal and "
            "the forward KL is always 0; set topk to 2 or more, or another norm"
        )


def _rethinking(objective: RethinkingObjective) -> Iterator[str]:
    """One candidate is not degenerate: its log-probs are over the whole vocabulary, only its weight is 1."""
    policy, updates = objective.policy_gradient, updates_per_step(objective)
    if policy.mismatch != "off":
        yield (
            f"objective.policy_gradient.mismatch={policy.mismatch} weighs sampled tokens, but the candidates of "
            "objective.kind=rethinking were not sampled; set mismatch=off"
        )
    if updates > 1 and objective.support in ("teacher", "union", "xor"):
        yield (
            f"objective.support={objective.support} with {updates} updates a rollout batch: the student's log-probs of "
            "the teacher's candidates are not kept from before the first update, so they have no ratio; "
            "set support=student or intersection, or make one update"
        )


def _counts_trained_only(objective: ObjectiveConfig) -> bool:
    """Whether the denominator is the number of tokens that the objective trains."""
    if isinstance(objective, EntropyOpdObjective):
        return objective.denominator == "selected"
    return isinstance(objective, ReopoldObjective) and objective.stages == 2


def _topk_divergence_is_zero(objective: TropdObjective) -> bool:
    """Whether a term of the loss is a forward KL renormalised on one token."""
    outlier, guidance = objective.outlier, objective.guidance
    as_outlier = outlier.mode in ("fkl_direct", "fkl_scalar") and outlier.weight > 0 and objective.trust.mode != "none"
    as_prefix = guidance.enabled and guidance.loss == "topk_fkl"
    return outlier.topk == 1 and outlier.norm == "renorm" and (as_outlier or as_prefix)
